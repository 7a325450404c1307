# SPDX-License-Identifier: Apache-2.0
"""The port against the recorded numbers; `MVKE_GOLDEN_DIR=folder pytest -m golden` proves it on other recordings."""

import re
from collections.abc import Callable
from pathlib import Path

import keras
import pytest
from keras import ops

from mvke_tf.config import ModelConfig
from mvke_tf.layers import Experts, SelectExperts, VirtualKernelAttention, VirtualKernelGate, VirtualKernels
from mvke_tf.models.dense_mmoe import build_mmoe
from mvke_tf.models.mmoe import mixture, mmoe_towers
from mvke_tf.models.mvke import build_mvke, mvke_towers
from mvke_tf.models.shared_bottom import hard_sharing_towers
from mvke_tf.models.two_tower import score
from mvke_tf.schema import Feature, Schema, Task
from tests.golden import DEFAULT_FOLDER, FOLDER, OUTPUT_TOLERANCE, Golden, check_golden, golden_files
from tests.layer_checks import assert_close, compiled

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


def check_built_mvke(golden: Golden) -> None:
    """The same inside the two towers of `build_mvke`, from its field embeddings and tag vectors on; and its logits."""
    kernels = {task: tuple(range(first, last + 1)) for task, (first, last) in golden.meta["tasks"].items()}
    num_kernels, dim = golden["var/mvke_user/virtual_cluster"].shape
    num_fields = golden["input/u"].shape[1]
    features = [*(Feature(f"field_{index}", "user", 2) for index in range(num_fields)), Feature("tag", "item", 2)]
    config = ModelConfig(
        embedding_dim=dim,
        hidden_dims=golden.meta["hidden"],
        num_virtual_kernels=num_kernels,
        shared_experts=golden.meta["shared_model"],
        dropout_rate=0.0,
        embedding_dropout_rate=0.0,
    )
    built = build_mvke(Schema(features, [Task(task, kernels=chosen) for task, chosen in kernels.items()]), config)

    def output(layer):
        return built.get_layer(layer).output

    inputs = {"u": output("user_fields")} | {f"tag_{task}": output(f"tag_{task}") for task in kernels}
    # The item fields tie the table of kernels to the graph, which reads nothing else of them here.
    symbols = [*inputs.values(), output("item_fields")]
    nothing = ops.zeros((len(golden["input/u"]), 1, dim))
    outputs = {}
    for task, chosen in kernels.items():
        experts = keras.layers.Reshape((len(chosen), dim))(output(f"user_vector_{task}"))
        outputs["weights/" + task] = output(f"gate_{task}")
        outputs["user/" + task] = ops.einsum("bk,bkd->bd", outputs["weights/" + task], experts)
    model = keras.Model(symbols, outputs)
    check_golden(golden, lambda arrays: model([*(arrays[name] for name in inputs), nothing]), model.trainable_variables)

    arrays = [ops.convert_to_tensor(golden["input/" + name]) for name in inputs]
    logits = compiled(keras.Model(symbols, built.output))([*arrays, nothing])
    for task in kernels:
        expected = (golden["output/user/" + task] * golden["input/tag_" + task]).sum(axis=1, keepdims=True)
        assert_close(logits[task], expected, OUTPUT_TOLERANCE, name=task)


def check_mixture(golden: Golden) -> None:
    """The gate of MMoE on given expert outputs; a single expert has none."""
    inputs = symbolic_inputs(golden)
    gates = [name.split("mmoe_gates_")[1].split("/")[0] for name in golden.names("var/")] or ["none"]
    experts = range(golden["input/expert_outputs"].shape[1])
    mixed = mixture(
        keras.layers.Flatten()(inputs["fields"]),
        inputs["expert_outputs"],
        experts,
        f"gate_{gates[0]}",
        "m",
        ModelConfig(),
    )
    model = keras.Model(inputs, {"mixed": mixed})
    check_golden(golden, model, model.trainable_variables)


def ranges(golden: Golden, names: list[str], sizes: list[int], total: int) -> list[range]:
    """The kernels or experts of each task: those that `meta` states, else from the first and up to the last one."""
    if "tasks" in golden.meta:
        return [range(first, last + 1) for first, last in (golden.meta["tasks"][name] for name in names)]
    assert len(sizes) <= 2, f"{golden.path}: `meta` must state the ranges of more than two tasks"
    return [range(sizes[0]), range(total - sizes[-1], total)][: len(sizes)]


def mvke_graph(golden: Golden, names: list[str]) -> tuple:
    num_kernels, dim = golden["var/mvke_user/virtual_cluster"].shape
    # Recorded tags are followed by one gate weight per kernel.
    chosen = ranges(golden, names, [golden["output/tag/" + name].shape[1] - dim for name in names], num_kernels)
    tasks = [Task(name, kernels=kernels) for name, kernels in zip(names, chosen, strict=True)]
    return mvke_towers, tasks, {"num_virtual_kernels": num_kernels}


def mmoe_graph(golden: Golden, names: list[str]) -> tuple:
    experts = {match[1] for key in golden.names("var/") if (match := re.match(r"mmoe_user/expert_(\d+)_", key))}
    sizes = [golden[f"var/mmoe_user/mmoe_gates_{name}/input_gate_dense/bias"].shape[0] for name in names]
    chosen = ranges(golden, names, sizes, len(experts))
    tasks = [Task(name, experts=seen) for name, seen in zip(names, chosen, strict=True)]
    return mmoe_towers, tasks, {"num_experts": len(experts)}


def hard_sharing_graph(golden: Golden, names: list[str]) -> tuple:
    return hard_sharing_towers, [Task(name) for name in names], {}


