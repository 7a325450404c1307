# SPDX-License-Identifier: Apache-2.0
import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.models.mvke import build_mvke, default_kernels
from mvke_tf.schema import Task
from tests.layer_checks import assert_close
from tests.models.problems import (
    CONFIG,
    ITEMS,
    NUM_ITEMS,
    NUM_USERS,
    PAIRS,
    SCHEMA,
    USERS,
    labels,
    numpy_outputs,
    randomize,
    task_losses_and_gradients,
)

KERNELS = {"ctr": (0, 1, 2), "cvr": (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("num_tasks", "num_kernels", "expected"),
    [
        (2, 5, ((0, 1, 2), (1, 2, 3, 4))),
        (2, 3, ((0, 1), (0, 1, 2))),
        (2, 8, ((0, 1, 2, 3), (2, 3, 4, 5, 6, 7))),
        (3, 6, ((0, 1), (1, 2, 3), (2, 3, 4, 5))),
        (1, 5, ((0, 1, 2, 3, 4),)),
        (3, 1, ((0,), (0,), (0,))),
    ],
)
def test_default_kernels(num_tasks, num_kernels, expected):
    assert default_kernels(num_tasks, num_kernels) == expected


def test_default_kernels_are_never_empty_and_cover_all():
    for num_tasks in range(1, 7):
        for num_kernels in range(1, 13):
            kernels = default_kernels(num_tasks, num_kernels)
            assert len(kernels) == num_tasks and all(kernels)
            assert set().union(*kernels) == set(range(num_kernels))


def test_one_table_of_virtual_kernels(model):
    tables = [weight for weight in model.weights if "virtual_kernels" in weight.path]
    assert [weight.path for weight in tables] == ["virtual_kernels/kernels"]
    gradient = task_losses_and_gradients(model, PAIRS, ("ctr",), tables)[1][0]
    # CTR reads the kernels 0 to 2, in the user tower as in its gate.
    assert np.abs(gradient[:3]).max(axis=-1).min() > 1e-4
    np.testing.assert_array_equal(gradient[3:], 0.0)


def test_a_task_sends_no_gradient_to_experts_that_it_cannot_select(model):
    experts = model.get_layer("virtual_kernel_experts").trainable_variables
    for task, used in KERNELS.items():
        for gradient in task_losses_and_gradients(model, PAIRS, (task,), experts)[1]:
            np.testing.assert_array_equal(np.delete(gradient, used, axis=0), 0.0)
            assert np.abs(gradient[list(used)]).max(axis=(1, 2)).min() > 0.0


def test_gates_weight_the_experts_of_the_user_vector(model):
    """The published form, `⟨Σ_k g_k expert_k, tag⟩`, from the parts of the graph."""
    gates = model.gates
    assert set(gates.input) == set(ITEMS)
    weights = numpy_outputs(gates, {name: PAIRS[name] for name in ITEMS})
    users = numpy_outputs(model.user_tower, {name: PAIRS[name] for name in USERS})
    items = numpy_outputs(model.item_tower, {name: PAIRS[name] for name in ITEMS})
    for task, logit in numpy_outputs(model, PAIRS).items():
        count = weights[task].shape[1]
        assert_close(weights[task].sum(axis=1), np.ones(len(logit)))
        experts = users[task].reshape(-1, count, CONFIG.embedding_dim)
        # Gate weights sum to 1, so that the gated tags sum to the tag.
        tag = items[task].reshape(-1, count, CONFIG.embedding_dim).sum(axis=1)
        assert_close(np.einsum("bk,bkd,bd->b", weights[task], experts, tag)[:, None], logit)


def test_gates_of_built_and_loaded_models_agree(built, loaded):
    expected = numpy_outputs(built.gates, ITEMS)
    assert {task: gate.shape for task, gate in expected.items()} == {"ctr": (NUM_ITEMS, 3), "cvr": (NUM_ITEMS, 4)}
    for task, gate in numpy_outputs(loaded.gates, ITEMS).items():
        assert_close(gate, expected[task], 1e-6)


def test_field_attention(built, loaded):
    part = built.field_attention
    assert set(part.input) == set(USERS)
    scores = ops.convert_to_numpy(part(USERS))
    assert scores.shape == (NUM_USERS, 3, CONFIG.num_virtual_kernels)
    assert_close(scores.sum(axis=1), np.ones((NUM_USERS, CONFIG.num_virtual_kernels)))
    assert scores.std() > 0.01
    # Those that the model itself computes with.
    layer = built.get_layer("virtual_kernel_attention")
    fields = keras.Model(built.input, built.get_layer("user_fields").output)(PAIRS)
    table = built.get_layer("virtual_kernels").kernels.value
    expected = layer(fields, table, return_attention_scores=True)[1]
    assert_close(part({name: PAIRS[name] for name in USERS}), expected, 1e-6)
    assert_close(loaded.field_attention(USERS), scores, 1e-6)


def test_permuting_kernels_with_their_experts_changes_nothing(built):
    order = [3, 0, 4, 1, 2]
    tasks = [Task(task, kernels=tuple(order.index(kernel) for kernel in chosen)) for task, chosen in KERNELS.items()]
    permuted = build_mvke(SCHEMA.with_tasks(tasks), CONFIG)
    for target, source in zip(permuted.trainable_variables, built.trainable_variables, strict=True):
        assert target.path == source.path
        mixed = source.path.startswith(("virtual_kernels/", "virtual_kernel_experts/"))
        target.assign(ops.convert_to_numpy(source)[order] if mixed else source)
    expected = numpy_outputs(built, PAIRS)
    for task, logit in numpy_outputs(permuted, PAIRS).items():
        assert_close(logit, expected[task])


def test_three_tasks():
    tasks = [*(Task(task, kernels=chosen) for task, chosen in KERNELS.items()), Task("rating", "regression")]
    model = randomize(build_mvke(SCHEMA.with_tasks(tasks), CONFIG))
    logits = numpy_outputs(model, PAIRS)
    assert list(logits) == ["ctr", "cvr", "rating"]
    # A task without kernels of its own gets the default ones of its position.
    assert [model.get_layer(f"gate_{task}").kernels for task in logits] == [*KERNELS.values(), (1, 2, 3, 4)]
    assert model.get_layer("user_vector_rating").indices == (1, 2, 3, 4)
    users = numpy_outputs(model.user_tower, {name: PAIRS[name] for name in USERS})
    items = numpy_outputs(model.item_tower, {name: PAIRS[name] for name in ITEMS})
    assert_close((users["rating"] * items["rating"]).sum(axis=1, keepdims=True), logits["rating"])


def test_shared_experts_are_one_network():
    model = build_mvke(SCHEMA, dataclasses.replace(CONFIG, shared_experts=True))
    shapes = [tuple(weight.shape) for weight in model.get_layer("virtual_kernel_experts").weights]
    assert shapes == [(1, 24, 6), (1, 1, 6), (1, 6, 5), (1, 1, 5), (1, 5, 8), (1, 1, 8)]
    logits = numpy_outputs(randomize(model), PAIRS)
    plain = randomize(build_mvke(SCHEMA, CONFIG))
    for weight in plain.weights:
        source = next(other for other in model.weights if other.path == weight.path)
        weight.assign(np.broadcast_to(ops.convert_to_numpy(source), weight.shape))
    for task, logit in numpy_outputs(plain, PAIRS).items():
        assert_close(logit, logits[task])


@pytest.mark.parametrize("side", ["user", "item"])
def test_dropout_only_while_training(side):
    config = dataclasses.replace(CONFIG, embedding_dropout_rate=0.5, dropout_rate=0.5)
    model = getattr(build_mvke(SCHEMA, config), f"{side}_tower")
    inputs = USERS if side == "user" else ITEMS
    first, second = numpy_outputs(model, inputs), numpy_outputs(model, inputs)
    np.testing.assert_array_equal(first["ctr"], second["ctr"])
    trained = ops.convert_to_numpy(model(inputs, training=True)["ctr"])
    assert np.abs(trained - first["ctr"]).max() > 0.01


@pytest.mark.slow
def test_a_step_of_training_changes_every_weight():
    model = build_mvke(SCHEMA, CONFIG)
    before = [ops.convert_to_numpy(weight).copy() for weight in model.trainable_variables]
    losses = {task: keras.losses.BinaryCrossentropy(from_logits=True) for task in KERNELS}
    # XLA compiles for longer than it trains here; under JAX it cannot be left out.
    jit_compile = keras.backend.backend() == "jax"
    model.compile(keras.optimizers.Adam(0.01), losses, jit_compile=jit_compile)
    history = model.fit(PAIRS, labels(), epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for weight, start in zip(model.trainable_variables, before, strict=True):
        value = ops.convert_to_numpy(weight)
        assert np.isfinite(value).all() and np.abs(value - start).max() > 0.0, weight.path


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = randomize(build_mvke(SCHEMA, CONFIG))
    finally:
        keras.config.set_dtype_policy("float32")
    assert {weight.dtype for weight in mixed.trainable_variables} == {"float32"}
    assert {symbol.dtype for symbol in mixed.user_tower.output.values()} == {"bfloat16"}
    assert {symbol.dtype for symbol in mixed.output.values()} == {"float32"}
    expected = numpy_outputs(randomize(build_mvke(SCHEMA, CONFIG)), PAIRS)
    for task, logit in numpy_outputs(mixed, PAIRS).items():
        assert_close(logit, expected[task], 0.1)


def test_rejects_a_kernel_that_does_not_exist():
    schema = SCHEMA.with_tasks([Task("ctr", kernels=(0, 5)), Task("cvr")])
    with pytest.raises(ValueError, match=r"Expected indices below 5. Received: \(0, 5\)"):
        build_mvke(schema, CONFIG)


def test_first_weights_have_the_scale_of_the_settings():
    config = dataclasses.replace(CONFIG, embedding_dim=64, virtual_kernel_stddev=2.0, attention_stddev=0.3)
    keras.utils.set_random_seed(0)
    model = build_mvke(SCHEMA, config)
    assert np.std(model.get_layer("virtual_kernels").get_weights()[0]) == pytest.approx(2.0, rel=0.2)
    attention = model.get_layer("virtual_kernel_attention")
    for name in ("query", "key", "value"):
        assert np.std(attention.dense[name].get_weights()[0]) == pytest.approx(0.3, rel=0.1)
