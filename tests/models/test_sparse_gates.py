# SPDX-License-Identifier: Apache-2.0
"""Top-k gates and the load-balancing loss in every mixture of experts."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import ExpertGate, VirtualKernelGate
from mvke_tf.models import build_model
from mvke_tf.models.dense_mmoe import build_mmoe
from mvke_tf.schema import Task
from tests.layer_checks import assert_close, loss_and_gradients
from tests.models.problems import (
    CONFIG,
    ITEMS,
    JIT_COMPILE,
    PAIRS,
    ROWS,
    SCHEMA,
    USERS,
    in_training,
    numpy_outputs,
    randomize,
)

SPARSE = {"num_experts": 5, "gate_top_k": 2, "load_balancing_weight": 0.3, "embedding_dropout_rate": 0.0}
# PLE has a gate per task on both levels, and that of the shared experts on the first.
GATES = {"mvke": 2, "mmoe": 2, "cgc": 2, "ple": 5}


def build(name, schema=SCHEMA, **settings):
    return randomize(build_model(name, schema, dataclasses.replace(CONFIG, name=name, **SPARSE | settings)))


def load_balancing(weights):
    importance = weights.sum(axis=0)
    return SPARSE["load_balancing_weight"] * importance.var() / importance.mean() ** 2


def full_weights(gate):
    """The weights of a gate of a functional model before all but the highest are cut off."""
    if isinstance(gate, ExpertGate):
        return ops.softmax(ops.matmul(gate.input, gate.dense.kernel.value) + gate.dense.bias.value)
    tag, kernels = gate.input
    return ops.softmax(ops.matmul(tag, ops.transpose(ops.take(kernels, gate.kernels, axis=0))))


@pytest.mark.parametrize("name", GATES)
def test_a_saved_model_keeps_its_gates_and_its_load_balancing_loss(name, tmp_path):
    model = build(name)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    results = []
    for either in (model, loaded):
        gates = [layer for layer in either.layers if isinstance(layer, (ExpertGate, VirtualKernelGate))]
        kept, full = [gate.output for gate in gates], list(map(full_weights, gates))
        (outputs, weights, before), losses = in_training(keras.Model(either.input, [either.output, kept, full]), PAIRS)
        assert len(weights) == len(losses) == GATES[name]
        for gate in weights:
            np.testing.assert_array_equal((gate > 0).sum(axis=1), 2)
            assert_close(gate.sum(axis=1), np.ones(len(gate)))
        assert sorted(losses) == pytest.approx(sorted(map(load_balancing, before)), rel=1e-4)
        results.append(outputs)
    for task, output in results[0].items():
        assert_close(results[1][task], output, 1e-6)


@pytest.mark.parametrize("name", GATES)
def test_by_default_all_experts_count_and_nothing_is_added(name):
    plain = {"gate_top_k": 0, "load_balancing_weight": 0.0, "num_levels": 1}
    model = build(name, **plain)
    gate = model.get_layer("gate_ctr").output
    weights, losses = in_training(keras.Model(model.input, gate), PAIRS)
    assert losses == [] and weights.min() > 0.0


def test_distinct_users_and_items_keep_the_load_balancing_loss():
    model = build("mmoe")
    gates = {task: full_weights(model.get_layer(f"gate_{task}")) for task in ("ctr", "cvr")}
    weights = numpy_outputs(model.part(gates), USERS).values()
    _, losses = in_training(model.training_model(), {**USERS, **ITEMS, **ROWS})
    assert losses == pytest.approx(list(map(load_balancing, weights)), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "task", "top_k", "seen"),
    [
        ("mvke", Task("ctr", kernels=(0, 1, 2)), 4, 3),
        ("mmoe", Task("ctr"), 6, 5),
        ("mmoe", Task("ctr", experts=(4,)), 2, 1),
        ("cgc", Task("ctr", experts=(0, 1)), 3, 2),
        ("ple", Task("ctr"), 6, 5),
    ],
)
def test_more_than_a_gate_has_is_an_error(name, task, top_k, seen):
    # The first gate of PLE is that of the first level.
    gate = "gate_1_task_ctr" if name == "ple" else "gate_ctr"
    with pytest.raises(ValueError, match=f"^{gate}: .* that this gate weighs, {seen};.* Received: {top_k}$"):
        build(name, SCHEMA.with_tasks([task]), gate_top_k=top_k)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_the_load_balancing_loss_evens_out_the_use_of_experts(top_k):
    """A gate that starts with almost all weight on one of four experts, trained with and without the loss."""
    features = np.random.default_rng(0).normal(size=(60 * 32, 4)).astype("float32")
    variation = {}
    for coefficient in (0.0, 1.0):
        keras.utils.set_random_seed(0)
        model = build_mmoe(
            4, 4, 1, (6,), (), load_balancing_weight=coefficient, gate_top_k=top_k, return_expert_weights=True
        )
        model.get_layer("gate_task_0").dense.bias.assign([4.0, 0.0, 0.0, 0.0])
        trained = keras.Model(model.input, {"task_0": model.output["task_0"]})
        trained.compile(keras.optimizers.Adam(0.1), loss="mse", jit_compile=JIT_COMPILE)
        trained.fit(features, {"task_0": features[:, :1]}, batch_size=32, verbose=0)
        importance = numpy_outputs(model, features)["task_0_expert_weights"].sum(axis=0)
        variation[coefficient] = float(importance.var() / importance.mean() ** 2)
    assert variation[0.0] > 0.5
    assert variation[1.0] < 0.15


def test_experts_outside_the_top_k_are_not_trained():
    """Of one example, only the two experts that its gate chose have a gradient."""
    model = build("mmoe", SCHEMA.with_tasks([Task("ctr")]), load_balancing_weight=0.0)
    one = {name: array[:1] for name, array in PAIRS.items()}
    chosen = numpy_outputs(model.gates, {name: one[name] for name in USERS})["ctr"][0] > 0
    assert chosen.sum() == 2
    experts = model.get_layer("experts").trainable_variables
    for gradient in loss_and_gradients(lambda _: (ops.sum(model(one)["ctr"]), []), {}, experts)[-1]:
        np.testing.assert_array_equal(np.any(gradient != 0.0, axis=(1, 2)), chosen)
