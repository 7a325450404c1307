# SPDX-License-Identifier: Apache-2.0
"""STEM, AITM and ResFlow by hand."""

import dataclasses

import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import MixExperts, SliceFields, TransferAttention
from mvke_tf.models import build_model
from mvke_tf.schema import Task
from tests.layer_checks import BATCH, assert_close, check_layer, loss_and_gradients
from tests.models.problems import (
    CONFIG,
    ITEMS,
    PAIRS,
    SCHEMA,
    USERS,
    numpy_outputs,
    randomize,
    task_losses_and_gradients,
)

VECTORS = np.random.default_rng(0).normal(size=(BATCH, 4)).astype("float32")


def build(name, **settings):
    return randomize(build_model(name, SCHEMA, dataclasses.replace(CONFIG, num_experts=5, **settings)))


def moved(model, task):
    """Names of the variables that a task sends gradient to."""
    _, gradients = task_losses_and_gradients(model, PAIRS, (task,), model.trainable_variables)
    pairs = zip(model.trainable_variables, gradients, strict=True)
    return {
        variable.path: gradient for variable, gradient in pairs if gradient is not None and np.abs(gradient).max() > 0
    }


def test_transfer_attention_layer(tmp_path):
    check_layer(
        TransferAttention(), [VECTORS, VECTORS[::-1].copy()], {"kernels": (3, 4, 4), "biases": (3, 1, 4)}, tmp_path
    )


def test_transfer_attention_by_hand():
    """h1 doubles, h2 and h3 keep: scores |v|² / √2 of p = (1, 0) and q = (0, 2)."""
    layer = TransferAttention()
    layer.build((1, 2), (1, 2))
    layer.set_weights([np.stack([2 * np.eye(2), np.eye(2), np.eye(2)]), np.zeros((3, 1, 2))])
    odds = np.exp(np.array([1.0, 4.0]) / np.sqrt(2))
    share = odds / odds.sum()
    assert_close(layer(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])), [[2 * share[0], 4 * share[1]]])


def test_slices_and_stopped_experts():
    fields = np.arange(BATCH * 2 * 6, dtype="float32").reshape(BATCH, 2, 6)
    config = SliceFields((2, 0), 3).get_config()
    assert SliceFields.from_config(config).get_config() == config
    assert_close(SliceFields((2, 0), 3)(fields)[0, 0], [4, 5, 0, 1])
    layer = MixExperts((0, 1), stopped=(1,))
    outputs, gate = np.ones((BATCH, 2, 3), "float32"), np.full((BATCH, 2), 0.5, "float32")

    def total(arrays):
        return ops.sum(layer(arrays["outputs"], arrays["gate"])), ()

    _, _, gradients, _ = loss_and_gradients(total, {"outputs": outputs, "gate": gate})
    assert_close(gradients["outputs"][0], [[0.5] * 3, [0.0] * 3])
    assert_close(gradients["gate"], np.full((BATCH, 2), 3.0))
    with pytest.raises(ValueError, match="some of the experts"):
        MixExperts((0, 1), stopped=(2,))


def test_a_task_of_stem_moves_its_own_and_the_shared_embeddings_only():
    """Columns of the tables: those of ctr, of cvr, and the shared ones."""
    model = build("stem")
    dim = CONFIG.embedding_dim
    tables = moved(model, "cvr")
    for path, gradient in tables.items():
        if path.startswith("embedding_"):
            assert gradient.shape[-1] == 3 * dim and np.abs(gradient[:, :dim]).max() == 0
            assert min(np.abs(gradient[:, dim : 2 * dim]).max(), np.abs(gradient[:, 2 * dim :]).max()) > 0
    assert not [path for path in tables if path.startswith(("experts_0/", "gate_ctr", "tag_tower_ctr"))]
    assert {path.split("/")[0] for path in tables} > {"experts_1", "experts_2", "gate_cvr", "tag_tower_cvr"}
    # Forward, every expert counts.
    names = {"mixed": "user_vector_cvr", "gate": "gate_cvr", "experts": "experts"}
    found = numpy_outputs(model.part({key: model.get_layer(name).output for key, name in names.items()}), USERS)
    assert found["gate"].shape == (4, 5) and found["gate"].min() > 0
    assert_close(found["mixed"], np.einsum("be,beo->bo", found["gate"], found["experts"]))


def test_resflow_adds_to_the_logit_of_the_task_before():
    model = build("resflow")
    users = numpy_outputs(model.user_tower, {name: PAIRS[name] for name in USERS})
    items = numpy_outputs(model.item_tower, {name: PAIRS[name] for name in ITEMS})
    outputs = numpy_outputs(model, PAIRS)
    dim = CONFIG.embedding_dim
    for side in (users, items):
        assert_close(side["cvr"][:, :dim], side["ctr"])
    residual = np.sum(users["cvr"][:, dim:] * items["cvr"][:, dim:], axis=1, keepdims=True)
    assert_close(outputs["cvr"], outputs["ctr"] + residual)
    # And h_cvr = relu(W x + b) + h_ctr in each layer.
    layers = {name: model.get_layer(name).output for name in ("user_ctr_0", "user_cvr_0", "user_cvr_flow_0")}
    flow = numpy_outputs(model.part(layers), USERS)
    assert_close(flow["user_cvr_flow_0"], flow["user_ctr_0"] + flow["user_cvr_0"])
    # A task without a logit is left out of the flow, which goes on behind it.
    tasks = [Task("click"), Task("stars", "regression"), Task("buy", given="click")]
    model = build_model("resflow", SCHEMA.with_tasks(tasks), CONFIG)
    widths = {task: vector.shape[-1] for task, vector in model.user_tower.output.items()}
    assert widths == {"click": dim, "stars": dim, "buy": 2 * dim}
    assert not [layer.name for layer in model.layers if layer.name.startswith("user_stars_flow")]


def test_aitm_passes_the_vector_of_the_task_before():
    model = build("aitm")
    names = ("user_tower_ctr", "user_tower_cvr", "transfer_cvr", "user_vector_cvr")
    parts = {name: model.get_layer(name) for name in names}
    found = numpy_outputs(model.part({name: layer.output for name, layer in parts.items()}), USERS)
    users = numpy_outputs(model.user_tower, USERS)
    assert_close(users["ctr"], found["user_tower_ctr"])
    kernel, bias = parts["transfer_cvr"].get_weights()
    assert_close(found["transfer_cvr"], np.maximum(found["user_tower_ctr"] @ kernel + bias, 0.0))
    assert_close(users["cvr"], parts["user_vector_cvr"](found["transfer_cvr"], found["user_tower_cvr"]))
