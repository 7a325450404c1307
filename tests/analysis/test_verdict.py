# SPDX-License-Identifier: Apache-2.0
"""The verdict on constructed cases."""

import dataclasses
import inspect
import re

import numpy as np
import pandas as pd
import pytest

from mvke_tf.analysis import Grouping, Study, Thresholds, field_attention, gate_effect, judge, verdicts
from mvke_tf.analysis import verdict as module
from mvke_tf.analysis.verdict import attention_note
from mvke_tf.config import SECTIONS
from mvke_tf.schema import Task
from tests.analysis.conftest import set_gate
from tests.models.problems import SCHEMA


def verdict(model, pairs, task="ctr", **settings):
    found = {verdict.task: verdict for verdict in verdicts(Study(model, pairs), **settings)}
    assert list(found) == ["ctr", "cvr"]
    return found[task]


def names(verdict):
    return [finding.name for finding in verdict.findings]


def set_tag(model, task, tag):
    """Makes the tag of every item the same."""
    towers, index = model.get_layer("tag_towers"), list(model.output).index(task)
    kernel, bias = (np.asarray(weights[-1]).copy() for weights in (towers.expert_kernels, towers.expert_biases))
    kernel[index], bias[index] = 0.0, tag
    towers.expert_kernels[-1].assign(kernel)
    towers.expert_biases[-1].assign(bias)


def test_a_collapsed_gate_of_mvke(make_model, pairs):
    model = make_model("mvke", SCHEMA.with_tasks((Task("ctr", kernels=(0, 1, 2)), Task("cvr", kernels=(0, 1)))))
    set_tag(model, "ctr", np.eye(8)[0])
    model.get_layer("virtual_kernels").kernels.assign(9.0 * np.eye(3, 8)[[1, 0, 2]])
    found = verdict(model, pairs)
    # exp(9) / (exp(9) + 2) = 0.9998
    assert names(found) == ["collapsed", "dead experts"] and found.state == "collapsed"
    assert "mean weights of experts 0, 1, 2 are 0.00, 1.00, 0.00" in found.findings[0].text
    assert "Expert 1 has nearly all the weight" in found.findings[0].text
    assert "Dead: experts 0, 2" in found.findings[1].text and "1 do the work" in found.findings[1].advice
    assert "--load_balancing_weight" in found.findings[0].advice and "learning rate" in found.findings[0].advice


def test_a_collapsed_gate_of_mmoe(make_model, pairs):
    model = make_model("mmoe")
    set_gate(model, "ctr", [0, 0, 0, 9])
    assert names(verdict(model, pairs))[0] == "collapsed"


@pytest.mark.parametrize(
    ("name", "remedy"), [("mvke", "--virtual_kernel_stddev"), ("mmoe", "--load_balancing_weight 0")]
)
def test_a_uniform_gate(make_model, pairs, name, remedy):
    model = make_model(name)
    if name == "mvke":
        model.get_layer("virtual_kernels").kernels.assign(np.zeros((3, 8)))
    else:
        set_gate(model, "ctr", np.zeros(4))
    found = verdict(model, pairs)
    assert names(found) == ["uniform"]
    assert "100.0% of the maximum" in found.findings[0].text and remedy in found.findings[0].advice


def test_a_specialised_gate(make_model, pairs):
    model = make_model("mmoe")
    set_gate(model, "ctr", np.zeros(4), scale=20.0)
    study = Study(model, pairs)
    # The four users do not all choose the same expert.
    assert len(set(study.gates["ctr"].weights.argmax(axis=1))) > 1
    found = verdict(model, pairs)
    assert found.state == "specialised" and "bits about the expert" in found.findings[0].text
    assert found.findings[0].advice == ""


def test_a_skewed_and_a_balanced_gate(make_model, pairs):
    model = make_model("mmoe")
    set_gate(model, "ctr", np.log([0.82, 0.06, 0.06, 0.06]))
    set_gate(model, "cvr", np.log([0.4, 0.3, 0.2, 0.1]))
    assert names(verdict(model, pairs)) == ["skewed"]
    assert names(verdict(model, pairs, "cvr")) == ["balanced"]
    assert "1.85 bits of entropy on average, 92.3% of the maximum" in verdict(model, pairs, "cvr").findings[0].text