def check_graph(golden: Golden) -> None:
    """A whole model, from field embeddings to the loss."""
    names = golden.names("output/score/")
    towers, tasks, settings = GRAPHS[golden.meta["op"]](golden, names)
    dim = golden["input/u"].shape[-1]
    config = ModelConfig("golden", embedding_dim=dim, hidden_dims=golden.meta["hidden"], dropout_rate=0.0, **settings)
    labels = {name: next(key for key in golden.names("input/") if key.endswith(name[1:] + "_label")) for name in names}

    inputs = symbolic_inputs(golden)
    user_vectors, item_vectors = towers(inputs["u"], inputs["t"], tasks, config)
    logits = score(user_vectors, item_vectors, tasks)
    parts = keras.Model({name: inputs[name] for name in ("u", "t")}, logits)
    outputs = {"loss": 0.0}
    for name in names:
        if towers is mvke_towers:
            tag, gate = (parts.get_layer(f"{part}_{name}").output for part in ("tag", "gate"))
            outputs["tag/" + name] = ops.concatenate([tag, gate], axis=-1)
        else:
            outputs["tag/" + name] = item_vectors[name]
        outputs["user/" + name] = user_vectors[name]
        outputs["score/" + name] = ops.sigmoid(logits[name])
        outputs["loss"] += ops.mean(ops.binary_crossentropy(inputs[labels[name]], logits[name], from_logits=True))
    # A graph of one task reads one of the labels; some versions of Keras refuse an input that nothing reads.
    used = ["u", "t", *labels.values()]
    model = keras.Model({name: inputs[name] for name in used}, outputs)
    check_golden(golden, lambda arrays: model({name: arrays[name] for name in used}), model.trainable_variables)


GRAPHS = {
    "user_MVKE_and_tag_HS": mvke_graph,
    "user_MMoE_and_tag_HS": mmoe_graph,
    "user_HS_and_tag_HS": hard_sharing_graph,
    "user_and_tag_single_pctr": hard_sharing_graph,
    "user_and_tag_single_pcvr": hard_sharing_graph,
}


def check_dense_mmoe(golden: Golden) -> None:
    """The experts and gates of MMoE on a dense input: relu experts, one softmax gate per task, no towers."""
    _, units, num_experts = golden["var/expert_kernel"].shape
    inputs = symbolic_inputs(golden)
    experts = Experts(num_experts, (), units, output_activation="relu", name="experts")(inputs["x"])
    tasks = golden.names("output/")
    outputs = {
        task: mixture(inputs["x"], experts, range(num_experts), f"gate_{task}", f"mixture_{task}", ModelConfig())
        for task in tasks
    }
    model = keras.Model(inputs, outputs)
    expert_axis_first(golden)
    check_golden(golden, model, model.trainable_variables)


def expert_axis_first(golden: Golden) -> None:
    """Reorders the weights of experts, whose axis the recording of the dense MMoE keeps last."""
    golden.transpose("expert_kernel", (2, 0, 1))
    golden.transpose("expert_bias", (1, 0))


def check_built_mmoe(golden: Golden) -> None:
    """The same from inside `build_mmoe`: what its towers read, and the gate weights that it returns."""
    input_dim, units, num_experts = golden["var/expert_kernel"].shape
    tasks = golden.names("output/")
    built = build_mmoe(
        input_dim, num_experts, len(tasks), (units,), tower_hidden_dims=(), dropout_rate=0.0, return_expert_weights=True
    )
    # The recorded tasks in their order, whatever their names are.
    numbered = {task: f"task_{index}" for index, task in enumerate(tasks)}
    model = keras.Model(
        built.input, {task: built.get_layer(f"mixture_{number}").output for task, number in numbered.items()}
    )
    expert_axis_first(golden)
    check_golden(golden, lambda arrays: model(arrays["x"]), model.trainable_variables)

    outputs = compiled(built)(golden["input/x"])
    experts = compiled(built.get_layer("experts"))(golden["input/x"])
    for task, number in numbered.items():
        mixed = ops.einsum("be,beo->bo", outputs[f"{number}_expert_weights"], experts)
        assert_close(mixed, golden["output/" + task], OUTPUT_TOLERANCE, name=task)
        # Without hidden layers, a tower is one linear layer on the mixture.
        kernel, bias = built.get_layer(number).get_weights()
        assert_close(outputs[number], golden["output/" + task] @ kernel + bias, OUTPUT_TOLERANCE, name=number)


CHECKS = {
    "mvke_bottom_layer": (check_attention,),
    "vkg_layer": (check_gate,),
    "build_mvke": (check_shared_experts, check_built_mvke),
    "mmoe_gate_layer": (check_mixture,),
    "keras_mmoe.MMoE": (check_dense_mmoe, check_built_mmoe),
    **dict.fromkeys(GRAPHS, (check_graph,)),
}
OPERATIONS = golden_files(FOLDER)
FILES = [path for path, operation in OPERATIONS.items() if operation in CHECKS]


def test_the_folder_has_recordings():
    assert FILES, f"{FOLDER} has no golden file (.npz with `meta`) of {sorted(CHECKS)}. Received: {OPERATIONS}"
    unknown = set(OPERATIONS.values()) - set(CHECKS)
    assert FOLDER != DEFAULT_FOLDER or not unknown, f"{FOLDER} has golden files of unknown operations {unknown}"
    missing = set(CHECKS) - set(OPERATIONS.values())
    assert FOLDER != DEFAULT_FOLDER or not missing, f"{FOLDER} lacks recordings of {missing}"


@pytest.mark.parametrize(
    ("path", "check"),
    [
        pytest.param(path, check, id=f"{path.stem}-{check.__name__.removeprefix('check_')}")
        for path in FILES
        for check in CHECKS[OPERATIONS[path]]
    ],
)
def test_golden(path: Path, check: Callable[[Golden], None]):
    check(Golden(path))
