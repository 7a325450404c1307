# SPDX-License-Identifier: Apache-2.0
"""What the models besides MVKE have of their own; tests/test_golden.py holds them to the recorded numbers."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.config import MODEL_NAMES, ModelConfig
from mvke_tf.layers import Experts
from mvke_tf.models import MODELS, READERS, build_model, unread_settings
from mvke_tf.models.ple import cgc_experts
from mvke_tf.schema import Task
from tests.layer_checks import assert_close
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

BASELINES = sorted(set(MODELS) - {"mvke"})
MIXTURES = ("cgc", "mmoe", "ple", "stem")


def build(name, schema=SCHEMA, **settings):
    tasks = [Task("cvr")] if name == "single_task" and schema is SCHEMA else schema.tasks
    config = dataclasses.replace(CONFIG, name=name, **{"num_experts": 5} | settings)
    return randomize(build_model(name, schema.with_tasks(tasks), config))


@pytest.mark.parametrize("name", BASELINES)
def test_logits_are_inner_products_of_the_towers_before_and_after_saving(name, tmp_path):
    model = build(name)
    logits = numpy_outputs(model, PAIRS)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for task, loaded_logits in numpy_outputs(loaded, PAIRS).items():
        assert_close(loaded_logits, logits[task], 1e-6)
    pairs = {name: PAIRS[name] for name in USERS}, {name: PAIRS[name] for name in ITEMS}
    vectors = [
        numpy_outputs(getattr(loaded, f"{side}_tower"), part)
        for side, part in zip(("user", "item"), pairs, strict=True)
    ]
    for task, logit in logits.items():
        # ResFlow's second task has the vectors of the first beside its own.
        width = CONFIG.embedding_dim * (2 if (name, task) == ("resflow", "cvr") else 1)
        assert vectors[0][task].shape == (len(logit), width)
        assert_close(np.sum(vectors[0][task] * vectors[1][task], axis=1, keepdims=True), logit)


@pytest.mark.parametrize("name", MIXTURES)
def test_gates_sum_to_one_over_the_experts_seen(name):
    gates = build(name).gates
    assert set(gates.input) == set(USERS)
    seen = {"mmoe": 5, "cgc": 4, "ple": 4, "stem": 5}[name]
    for weights in numpy_outputs(gates, USERS).values():
        assert weights.shape == (4, seen)
        assert_close(weights.sum(axis=1), np.ones(4))
        assert weights.std() > 0.01


@pytest.mark.parametrize("name", ["hard_sharing", "shared_bottom", "single_task", "aitm", "resflow"])
def test_models_without_gates(name):
    model = build(name)
    assert model.gates is None and model.gate_side is None and model.expert_outputs is None
    assert [model.experts_of(task) for task in model.task_names] == [()] * len(model.task_names)


def gradients_of(model, task):
    _, gradients = task_losses_and_gradients(model, PAIRS, (task,), model.trainable_variables)
    return {
        variable.path: np.zeros(variable.shape) if gradient is None else gradient
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
    }


@pytest.mark.parametrize(
    ("name", "tasks", "unseen"),
    [
        ("mmoe", (Task("ctr", experts=(0, 1, 2)), Task("cvr", experts=(2, 4))), {"ctr": [3, 4], "cvr": [0, 1, 3]}),
        ("cgc", (Task("ctr"), Task("cvr")), {"ctr": [1], "cvr": [0]}),
    ],
)
def test_a_task_sends_no_gradient_to_experts_that_it_does_not_see(name, tasks, unseen):
    model = build(name, SCHEMA.with_tasks(tasks))
    for task, experts in unseen.items():
        gradient = gradients_of(model, task)["experts/kernel_0"]
        assert [e for e in range(5) if not np.any(gradient[e])] == experts


def test_what_the_tasks_share():
    """The weights of the user side that both tasks train."""
    shared = {}
    for name in ("hard_sharing", "shared_bottom"):
        model = build(name)
        ctr, cvr = gradients_of(model, "ctr"), gradients_of(model, "cvr")
        shared[name] = {path for path in ctr if np.any(ctr[path] * cvr[path]) and not path.startswith("embedding")}
    assert shared["hard_sharing"] == set()
    assert shared["shared_bottom"] == {
        f"shared_bottom_{layer}/{weight}" for layer in (0, 1) for weight in ("kernel", "bias")
    }


def test_shared_bottom_is_relu_layers_and_linear_heads():
    model = build("shared_bottom")
    fields = numpy_outputs(keras.Model(model.input, model.get_layer("user_fields").output), PAIRS)
    x = fields.reshape(len(fields), -1)
    for layer in (0, 1):
        kernel, bias = model.get_layer(f"shared_bottom_{layer}").get_weights()
        x = np.maximum(x @ kernel + bias, 0.0)
    kernels, biases = model.get_layer("user_heads").get_weights()
    users = numpy_outputs(model.user_tower, {name: PAIRS[name] for name in USERS})
    for index, task in enumerate(("ctr", "cvr")):
        assert_close(users[task], x @ kernels[index] + biases[index])


def test_ple_of_one_level_is_cgc():
    """The same graph: expert for expert and gate for gate, with the weights copied over."""
    ple, cgc = build("ple", num_levels=1), build("cgc")
    groups = [ple.get_layer(f"experts_1_{group}") for group in ("task_ctr", "task_cvr", "shared")]
    for layer in cgc.layers:
        if isinstance(layer, Experts) and layer.name == "experts":
            layer.set_weights(
                [np.concatenate(parts) for parts in zip(*(group.get_weights() for group in groups), strict=True)]
            )
        elif layer.weights:
            layer.set_weights(ple.get_layer(layer.name).get_weights())
    for task, logit in numpy_outputs(ple, PAIRS).items():
        assert_close(numpy_outputs(cgc, PAIRS)[task], logit)


def test_ple_passes_on_the_mixtures_of_the_level_below():
    model = build("ple", num_levels=2)
    names = ("experts_1", "gate_1_shared", "mixture_1_shared", "experts_2_shared")
    parts = keras.Model(model.input, {name: model.get_layer(name).output for name in names})
    outputs = numpy_outputs(parts, PAIRS)
    mixed = np.einsum("be,beo->bo", outputs["gate_1_shared"], outputs["experts_1"])
    assert_close(outputs["mixture_1_shared"], mixed)
    again = ops.convert_to_numpy(model.get_layer("experts_2_shared")(mixed.astype("float32")))
    assert_close(again, outputs["experts_2_shared"])


def test_a_single_expert_has_no_gate():
    model = build("mmoe", num_experts=1)
    assert not [layer.name for layer in model.layers if layer.name.startswith("gate")]


@pytest.mark.parametrize(
    ("num_tasks", "num_experts", "expected"),
    [
        (2, 10, ((0, 1, 2, 6, 7, 8, 9), (3, 4, 5, 6, 7, 8, 9))),
        (2, 3, ((0, 2), (1, 2))),
        (3, 5, ((0, 3, 4), (1, 3, 4), (2, 3, 4))),
        (1, 4, ((0, 1, 2, 3),)),
    ],
)
def test_cgc_experts(num_tasks, num_experts, expected):
    assert cgc_experts(num_tasks, num_experts) == expected


@pytest.mark.parametrize("name", ["mmoe", "cgc", "ple", "stem", "aitm", "resflow", "shared_bottom", "hard_sharing"])
def test_three_tasks(name):
    model = build(name, SCHEMA.with_tasks([Task("a"), Task("b"), Task("c")]))
    assert list(numpy_outputs(model, PAIRS)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cgc", {"num_experts": 2}, "at least one expert per task and one shared, 3 in all"),
        ("shared_bottom", {"hidden_dims": ()}, "needs at least one"),
        ("mvk", {}, r"Expected one of \['aitm', .*'stem'\]. Received: 'mvk'"),
    ],
)
def test_errors(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, **settings)


def test_single_task_refuses_several():
    with pytest.raises(ValueError, match=r"one task at a time; name it with --tasks. Received: 2 tasks"):
        build_model("single_task", SCHEMA, CONFIG)


def test_an_expert_that_does_not_exist():
    with pytest.raises(ValueError, match=r"Expected indices below 5. Received: \(0, 5\)"):
        build("mmoe", SCHEMA.with_tasks([Task("ctr", experts=(0, 5))]))


@pytest.mark.parametrize(
    ("name", "setting", "gates"),
    [
        ("mmoe", {"task_experts": ("0-2", "2,4")}, {"ctr": (0, 1, 2), "cvr": (2, 4)}),
        ("cgc", {"task_experts": ("0-2", "2,4")}, {"ctr": (0, 1, 2), "cvr": (2, 4)}),
        ("mvke", {"task_kernels": ("0", "0-1")}, {"ctr": (0,), "cvr": (0, 1)}),
    ],
)
def test_settings_state_the_ranges_of_the_tasks(name, setting, gates):
    model = build_model(name, SCHEMA, dataclasses.replace(CONFIG, **setting))
    assert {task: model.experts_of(task) for task in gates} == gates
    # The tasks of another schema keep what they state themselves.
    stated = build_model(name, SCHEMA.with_tasks([Task("other", experts=(1,), kernels=(1,))]), CONFIG)
    assert stated.experts_of("other") == (1,)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_its_name_whatever_the_settings_say(name):
    schema = SCHEMA.with_tasks([Task("ctr")])
    assert build_model(name, schema, dataclasses.replace(CONFIG, name="mvke")).name == name


def test_the_names_of_command_lines_are_the_models():
    assert set(MODEL_NAMES) == set(MODELS)


def test_settings_that_a_model_does_not_read():
    config = ModelConfig(gate_top_k=2, num_experts=4, num_virtual_kernels=3, dropout_rate=0.1)
    unread = {
        name: unread_settings(dataclasses.replace(config, name=name)) for name in ("mvke", "mmoe", "shared_bottom")
    }
    assert unread == {
        "mvke": ["num_experts"],
        "mmoe": ["num_virtual_kernels"],
        "shared_bottom": ["num_virtual_kernels", "num_experts", "gate_top_k"],
    }


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["mvke", "mmoe", "single_task"])
def test_the_readers_of_a_setting_are_those_whose_graph_it_changes(name):
    """Compared by the configuration of all layers, which holds the shapes and first scales of all weights."""
    tasks = [Task("ctr")] if name == "single_task" else [Task("ctr"), Task("cvr")]
    changes = {
        **{"num_virtual_kernels": 4, "num_experts": 7, "num_levels": 3, "shared_experts": True, "gate_top_k": 1},
        **{"load_balancing_weight": 0.5, "virtual_kernel_stddev": 0.7, "attention_stddev": 0.7},
        **{"task_kernels": ("0-1",) * len(tasks), "task_experts": ("0-1",) * len(tasks)},
    }

    config = dataclasses.replace(CONFIG, name=name, tasks=tuple(task.name for task in tasks))

    def graph(**settings):
        keras.backend.clear_session()
        model = build_model(name, SCHEMA.with_tasks(tasks), dataclasses.replace(config, **settings))
        return json.dumps(model.get_config(), sort_keys=True, default=str)

    plain = graph()
    assert changes.keys() == READERS.keys()
    changing = {setting for setting, value in changes.items() if graph(**{setting: value}) != plain}
    assert changing == {setting for setting, readers in READERS.items() if name in readers}
