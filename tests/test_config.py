# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvke_tf.config import (
    FORMAT,
    OLD_NAMES,
    SECTIONS,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    from_dict,
    index_range,
    renamed,
)
from mvke_tf.errors import ConfigError

CONFIG = RunConfig(
    ModelConfig("mvke", ("install",), 8, (6, 5), 3, shared_experts=True, dropout_rate=0.1, objective="conditional"),
    TrainingConfig(epochs=3, batch_size=32, learning_rate=0.01, patience=0, deduplicate=False, seed=2),
)


def test_round_trip_through_json():
    values = json.loads(json.dumps(CONFIG.to_dict()))
    assert values["format"] == FORMAT == 2
    assert RunConfig.from_dict(values) == CONFIG
    assert RunConfig() != CONFIG


def test_what_is_absent_keeps_its_default():
    config = RunConfig.from_dict({"model": {"hidden_dims": [4]}})
    assert config == RunConfig(model=ModelConfig(hidden_dims=(4,)))
    assert config.training.deduplicate is True
    assert config.model.tasks == () and config.model.objective == ""


def test_lists_become_tuples():
    assert ModelConfig(hidden_dims=[4, 2]).hidden_dims == (4, 2)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.seed = 3


@pytest.mark.parametrize(
    ("section", "name", "value", "expected"),
    [
        (ModelConfig, "embedding_dim", 0, "at least 1. Received: 0"),
        (ModelConfig, "embedding_dim", 10**9, "at most 65536. Received: 1000000000"),
        (ModelConfig, "hidden_dims", (4, 0), r"positive widths. Received: \(4, 0\)"),
        (ModelConfig, "hidden_dims", (10**9,), r"widths up to 65536. Received: \(1000000000,\)"),
        (ModelConfig, "hidden_dims", (4,) * 65, "at most 64 widths"),
        (ModelConfig, "num_virtual_kernels", 0, "at least 1. Received: 0"),
        (ModelConfig, "num_virtual_kernels", 5000, "at most 4096. Received: 5000"),
        (ModelConfig, "num_experts", 5000, "at most 4096. Received: 5000"),
        (ModelConfig, "num_levels", 10**6, "at most 64. Received: 1000000"),
        (ModelConfig, "gate_top_k", -1, r"0 \(all experts\) or more. Received: -1"),
        (ModelConfig, "load_balancing_weight", -0.1, "0 or more. Received: -0.1"),
        (ModelConfig, "load_balancing_weight", float("inf"), "finite. Received: inf"),
        (ModelConfig, "dropout_rate", 1.0, r"in \[0, 1\). Received: 1.0"),
        (ModelConfig, "dropout_rate", float("nan"), "finite. Received: nan"),
        (ModelConfig, "embedding_dropout_rate", 1.0, r"in \[0, 1\). Received: 1.0"),
        (ModelConfig, "virtual_kernel_stddev", 0.0, "positive. Received: 0.0"),
        (ModelConfig, "virtual_kernel_stddev", float("inf"), "finite. Received: inf"),
        (ModelConfig, "virtual_kernel_stddev", 1e38, r"at most 1000. Received: 1e\+38"),
        (ModelConfig, "embedding_stddev", -1.0, "positive. Received: -1.0"),
        (ModelConfig, "embedding_stddev", float("inf"), "finite. Received: inf"),
        (ModelConfig, "attention_stddev", 0.0, "positive. Received: 0.0"),
        (ModelConfig, "tasks", ("click", "click"), r"different tasks. Received: \('click', 'click'\)"),
        (ModelConfig, "tasks", ("",), r"names. Received: \('',\)"),
        (ModelConfig, "objective", "all", r"one of \('joint', 'conditional', 'marginal'\). Received: 'all'"),
        (TrainingConfig, "epochs", 0, "at least 1. Received: 0"),
        (TrainingConfig, "batch_size", 0, "at least 1. Received: 0"),
        (TrainingConfig, "batch_size", 10**11, "at most 16777216. Received: 100000000000"),
        (TrainingConfig, "learning_rate", 0.0, "positive. Received: 0.0"),
        (TrainingConfig, "learning_rate", float("inf"), "finite. Received: inf"),
        (TrainingConfig, "weight_decay", float("inf"), "finite. Received: inf"),
        (TrainingConfig, "global_clipnorm", float("inf"), "finite. Received: inf"),
        (TrainingConfig, "global_clipnorm", 10**400, "finite. Received: 1000"),
        (
            TrainingConfig,
            "task_weights",
            (0.0, 0.0),
            r"finite numbers, 0 or more each, not all 0. Received: \(0.0, 0.0\)",
        ),
        (TrainingConfig, "task_weights", (-1.0,), r"finite numbers, 0 or more each, not all 0. Received: \(-1.0,\)"),
        (TrainingConfig, "task_weights", (1.0, float("inf")), r"finite numbers.* Received: \(1.0, inf\)"),
        (TrainingConfig, "optimizer", "sgd", r"one of \('adam', 'adamw'\). Received: 'sgd'"),
        (TrainingConfig, "gradient_accumulation_steps", 0, "at least 1. Received: 0"),
        (TrainingConfig, "embedding_optimizer", "sgd", r"one of \('same', 'lazy_adam', 'rowwise_adagrad'\)"),
        (TrainingConfig, "embedding_learning_rate", -0.1, r"0 \(learning_rate\) or more. Received: -0.1"),
        (TrainingConfig, "xla", True, "off where `deterministic` is on.*--no-deterministic. Received: True"),
        (TrainingConfig, "patience", -1, "0 or more. Received: -1"),
        (TrainingConfig, "seed", 2**31, r"in \[0, 2\*\*31\). Received: 2147483648"),
    ],
)
def test_rejects_values(section, name, value, expected):
    with pytest.raises(ConfigError, match=f"{section.__name__}.{name} must be .*{expected}"):
        section(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "no setting 'modle'. Did you mean 'model'\\? Known settings: "),
        ({"model": {"hiden_dims": [4]}}, "no setting 'hiden_dims'. Did you mean 'hidden_dims'\\? Known settings: "),
        ({"model": {"xyz": 1}}, "no setting 'xyz'. Known settings: "),
        ({"data": {"split": "temporal"}}, "no section 'data' any more: a TOML file, which --data names"),
        ({"format": 3}, "Expected settings of format 2. Received: format 3"),
        ([], r"RunConfig is read from an object of settings. Received: \[\]"),
        ({"model": 3}, "ModelConfig is read from an object of settings. Received: 3"),
    ],
)
def test_rejects_unknown_settings(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_from_dict_builds_any_settings():
    assert from_dict(TrainingConfig, {"epochs": 2}) == TrainingConfig(epochs=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"task_weights": ["a", 1]}}, r"task_weights must be a list of numbers. Received: \('a', 1\)"),
        ({"model": {"hidden_dims": ["a"]}}, r"hidden_dims must be a list of ints. Received: \('a',\)"),
        ({"model": {"tasks": [1]}}, r"tasks must be a list of strs. Received: \(1,\)"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate must be finite. Received: nan"),
        ({"training": {"learning_rate": 10**400}}, "learning_rate must be finite. Received: 1000"),
        ({"training": {"epochs": True}}, "epochs must be of the type of 50. Received: True"),
    ],
)
def test_rejects_values_of_other_types_in_files(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_settings_are_read_by_their_former_names():
    config = RunConfig.from_dict(
        {
            "model": {"kernel_stddev": 0.5, "balance_coefficient": 0.25, "conversion": "clicked"},
            "training": {"distinct": False, "clipnorm": 2.0, "accumulation_steps": 3},
        }
    )
    assert config == RunConfig(
        ModelConfig(virtual_kernel_stddev=0.5, load_balancing_weight=0.25, objective="conditional"),
        TrainingConfig(deduplicate=False, global_clipnorm=2.0, gradient_accumulation_steps=3),
    )
    fields = {field.name for cls in (ModelConfig, TrainingConfig) for field in dataclasses.fields(cls)}
    assert set(OLD_NAMES.values()) <= fields and not set(OLD_NAMES) & fields
    with pytest.raises(ConfigError, match=r"TrainingConfig.deduplicate is set twice.* Received: 'distinct'"):
        from_dict(TrainingConfig, {"deduplicate": True, "distinct": False})


@pytest.mark.parametrize(("old", "new"), [("impressions", "marginal"), ("clicked", "conditional"), ("esmm", "joint")])
def test_former_values_of_the_objective(old, new):
    assert renamed("conversion", old) == ("objective", new)
    assert from_dict(ModelConfig, {"conversion": old}).objective == new


def test_index_ranges():
    assert index_range("0-5") == (0, 1, 2, 3, 4, 5)
    assert index_range("7,0-2,4-4") == (7, 0, 1, 2, 4)
    for text, message in (
        ("0:5", "written as 0-5 or 0,2,4-6"),
        ("", "written as"),
        ("0-٣", "written as"),
        ("5-0", "goes up"),
        ("0-8", "below 8"),
        ("0-3,2", "each index once"),
    ):
        with pytest.raises(ConfigError, match=f"{message}.* Received: '{text}'"):
            index_range(text, 8)


@pytest.mark.parametrize("text", ["0-99999999999", "99999999999999999999999999", ",".join(["0-4095"] * 10_000)])
def test_an_endless_range_is_refused_before_it_is_counted_out(text):
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"task_kernels: Expected .* Received: '.{1,60}'$"):
        ModelConfig(num_virtual_kernels=4096, task_kernels=(text,))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_settings_with_an_entry_per_task_fit_the_tasks():
    config = RunConfig(
        ModelConfig(task_kernels=("0-2", "1-4"), task_experts=("0", "1")), TrainingConfig(task_weights=(1.0, 2.0))
    )
    config.check_tasks(("click", "install"))
    for model, training, message in (
        ({"task_kernels": ("0-2",)}, {}, "task_kernels must be left out, or one range for each of the tasks"),
        ({"task_experts": ("0-2",)}, {}, "task_experts must be left out, or one range for each of the tasks"),
        ({}, {"task_weights": (1.0,)}, "task_weights must be left out, or a weight for each of the tasks"),
    ):
        known_later = RunConfig(ModelConfig(**model), TrainingConfig(**training))
        with pytest.raises(ConfigError, match=rf"{message} \('click', 'install'\). Received: "):
            known_later.check_tasks(("click", "install"))
        with pytest.raises(ConfigError, match=rf"{message} \('click', 'install'\). Received: "):
            RunConfig(ModelConfig(tasks=("click", "install"), **model), TrainingConfig(**training))
    with pytest.raises(ConfigError, match=r"ModelConfig.task_kernels: Expected indices below 5. Received: '1-5'"):
        ModelConfig(task_kernels=("0-2", "1-5"))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["0-2", "1e9", "mvke"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = [(section, field.name) for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]
NAMES += [(section, name) for section in SECTIONS for name in (*OLD_NAMES, "no_such_setting")]


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), ANYTHING), min_size=1, max_size=3), ANYTHING, st.booleans())
def test_any_settings_are_legal_or_an_error_of_one_line(changes, whole, replaced):
    values = json.loads(json.dumps(CONFIG.to_dict()))
    for (section, name), value in changes:
        values[section][name] = value
    for given_values in (values, whole) if replaced else (values,):
        try:
            config = RunConfig.from_dict(given_values)
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 1_000
        else:
            # What is legal can be kept, and is the same when it is read again.
            text = json.dumps(config.to_dict(), allow_nan=False)
            assert RunConfig.from_dict(json.loads(text)) == config
