# SPDX-License-Identifier: Apache-2.0
"""Models whose training adds the risk of ESCM² to the losses of ESMM."""

import dataclasses

import numpy as np
import pytest
from keras import ops

from mvke_tf.layers import CounterfactualRisk
from mvke_tf.losses import task_losses
from mvke_tf.models import build_model, with_uncertainty
from mvke_tf.schema import Schema, Task
from tests.layer_checks import assert_close
from tests.models.problems import CONFIG, ITEMS, JIT_COMPILE, PAIRS, ROWS, SCHEMA, USERS, labels, randomize

GIVEN = Schema(SCHEMA.features, (Task("ctr"), Task("cvr", given="ctr")))


@pytest.mark.parametrize(
    ("name", "method", "deduplicate", "uncertainty"),
    [("mvke", "ips", True, False), ("mvke", "dr", False, True), ("shared_bottom", "dr", True, False)],
)
def test_the_loss_of_a_step_by_hand(name, method, deduplicate, uncertainty):
    plain = randomize(build_model(name, GIVEN, dataclasses.replace(CONFIG, name=name)))
    if uncertainty:
        plain = with_uncertainty(plain)
        plain.log_variances.log_variances.assign([0.3, -0.2])
    layers = []

    def risk(task, given):
        layers.append(CounterfactualRisk(task, given, method, 0.25, 4.0, name=f"risk_{task}"))
        return layers[-1]

    model = plain.training_model(deduplicate, risk=risk)
    model.compile("sgd", loss=task_losses(plain.kinds), jit_compile=JIT_COMPILE)
    (layer,) = layers
    assert model.added_losses == [layer] and set(model.output) == {"ctr", "cvr", "risk_cvr"}
    inputs = {**USERS, **ITEMS, **ROWS} if deduplicate else PAIRS
    outputs = model(inputs)
    weights = {"ctr": np.ones(7, "float32"), "cvr": np.array([1, 0, 2, 1, 1, 0, 1], "float32")}
    plain_loss = plain.training_model(deduplicate)
    plain_loss.compile("sgd", loss=task_losses(plain.kinds), jit_compile=JIT_COMPILE)
    without = float(plain_loss.compute_loss(inputs, labels(), plain_loss(inputs), weights))
    click, given = plain(PAIRS)["ctr"], plain.conditional(PAIRS)["cvr"]
    assert_close(outputs["risk_cvr"][:, 1:2], given)
    assert_close(outputs["risk_cvr"][:, 0:1], np.minimum(1 + np.exp(-ops.convert_to_numpy(click)), 4.0))
    expected = 0.25 * float(layer.added_loss(labels(), outputs["risk_cvr"], weights))
    assert abs(expected) > 0.05
    assert float(model.compute_loss(inputs, labels(), outputs, weights)) == pytest.approx(without + expected, rel=1e-5)
    # The model that is kept knows nothing of it.
    extra = {variable.path for variable in model.variables} - {variable.path for variable in plain.variables}
    assert len(extra) == (4 if method == "dr" else 0)


def test_a_task_that_is_learned_given_its_event_has_no_risk():
    tasks = (Task("ctr"), Task("cvr", given="ctr", objective="conditional"))
    plain = build_model("mvke", Schema(SCHEMA.features, tasks), CONFIG)
    model = plain.training_model(risk=CounterfactualRisk)
    assert model.added_losses == [] and set(model.output) == {"ctr", "cvr"}