def test_a_dead_expert(make_model, pairs):
    model = make_model("mmoe")
    set_gate(model, "ctr", [0.0, -9.0, 0.0, 1.0])
    found = verdict(model, pairs)
    assert names(found) == ["skewed", "dead experts"] or names(found) == ["balanced", "dead experts"]
    assert "Dead: expert 1, (almost) never the strongest" in found.findings[1].text
    assert "fewer experts (3 do the work)" in found.findings[1].advice


@pytest.mark.parametrize("name", ["mvke", "mmoe"])
def test_duplicated_experts(make_model, pairs, name):
    model = make_model(name)
    layer = model.get_layer("virtual_kernel_experts" if name == "mvke" else "experts")
    for weight in (*layer.expert_kernels, *layer.expert_biases):
        values = np.asarray(weight).copy()
        values[1] = values[0]
        weight.assign(values)
    if name == "mvke":
        # Experts of different kernels read the fields differently.
        kernels = np.asarray(model.get_layer("virtual_kernels").kernels).copy()
        model.get_layer("virtual_kernels").kernels.assign(kernels[[0, 0, 2]])
    found = verdict(model, pairs)
    assert names(found)[-1] == "identical experts"
    assert "put out the same: 0 and 1 (CKA 1.000)" in found.findings[-1].text
    assert names(verdict(make_model(name), pairs)).count("identical experts") == 0


# === Every word on numbers by hand ===


def entropy_row(**numbers):
    """As `gate_entropy` of one gate of four experts that is balanced."""
    row = {
        "task": "buy",
        "experts": 4,
        "impression_entropy_bits": 1.8,
        "mean_weight_entropy_bits": 1.84,
        "information_bits": 0.04,
        "impression_entropy_share": 0.9,
        "mean_weight_entropy_share": 0.92,
        "information_share": 0.02,
        "largest_mean_weight": 0.4,
        "weight_deviation": 0.05,
        "impressions": 1000,
    }
    return pd.DataFrame([row | numbers])


def used(dead=()):
    """As `utilisation` of the same."""
    weights = [0.4, 0.3, 0.2, 0.1]
    return pd.DataFrame(
        {
            "task": "buy",
            "expert": [2, 3, 5, 7],
            "mean_weight": weights,
            "equal_share": 0.25,
            "strongest": [1.0, 0.0, 0.0, 0.0],
            "dead": [expert in dead for expert in (2, 3, 5, 7)],
            "impressions": 1000,
        }
    )


def worth(metric, trained, mean, *without):
    """As `gate_effect` of the same."""
    values = [trained, mean, *without, *[trained] * (4 - len(without))]
    changes = ["as trained", "mean weights", *(f"without expert {expert}" for expert in (2, 3, 5, 7))]
    return pd.DataFrame(
        {
            "task": "buy",
            "change": changes,
            "expert": [-1, -1, 2, 3, 5, 7],
            "metric": metric,
            "value": values,
            "difference": np.array(values) - trained,
            "impressions": 1000,
        }
    )


