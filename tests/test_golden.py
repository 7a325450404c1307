"""The port against the recorded numbers; `MVKE_GOLDEN_DIR=folder pytest -m golden` proves it on other recordings."""

from pathlib import Path

import keras
import pytest
from keras import ops

from mvke_tf.config import ModelConfig
from mvke_tf.layers import Experts, SelectExperts, VirtualKernelAttention, VirtualKernelGate, VirtualKernels
from mvke_tf.models.mvke import mvke_towers
from mvke_tf.models.two_tower import score
from mvke_tf.schema import Task
from tests.golden import DEFAULT_FOLDER, FOLDER, Golden, check_golden, golden_files

pytestmark = pytest.mark.golden


def check_attention(golden: Golden) -> None:
    layer = VirtualKernelAttention(name="virtual_kernel_attention")
    layer.build(golden["input/fields"].shape, golden["input/const_virtual_kernels"].shape)
    check_golden(
        golden,
        lambda arrays: {"bottom": layer(arrays["fields"], arrays["const_virtual_kernels"])},
        layer.trainable_variables,
    )


def check_gate(golden: Golden) -> None:
    gate = VirtualKernelGate(range(golden["input/const_virtual_kernels"].shape[0]))

    def outputs(arrays):
        weights = gate(arrays["tag"], arrays["const_virtual_kernels"])
        return {"user": ops.einsum("bk,bkd->bd", weights, arrays["expert_outputs"]), "weights": weights}

    check_golden(golden, outputs)


def symbolic_inputs(golden: Golden) -> dict[str, keras.KerasTensor]:
    return {name: keras.Input(golden["input/" + name].shape[1:], name=name) for name in golden.names("input/")}


def check_shared_experts(golden: Golden) -> None:
    """User vectors and gate weights of given tags."""
    kernels = {task: tuple(range(first, last + 1)) for task, (first, last) in golden.meta["tasks"].items()}
    num_kernels, dim = golden["var/mvke_user/virtual_cluster"].shape
    inputs = symbolic_inputs(golden)
    table = VirtualKernels(num_kernels, dim, name="virtual_kernels")(inputs["u"])
    attended = VirtualKernelAttention(name="virtual_kernel_attention")(inputs["u"], table)
    experts = Experts(
        num_kernels, golden.meta["hidden"], dim, shared=golden.meta["shared_model"], name="virtual_kernel_experts"
    )(attended)
    outputs = {}
    for task, chosen in kernels.items():
        gate = VirtualKernelGate(chosen)(inputs["tag_" + task], table)
        selected = keras.layers.Reshape((len(chosen), dim))(SelectExperts(chosen)(experts))
        outputs["user/" + task] = ops.einsum("bk,bkd->bd", gate, selected)
        outputs["weights/" + task] = gate
    model = keras.Model(inputs, outputs)
    check_golden(golden, model, model.trainable_variables)


def check_graph(golden: Golden) -> None:
    """The whole model of two tasks, from field embeddings to the loss."""
    num_kernels, dim = golden["var/mvke_user/virtual_cluster"].shape
    names = golden.names("output/score/")
    # Recorded tags are followed by one gate weight per kernel. The ranges start at the first and end at the last one.
    first, last = (golden["output/tag/" + name].shape[1] - dim for name in names)
    kernels = (range(first), range(num_kernels - last, num_kernels))
    tasks = tuple(Task(name, kernels=chosen) for name, chosen in zip(names, kernels, strict=True))
    labels = {name: next(key for key in golden.names("input/") if key.endswith(name[1:] + "_label")) for name in names}
    config = ModelConfig("mvke", dim, golden.meta["hidden"], num_kernels, dropout_rate=0.0)

    inputs = symbolic_inputs(golden)
    user_vectors, item_vectors = mvke_towers(inputs["u"], inputs["t"], tasks, config)
    logits = score(user_vectors, item_vectors)
    parts = keras.Model(inputs, logits)
    outputs = {"loss": 0.0}
    for name in names:
        tag, gate = (parts.get_layer(f"{part}_{name}").output for part in ("tag", "gate"))
        outputs["tag/" + name] = ops.concatenate([tag, gate], axis=-1)
        outputs["user/" + name] = user_vectors[name]
        outputs["score/" + name] = ops.sigmoid(logits[name])
        outputs["loss"] += ops.mean(ops.binary_crossentropy(inputs[labels[name]], logits[name], from_logits=True))
    model = keras.Model(inputs, outputs)
    check_golden(golden, model, model.trainable_variables)


CHECKS = {
    "mvke_bottom_layer": check_attention,
    "vkg_layer": check_gate,
    "build_mvke": check_shared_experts,
    "user_MVKE_and_tag_HS": check_graph,
}
OPERATIONS = golden_files(FOLDER)
FILES = [path for path, operation in OPERATIONS.items() if operation in CHECKS]


def test_the_folder_has_recordings():
    assert FILES, f"{FOLDER} has no golden file (.npz with `meta`) of {sorted(CHECKS)}. Received: {OPERATIONS}"
    missing = set(CHECKS) - set(OPERATIONS.values())
    assert FOLDER != DEFAULT_FOLDER or not missing, f"{FOLDER} lacks recordings of {missing}"


@pytest.mark.parametrize("path", FILES or [FOLDER], ids=lambda path: path.stem)
def test_golden(path: Path):
    golden = Golden(path)
    CHECKS[golden.meta["op"]](golden)
