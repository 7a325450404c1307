import dataclasses
import json

import pytest

from mvke_tf.config import DataConfig, ModelConfig, RunConfig, TrainingConfig, from_dict, index_range

CONFIG = RunConfig(
    DataConfig("ratings", "per_user", neg_ratio=2, history_length=10, seed=1),
    ModelConfig("mvke", ("cvr",), 8, (6, 5), 3, shared_experts=True, dropout_rate=0.1),
    TrainingConfig(epochs=3, batch_size=32, learning_rate=0.01, patience=0, distinct=True, seed=2),
)


def test_round_trip_through_json():
    assert RunConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    assert RunConfig() != CONFIG


def test_what_is_absent_keeps_its_default():
    config = RunConfig.from_dict({"model": {"hidden_dims": [4]}})
    assert config == RunConfig(model=ModelConfig(hidden_dims=(4,)))


def test_lists_become_tuples():
    assert ModelConfig(hidden_dims=[4, 2]).hidden_dims == (4, 2)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.seed = 3


@pytest.mark.parametrize(
    ("section", "name", "value", "expected"),
    [
        (DataConfig, "protocol", "clicks", r"one of \('impressions', 'ratings'\). Received: 'clicks'"),
        (DataConfig, "split", "weekly", r"one of \('temporal', 'random', 'per_user'\). Received: 'weekly'"),
        (DataConfig, "neg_ratio", -1, "0 or more. Received: -1"),
        (DataConfig, "history_length", 0, "at least 1. Received: 0"),
        (DataConfig, "seed", -1, "0 or more. Received: -1"),
        (ModelConfig, "embedding_dim", 0, "at least 1. Received: 0"),
        (ModelConfig, "hidden_dims", (4, 0), r"positive widths. Received: \(4, 0\)"),
        (ModelConfig, "num_virtual_kernels", 0, "at least 1. Received: 0"),
        (ModelConfig, "gate_top_k", -1, r"0 \(all experts\) or more. Received: -1"),
        (ModelConfig, "balance_coefficient", -0.1, "0 or more. Received: -0.1"),
        (ModelConfig, "dropout_rate", 1.0, r"in \[0, 1\). Received: 1.0"),
        (ModelConfig, "dropout_rate", -0.1, r"in \[0, 1\). Received: -0.1"),
        (ModelConfig, "embedding_dropout_rate", 1.0, r"in \[0, 1\). Received: 1.0"),
        (ModelConfig, "kernel_stddev", 0.0, "positive. Received: 0.0"),
        (ModelConfig, "embedding_stddev", -1.0, "positive. Received: -1.0"),
        (ModelConfig, "attention_stddev", 0.0, "positive. Received: 0.0"),
        (TrainingConfig, "epochs", 0, "at least 1. Received: 0"),
        (TrainingConfig, "batch_size", 0, "at least 1. Received: 0"),
        (TrainingConfig, "learning_rate", 0.0, "positive and finite. Received: 0.0"),
        (TrainingConfig, "learning_rate", float("inf"), "positive and finite. Received: inf"),
        (
            TrainingConfig,
            "task_weights",
            (0.0, 0.0),
            r"finite numbers, 0 or more each, not all 0. Received: \(0.0, 0.0\)",
        ),
        (TrainingConfig, "task_weights", (-1.0,), r"finite numbers, 0 or more each, not all 0. Received: \(-1.0,\)"),
        (TrainingConfig, "optimizer", "sgd", r"one of \('adam', 'adamw'\). Received: 'sgd'"),
        (TrainingConfig, "accumulation_steps", 0, "at least 1. Received: 0"),
        (TrainingConfig, "xla", True, "off where `deterministic` is on.*--no-deterministic. Received: True"),
        (ModelConfig, "tasks", ("rating", "ctr"), r"different tasks in the order of .*Received: \('rating', 'ctr'\)"),
        (ModelConfig, "tasks", ("ctr", "ctr"), r"different tasks in the order of .*Received: \('ctr', 'ctr'\)"),
        (ModelConfig, "conversion", "all", r"one of \('impressions', 'clicked', 'esmm'\). Received: 'all'"),
        (
            ModelConfig,
            "task_kernels",
            ("0-2",),
            r"left out, or one range for each of \('ctr', 'cvr'\). Received: \('0-2',\)",
        ),
        (
            ModelConfig,
            "task_kernels",
            ("0-2", "1-5"),
            r"ranges of different indices below 5. Received: \('0-2', '1-5'\)",
        ),
        (ModelConfig, "task_experts", ("0,0", "1"), r"ranges of different indices below 10. Received: \('0,0', '1'\)"),
        (TrainingConfig, "patience", -1, "0 or more. Received: -1"),
        (TrainingConfig, "seed", 2**31, r"in \[0, 2\*\*31\). Received: 2147483648"),
    ],
)
def test_rejects_values(section, name, value, expected):
    with pytest.raises(ValueError, match=f"{section.__name__}.{name} must be {expected}"):
        section(**{name: value})


@pytest.mark.parametrize("values", [{"modle": {}}, {"model": {"hiden_dims": [4]}}])
def test_rejects_unknown_settings(values):
    with pytest.raises(ValueError, match=r"has no setting \['(modle|hiden_dims)'\]. Known settings: "):
        RunConfig.from_dict(values)


def test_from_dict_builds_any_settings():
    assert from_dict(TrainingConfig, {"epochs": 2}) == TrainingConfig(epochs=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"task_weights": ["a", 1]}}, r"task_weights must be a list of numbers. Received: \('a', 1\)"),
        ({"model": {"hidden_dims": ["a"]}}, r"hidden_dims must be a list of ints. Received: \('a',\)"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate must be finite. Received: nan"),
    ],
)
def test_rejects_values_of_other_types_in_files(values, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


def test_index_ranges():
    assert index_range("0-5") == (0, 1, 2, 3, 4, 5)
    assert index_range("7,0-2,4-4") == (7, 0, 1, 2, 4)
    for text, message in (("0:5", "written as 0-5 or 0,2,4-6"), ("", "written as"), ("5-0", "goes up")):
        with pytest.raises(ValueError, match=f"{message}.* Received: '{text}'"):
            index_range(text)


@pytest.mark.parametrize(("conversion", "tasks"), [("esmm", ("ctr",)), ("clicked", ("ctr", "rating"))])
def test_a_conversion_needs_its_tasks(conversion, tasks):
    with pytest.raises(ValueError, match=r"ModelConfig.conversion must be 'impressions' unless the tasks have \["):
        ModelConfig(tasks=tasks, conversion=conversion)