@pytest.mark.parametrize(
    ("numbers", "effect", "state"),
    [
        ({}, None, "balanced"),
        ({"largest_mean_weight": 0.9}, None, "collapsed"),
        ({"largest_mean_weight": 0.899, "mean_weight_entropy_share": 0.4}, None, "skewed"),
        ({"information_share": 0.05}, None, "specialised"),
        ({"impression_entropy_share": 0.98}, None, "uniform"),
        # As soon as it is known what the choice is worth, the word follows that.
        ({"impression_entropy_share": 0.976}, None, "balanced"),
        ({"impression_entropy_share": 0.976}, worth("auc", 0.9106, 0.9102), "uniform"),
        ({"impression_entropy_share": 0.976}, worth("auc", 0.9106, 0.9111), "uniform"),
        ({"impression_entropy_share": 0.985}, worth("auc", 0.9106, 0.9086), "balanced"),
        ({"impression_entropy_share": 0.96, "information_share": 0.06}, worth("auc", 0.91, 0.9), "specialised"),
        # An RMSE by its share: 0.0004 of 2.0 and 0.001 of it.
        ({"impression_entropy_share": 0.976}, worth("rmse", 2.0, 2.0008), "uniform"),
        ({"impression_entropy_share": 0.976}, worth("rmse", 2.0, 2.002), "balanced"),
        # Of one class there is no AUC, and entropy decides.
        ({"impression_entropy_share": 0.976}, worth("auc", np.nan, np.nan), "balanced"),
        ({"impression_entropy_share": 0.985}, worth("auc", np.nan, np.nan), "uniform"),
    ],
)
def test_every_word(numbers, effect, state):
    (found,) = judge(entropy_row(**numbers), used(), effect=effect)
    assert names(found) == [state] and found.headline == f"buy: {state}"
    assert found.findings[0].text.startswith(
        "Over 1,000 impressions the mean weights of experts 2, 3, 5, 7 are 0.40, 0.30, 0.20, 0.10."
    )


@pytest.mark.slow
def test_the_word_never_contradicts_what_the_choice_is_worth():
    """Neither "uniform" where it is worth something, nor "balanced" without a word where it is worth nothing."""
    for entropy in np.linspace(0.5, 1.0, 51):
        for lost in (-0.01, 0.0, 0.0004, 0.0006, 0.01):
            (found,) = judge(
                entropy_row(impression_entropy_share=entropy), used(), effect=worth("auc", 0.9, 0.9 - lost)
            )
            worthless = lost < 0.0005
            assert found.state == ("uniform" if worthless and entropy >= 0.95 else "balanced")
            assert ("gain nothing" in found.findings[0].text) == (worthless and entropy < 0.95)


def test_what_the_choice_and_the_experts_are_worth():
    (found,) = judge(entropy_row(), used(), effect=worth("auc", 0.91, 0.905, 0.9, 0.88))
    assert found.evidence == (
        "AUC 0.9100; with the mean weights for every impression 0.9050 (-0.0050). "
        "The most valuable expert is 3: without it 0.8800 (-0.0300).",
    )
    (found,) = judge(entropy_row(), used(), effect=worth("rmse", 2.0, 2.1, 2.5, 1.9))
    assert found.evidence == (
        "RMSE 2.0000; with the mean weights for every impression 2.1000 (+0.1000). "
        "The most valuable expert is 2: without it 2.5000 (+0.5000).",
    )


def test_dead_and_identical_experts_by_hand():
    pairs = [(2, 3, 0.995, 0.992), (2, 5, 0.995, 0.98), (3, 5, 0.98, 0.999), (0, 2, 1.0, 1.0)]
    similarity = pd.DataFrame(pairs, columns=["expert_a", "expert_b", "cka", "correlation"])
    (found,) = judge(entropy_row(), used(dead=(7,)), similarity)
    assert names(found) == ["balanced", "dead experts", "identical experts"]
    assert found.findings[1].text == (
        "Dead: expert 7, (almost) never the strongest, with a mean weight of at most 0.1000 (an equal share is 0.250)."
    )
    # Expert 0 is none of this task's.
    assert found.findings[2].text == "These experts put out the same: 2 and 3 (CKA 0.995)."
    assert str(found).splitlines()[0] == "buy: balanced, dead experts, identical experts"
    assert [line for line in str(found).splitlines() if line.startswith("  Try: fewer experts")]


@pytest.mark.parametrize(
    ("thresholds", "state"),
    [
        ({}, "balanced"),
        ({"collapsed_weight": 0.4}, "collapsed"),
        ({"uniform_entropy": 0.9}, "uniform"),
        ({"balanced_entropy": 0.93}, "skewed"),
        ({"specialised_information": 0.02}, "specialised"),
    ],
)
def test_thresholds_are_parameters(thresholds, state):
    (found,) = judge(entropy_row(), used(), thresholds=Thresholds(**thresholds))
    assert found.state == state
    worthless = Thresholds(worthless_choice=0.02, worthless_entropy=0.9)
    assert judge(entropy_row(), used(), effect=worth("auc", 0.9, 0.89), thresholds=worthless)[0].state == "uniform"


