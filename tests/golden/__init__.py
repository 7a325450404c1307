# SPDX-License-Identifier: Apache-2.0
"""Golden files: inputs, weights, outputs and gradients recorded from the published TensorFlow 1 graphs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from tests.layer_checks import assert_close, loss_and_gradients

DEFAULT_FOLDER = Path(__file__).parent
FOLDER = Path(os.environ.get("MVKE_GOLDEN_DIR", DEFAULT_FOLDER))

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4

# From TF1 names to paths of weights, the first that the model has; `[k]` is one network of a stack.
PLACES = (
    (r".*virtual_cluster", r"virtual_kernels/kernels"),
    (r".*mvke_bottom/(query|key|value)_proj/(kernel|bias)", r"virtual_kernel_attention/\1/\2"),
    (r".*mvke_bottom/LayerNorm/(gamma|beta)", r"virtual_kernel_attention/\1"),
    (r".*/vke_(\d+)_field_layer_(\d+)/dense/(kernel|bias)", r"virtual_kernel_experts/\3_\2[\1]"),
    (r".*mvke_user/field_layer_(\d+)/dense/(kernel|bias)", r"virtual_kernel_experts/\2_\1[0]"),
    (r".*mmoe_user/expert_(\d+)_field_layer_(\d+)/dense/(kernel|bias)", r"experts/\3_\2[\1]"),
    (r".*mmoe_user/expert_(\d+)_field_layer_(\d+)/dense/(kernel|bias)", r"user_towers/\3_\2[\1]"),
    (r"expert_(kernel|bias)", r"experts/\1_0"),
    (r"gate_(kernel|bias)_(\w+)", r"gate_\2/dense/\1"),
    (r".*mmoe_gates_(\w+)/input_gate_dense/(kernel|bias)", r"gate_\1/dense/\2"),
    (r".*mmoe_tag/expert_(\d+)_field_layer_(\d+)/dense/(kernel|bias)", r"tag_towers/\3_\2[\1]"),
)


class Golden:
    """One golden file, which remembers which of its arrays were read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path) as file:
            self.meta = json.loads(str(file["meta"]))
            self._arrays = {key: file[key].astype("float32") for key in file.files if key != "meta"}
        self.unread = set(self._arrays)

    def __getitem__(self, key: str) -> np.ndarray:
        self.unread.discard(key)
        return self._arrays[key]

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the keys that start with it, in the order of the file."""
        return [key.removeprefix(prefix) for key in self._arrays if key.startswith(prefix)]

    def transpose(self, name: str, axes: tuple[int, ...]) -> None:
        """Reorders the axes of a variable and of its gradient."""
        for key in ("var/" + name, "grad_var/" + name):
            self._arrays[key] = self._arrays[key].transpose(axes)


def golden_files(folder: Path) -> dict[Path, str]:
    """The golden files of a folder with the operation that each of them records."""
    operations = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            if "meta" in file.files:
                operations[path] = json.loads(str(file["meta"]))["op"]
    return operations


def place(name: str, paths: set[str]) -> str:
    """The weight of the model, or the network of a stacked weight, that belongs to a TF1 variable."""
    matches = ((re.fullmatch(pattern, name), target) for pattern, target in PLACES)
    targets = [match.expand(target) for match, target in matches if match]
    for target in targets:
        if target.split("[")[0] in paths:
            return target
    raise AssertionError(f"No weight belongs to {name!r}; tried {targets} of {sorted(paths)}")


def slots(golden: Golden, variables: Sequence[keras.Variable]) -> dict[str, tuple[int, Any]]:
    """For every recorded variable the position of its weight and the index into that weight.

    Asserts that they match one to one: every recorded variable has one weight, and no weight is left over.
    """
    paths = {variable.path for variable in variables}
    places = {name: place(name, paths) for name in golden.names("var/")}
    stacked = {target.split("[")[0] for target in places.values() if "[" in target}
    found = {}
    for position, variable in enumerate(variables):
        if variable.path in stacked:
            found.update({f"{variable.path}[{index}]": (position, index) for index in range(variable.shape[0])})
        else:
            found[variable.path] = (position, ...)
    assert sorted(found) == sorted(places.values()), "Recorded variables and trainable weights differ"
    return {name: found[target] for name, target in places.items()}


def check_golden(
    golden: Golden,
    function: Callable[[dict[str, Any]], dict[str, Any]],
    variables: Sequence[keras.Variable] = (),
) -> None:
    """Assigns the recorded weights and checks every recorded array.

    Args:
        golden: The recording.
        function: From the recorded inputs to the outputs, by their recorded names; one of them may be `loss`.
        variables: The trainable weights of the function.
    """
    where = slots(golden, variables)
    values = [np.full(variable.shape, np.nan, "float32") for variable in variables]
    for name, (position, index) in where.items():
        recorded = golden["var/" + name]
        values[position][index] = recorded.reshape(values[position][index].shape)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)

    def loss_and_outputs(arrays):
        outputs = function(arrays)
        if "loss" in outputs:
            return outputs["loss"], outputs
        # A recording without a loss of its own.
        return sum(ops.sum(outputs[name] * golden["loss_weight/" + name]) for name in outputs), outputs

    arrays = {name: golden["input/" + name] for name in golden.names("input/")}
    total, outputs, by_array, by_variable = loss_and_gradients(loss_and_outputs, arrays, variables)

    assert_close(total, golden["loss"], OUTPUT_TOLERANCE, name="loss")
    assert sorted(outputs) == sorted(golden.names("output/"))
    for name, output in outputs.items():
        assert_close(output, golden["output/" + name], OUTPUT_TOLERANCE, name=name)

    gradients = {"grad_input/" + name: by_array[name] for name in golden.names("grad_input/")}
    for name, (position, index) in where.items():
        key = "grad_var/" + name
        gradients[key] = by_variable[position][index].reshape(golden[key].shape)
    # Some gradients are zero: the key bias adds the same to the scores of all fields, which softmax ignores. Their
    # recorded entries are rounding of sums as large as the other gradients, to which float32's epsilon is relative.
    floor = np.finfo("float32").eps * max(np.abs(golden[key]).max() for key in gradients)
    for key, gradient in gradients.items():
        assert_close(gradient, golden[key], GRADIENT_TOLERANCE, floor, key)
    assert not golden.unread, f"Never checked: {sorted(golden.unread)}"
