# SPDX-License-Identifier: Apache-2.0
"""Models whose training adds a softmax over the items of the batch."""

import numpy as np
import pytest

from mvke_tf.layers import InBatchSoftmax
from mvke_tf.losses import task_losses
from mvke_tf.models import build_model
from mvke_tf.schema import ITEM_SAMPLING, Schema, Task
from tests.layer_checks import assert_close
from tests.models.problems import (
    CONFIG,
    ITEMS,
    JIT_COMPILE,
    PAIRS,
    ROWS,
    SCHEMA,
    USERS,
    labels,
    numpy_outputs,
    randomize,
)

TASKS = (Task("ctr"), Task("cvr", given="ctr"), Task("stars", "regression"))
SAMPLING = np.array([[-0.5, 0], [-1.5, 1], [-2.0, 2]], "float32")


@pytest.mark.parametrize("deduplicate", [True, False])
def test_the_loss_of_a_step_by_hand(deduplicate):
    plain = randomize(build_model("mvke", Schema(SCHEMA.features, TASKS), CONFIG))
    layers = []

    def softmax(task):
        layers.append(InBatchSoftmax(task, 0.25, name=f"in_batch_{task}"))
        return layers[-1]

    model = plain.training_model(deduplicate, softmax=softmax)
    # Neither the task with an event before it nor the regression.
    assert model.added_losses == layers and [layer.task for layer in layers] == ["ctr"]
    inputs = {**USERS, **ITEMS, **ROWS, ITEM_SAMPLING: SAMPLING}
    if not deduplicate:
        inputs = {**PAIRS, ITEM_SAMPLING: SAMPLING[ROWS["item_rows"]]}
    model.compile("sgd", loss=task_losses(plain.kinds), jit_compile=JIT_COMPILE)
    truth = labels() | {"stars": np.zeros((7, 1), "float32")}
    outputs = model(inputs)
    user, item = numpy_outputs(plain.user_tower, USERS)["ctr"], numpy_outputs(plain.item_tower, ITEMS)["ctr"]
    scores = (user @ item.T)[ROWS["user_rows"]] - SAMPLING[:, 0]
    counts = np.bincount(ROWS["item_rows"], minlength=3)
    expected = []
    for row, chosen in enumerate(ROWS["item_rows"]):
        often = np.where(np.arange(3) == chosen, 1, counts)
        expected.append(np.log(np.sum(often * np.exp(scores[row]))) - scores[row, chosen])
    assert_close(outputs["in_batch_ctr"][:, 0], np.array(expected))
    bare = plain.training_model(deduplicate)
    bare.compile("sgd", loss=task_losses(plain.kinds), jit_compile=JIT_COMPILE)
    rest = {name: array for name, array in inputs.items() if name != ITEM_SAMPLING}
    without = float(bare.compute_loss(rest, truth, bare(rest)))
    added = 0.25 * np.average(expected, weights=truth["ctr"][:, 0])
    assert float(model.compute_loss(inputs, truth, outputs)) == pytest.approx(without + added, rel=1e-5)
