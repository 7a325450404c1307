"""The verdict on constructed cases."""

import dataclasses
import inspect
import re

import numpy as np
import pytest

from mvke_tf.analysis import Grouping, Study, Thresholds, field_attention, verdicts
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
    assert "--balance_coefficient" in found.findings[0].advice and "learning rate" in found.findings[0].advice


def test_a_collapsed_gate_of_mmoe(make_model, pairs):
    model = make_model("mmoe")
    set_gate(model, "ctr", [0, 0, 0, 9])
    assert names(verdict(model, pairs))[0] == "collapsed"


@pytest.mark.parametrize(("name", "remedy"), [("mvke", "--kernel_stddev"), ("mmoe", "--balance_coefficient 0")])
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
    assert "Dead: expert 1, never the strongest" in found.findings[1].text
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


def test_thresholds_are_parameters(make_model, pairs):
    model = make_model("mmoe")
    set_gate(model, "ctr", np.log([0.4, 0.3, 0.2, 0.1]))
    words = {
        "balanced": Thresholds(),
        "collapsed": Thresholds(collapsed_weight=0.4 - 1e-6),
        "uniform": Thresholds(uniform_entropy=0.9),
        "skewed": Thresholds(balanced_entropy=0.95),
        "specialised": Thresholds(specialised_information=0.0),
    }
    for word, thresholds in words.items():
        # Rounding may leave an information of a little less than 0.
        study = Study(model, pairs)
        if word == "specialised":
            moved = 1e-3 * np.array([[1, 0, -1, 0]] * 2 + [[0] * 4] * 2)
            gate = study.gates["ctr"]
            study.gates["ctr"] = dataclasses.replace(gate, weights=gate.weights + moved)
        assert verdicts(study, thresholds=thresholds)[0].state == word
    with pytest.raises(ValueError, match=r"Thresholds.dead_weight must lie in \[0, 1\]. Received: 2"):
        Thresholds(dead_weight=2)


def test_the_evidence(make_model, pairs):
    model = make_model("mvke")
    ages = Grouping.of_labels("age", "user", ["old", "young", "old", "young"])
    films = Grouping.of_labels("film", "item", ["a", "b", "b"])
    study = Study(model, pairs)
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
    assert re.match(r"AUC [01]\.\d{4}; with the mean weights .* The most valuable expert is \d", found.evidence[-1])
    text = str(found)
    assert text.startswith(f"cvr: {found.state}\n  Over 7 impressions the mean weights of experts")
    assert all(sentence in text for sentence in found.evidence)


def test_options_that_the_advice_names_exist():
    options = set(re.findall(r"--(\w+)", inspect.getsource(module)))
    settings = {field.name for section in SECTIONS.values() for field in dataclasses.fields(section)}
    assert {"kernel_stddev", "attention_stddev", "balance_coefficient"} == options <= settings


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


def test_a_model_without_gates_has_no_verdict(make_model, pairs):
    with pytest.raises(ValueError, match="model with gates"):
        verdicts(Study(make_model("single_task", SCHEMA.with_tasks([Task("ctr")])), pairs))