def test_the_evidence(make_model, many):
    model = make_model("mvke")
    ages = Grouping.of_labels("age", "user", ["old", "young", "old", "young"])
    films = Grouping.of_labels("film", "item", ["a", "b", "b"])
    study = Study(model, many)
    found = verdicts(study, [ages, films])[1]
    weights = study.gates["cvr"].weights
    counts = study.impressions("item")
    by_film = {"a": weights[0], "b": np.average(weights[1:], axis=0, weights=counts[1:])}
    expert = np.argmax(np.abs(by_film["a"] - by_film["b"]))
    low, high = sorted(by_film, key=lambda name: by_film[name][expert])
    sentence = (
        f"By film, the weight of expert {study.gates['cvr'].experts[expert]} runs from "
        f"{by_film[low][expert]:.3f} ({low}) to {by_film[high][expert]:.3f} ({high})."
    )
    assert sentence in found.evidence
    # Untrained: none of the experts is of use.
    best = gate_effect(study).query("task == 'cvr' and expert >= 0")["difference"].min()
    ends = r"The most valuable expert is \d: .*" if best < -5e-5 else r"Without any one of the experts it is no worse\."
    assert re.fullmatch(r"AUC [01]\.\d{4}; with the mean weights .* " + ends, found.evidence[-1])
    text = str(found)
    assert text.startswith(f"{found.headline}\n  Over 700 impressions the mean weights of experts")
    assert all(sentence in text for sentence in found.evidence)


def test_small_groups_are_no_evidence():
    weights = pd.DataFrame(
        [
            ("buy", "all", "all", 2, 0.5, 20_000),
            ("buy", "age", "young", 2, 0.4, 10_000),
            ("buy", "age", "old", 2, 0.6, 9_801),
            # Fewer than 1 % of the impressions.
            ("buy", "age", "unknown", 2, 0.99, 199),
            ("buy", "place", "here", 2, 0.1, 19_901),
            ("buy", "place", "there", 2, 0.9, 99),
        ],
        columns=["task", "variable", "group", "expert", "mean_weight", "impressions"],
    )
    (found,) = judge(entropy_row(), used(), weights=weights)
    assert found.evidence == ("By age, the weight of expert 2 runs from 0.400 (young) to 0.600 (old).",)


def test_options_that_the_advice_names_exist():
    options = set(re.findall(r"--(\w+)", inspect.getsource(module)))
    settings = {field.name for section in SECTIONS.values() for field in dataclasses.fields(section)}
    named = {"virtual_kernel_stddev", "attention_stddev", "embedding_dim", "load_balancing_weight"}
    assert named == options <= settings


def test_the_note_on_field_attention(make_model, pairs):
    model = make_model("mvke")
    listening = field_attention(Study(model, pairs))
    first = listening[listening["kernel"] == 0].sort_values("mean_attention").iloc[-1]
    assert f"kernel 0 to {first['field']} ({first['mean_attention']:.2f})" in attention_note(listening)
    model.get_layer("virtual_kernels").kernels.assign(np.zeros((3, 8)))
    attention = model.get_layer("virtual_kernel_attention")
    attention.dense["query"].bias.assign(np.zeros(8))
    note = attention_note(field_attention(Study(model, pairs)))
    assert note.startswith("The field attention is flat") and "further than 0.00000 from 1/3" in note


def test_the_note_on_field_attention_has_its_threshold(make_model, pairs):
    frame = field_attention(Study(make_model("mvke"), pairs))
    assert attention_note(frame, Thresholds(flat_attention=0.0)).startswith("The field attention is flat")
    assert attention_note(frame, Thresholds(flat_attention=1.0)).startswith("Listens most to: kernel 0")


def test_a_model_without_gates_has_no_verdict(make_model, pairs):
    with pytest.raises(ValueError, match="model with gates"):
        verdicts(Study(make_model("single_task", SCHEMA.with_tasks([Task("ctr")])), pairs))
