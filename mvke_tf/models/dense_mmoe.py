# SPDX-License-Identifier: Apache-2.0
"""The plain MMoE (Ma et al., KDD 2018) on a dense input vector, for any multi-task problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from mvke_tf.layers import ExpertGate, Experts, GateSoftmax, MixExperts
from mvke_tf.models.multi_task import Mixture, MultiTaskModel

WEIGHTS_OUTPUT = "_expert_weights"


@keras.saving.register_keras_serializable(package="mvke_tf")
class DenseMMoE(MultiTaskModel):
    """A model of `build_mmoe`: `{task: output}`, perhaps with `{task}_expert_weights` beside.

    Its experts and gates read the whole input, which counts as the user's side.
    """

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(name for name in self.output if not name.endswith(WEIGHTS_OUTPUT))

    def _mixtures(self) -> dict[str, Mixture]:
        layers = {task: self.get_layer(f"mixture_{task}") for task in self.task_names}
        return {task: Mixture("user", mix.input[1], mix.input[0], mix.experts) for task, mix in layers.items()}


def _mlp(x, widths: Sequence[int], dropout_rate: float, name: str):
    for index, units in enumerate(widths):
        x = keras.layers.Dense(units, activation="relu", name=f"{name}_{index}")(x)
        if dropout_rate:
            x = keras.layers.Dropout(dropout_rate, name=f"{name}_dropout_{index}")(x)
    return x


def _given_experts(inputs, experts: Sequence[keras.Layer]):
    """The outputs of the caller's experts, `(B, E, O)`."""
    if len({id(expert) for expert in experts}) != len(experts):
        raise ValueError(f"Every expert must be a layer of its own. Received: {[expert.name for expert in experts]}")
    outputs = [expert(inputs) for expert in experts]
    shapes = [tuple(output.shape) for output in outputs]
    if any(len(shape) != 2 or shape[1] is None for shape in shapes) or len(set(shapes)) != 1:
        described = dict(zip([expert.name for expert in experts], shapes, strict=True))
        raise ValueError(f"Every expert must put out (B, O), with one width O for all. Received: {described}")
    rows = [keras.layers.Reshape((1, -1), name=f"expert_{index}")(output) for index, output in enumerate(outputs)]
    return keras.layers.Concatenate(axis=1, name="experts")(rows)


def _given_gate(inputs, gate: keras.Layer, num_experts: int, name: str, top_k: int, load_balancing_weight: float):
    """The weights `(B, E)` of the caller's gate, which gives scores."""
    scores = gate(inputs)
    if tuple(scores.shape[1:]) != (num_experts,):
        raise ValueError(
            f"A gate must put out one score per expert, (B, {num_experts}). "
            f"Received: {tuple(scores.shape)} from {gate.name!r}"
        )
    return GateSoftmax(top_k, load_balancing_weight, name=name)(scores)


def build_mmoe(
    input_dim: int = 128,
    num_experts: int = 3,
    num_tasks: int = 2,
    expert_hidden_dims: Sequence[int] = (64, 32),
    tower_hidden_dims: Sequence[int] = (32, 16),
    gate_hidden_dims: Sequence[int] | None = None,
    dropout_rate: float = 0.1,
    task_output_dims: Sequence[int] | None = None,
    return_expert_weights: bool = False,
    experts: Sequence[keras.Layer] | None = None,
    gates: Sequence[keras.Layer] | None = None,
    gate_top_k: int = 0,
    load_balancing_weight: float = 0.0,
    features: Any = None,
    name: str = "mmoe",
) -> DenseMMoE:
    """MMoE on dense features: experts, one gate per task, one tower per task.

    Every layer of an expert is relu (the last width of `expert_hidden_dims` is the experts' output), a gate is
    softmax of a linear layer, after an MLP where `gate_hidden_dims` is given, and a tower is a relu MLP with a linear
    output: a logit for a classification task, a value for a regression task. Which it is, the loss decides.

    Experts and gates may be given as layers, which become part of the model: any Keras layer, such as
    `mvke_tf.layers.ConvolutionalExpert` and `mvke_tf.layers.AttentionGate`. A custom class needs
    `keras.saving.register_keras_serializable`, so that the model can be loaded.

    Args:
        input_dim: Width I of the input.
        num_experts: Number E of experts.
        num_tasks: Number T of tasks.
        expert_hidden_dims: Widths of the layers of each expert, at least one.
        tower_hidden_dims: Widths of the hidden layers of each tower.
        gate_hidden_dims: Widths of the hidden layers of each gate; a linear gate by default.
        dropout_rate: Dropout after every hidden layer of experts, gates and towers.
        task_output_dims: Output width of each task; 1 each by default.
        return_expert_weights: Whether the model also returns the gate weights.
        experts: Layers from `(B, input_dim)` to `(B, O)`, in place of `num_experts` MLPs of `expert_hidden_dims`.
        gates: One layer per task, from `(B, input_dim)` to scores `(B, E)`, of which the weights are the softmax. The
            same layer for all tasks makes the one-gate MoE of the paper (OMoE).
        gate_top_k: Experts that keep weight in each row, those with the highest scores; 0 keeps all.
        load_balancing_weight: Coefficient of the training loss that evens out the use of experts, once per task (see
            `mvke_tf.layers.GateSoftmax`); 0 leaves it out.
        features: A symbolic tensor `(B, I)`, made of any inputs by any layers, that experts and gates read. By default
            the model has one input `"features"`, of width `input_dim`.
        name: Name of the model.

    Returns:
        A model from `(B, input_dim)` to `{"task_0": (B, task_output_dims[0]), ...}`; with `return_expert_weights` also
        `"task_0_expert_weights": (B, E)`, which sum to 1 over the experts, and so on.

    Raises:
        ValueError: If there is no task or expert layer, `task_output_dims` or `gates` has another length than there
            are tasks, experts or gates put out other shapes, or `gate_top_k` is above the number of experts.

    Example:

    >>> model = build_mmoe(input_dim=8, return_expert_weights=True)
    >>> {name: tuple(output.shape) for name, output in model(np.ones((4, 8))).items()}
    {'task_0': (4, 1), 'task_1': (4, 1), 'task_0_expert_weights': (4, 3), 'task_1_expert_weights': (4, 3)}

    Reference: Ma et al., KDD 2018, equations 6 and 7.
    """
    if num_tasks < 1 or not (expert_hidden_dims if experts is None else experts):
        raise ValueError(
            "MMoE needs at least one task, one expert and one layer per expert. "
            f"Received: num_tasks={num_tasks}, expert_hidden_dims={tuple(expert_hidden_dims)}, experts={experts}"
        )
    if gates is not None and len(gates) != num_tasks:
        raise ValueError(f"Expected a gate for each of the {num_tasks} tasks. Received: {len(gates)}")
    if gates is not None and gate_hidden_dims is not None:
        raise ValueError(
            "`gate_hidden_dims` shapes the gates made here; leave it out with gates of your own. "
            f"Received: {tuple(gate_hidden_dims)}"
        )
    output_dims = (1,) * num_tasks if task_output_dims is None else tuple(task_output_dims)
    if len(output_dims) != num_tasks:
        raise ValueError(f"Expected an output width for each of the {num_tasks} tasks. Received: {output_dims}")
    if features is None:
        inputs = features = keras.Input((input_dim,), name="features")
    else:
        inputs = {tensor.name: tensor for tensor in keras.utils.get_source_inputs(features)}
    if experts is None:
        *hidden, units = expert_hidden_dims
        expert_outputs = Experts(
            num_experts, hidden, units, dropout_rate=dropout_rate, output_activation="relu", name="experts"
        )(features)
    else:
        expert_outputs = _given_experts(features, experts)
    outputs, weights = {}, {}
    everything = tuple(range(expert_outputs.shape[1]))
    for index, output_dim in enumerate(output_dims):
        task = f"task_{index}"
        sparse: dict[str, Any] = {
            "name": f"gate_{task}",
            "top_k": gate_top_k,
            "load_balancing_weight": load_balancing_weight,
        }
        if gates is None:
            gate_input = _mlp(features, gate_hidden_dims or (), dropout_rate, f"gate_hidden_{task}")
            gate = ExpertGate(everything, **sparse)(gate_input)
        else:
            gate = _given_gate(features, gates[index], len(everything), **sparse)
        mixed = MixExperts(everything, name=f"mixture_{task}")(expert_outputs, gate)
        tower = _mlp(mixed, tower_hidden_dims, dropout_rate, f"tower_{task}")
        outputs[task] = keras.layers.Dense(output_dim, name=task, dtype="float32")(tower)
        weights[task + WEIGHTS_OUTPUT] = gate
    return DenseMMoE(inputs, {**outputs, **weights} if return_expert_weights else outputs, name=name)


def build_mmoe_recommender(
    user_cardinality: int = 10_000,
    item_cardinality: int = 50_000,
    embedding_dim: int = 64,
    num_dense_features: int = 8,
    num_experts: int = 4,
    num_tasks: int = 2,
    **settings: Any,
) -> DenseMMoE:
    """The plain MMoE on a user embedding, an item embedding and dense features, side by side.

    Args:
        user_cardinality: Number of user indices.
        item_cardinality: Number of item indices.
        embedding_dim: Width of both embeddings.
        num_dense_features: Number N of dense features; 0 leaves that input out.
        num_experts: Number of experts.
        num_tasks: Number of tasks.
        **settings: Further arguments of `build_mmoe`, where experts and gates read `(B, 2 * embedding_dim + N)`.

    Returns:
        A model from `{"user_id": (B,), "item_id": (B,), "dense_features": (B, N)}` to the outputs of `build_mmoe`.

    Example:

    >>> model = build_mmoe_recommender(100, 50, embedding_dim=4, num_dense_features=2)
    >>> outputs = model({"user_id": np.array([1]), "item_id": np.array([2]), "dense_features": np.zeros((1, 2))})
    >>> sorted(outputs)
    ['task_0', 'task_1']
    """
    inputs = {name: keras.Input((), dtype="int32", name=name) for name in ("user_id", "item_id")}
    fields = [
        keras.layers.Embedding(size, embedding_dim, name=f"embedding_{name}")(inputs[name])
        for name, size in (("user_id", user_cardinality), ("item_id", item_cardinality))
    ]
    if num_dense_features:
        inputs["dense_features"] = keras.Input((num_dense_features,), name="dense_features")
        fields.append(inputs["dense_features"])
    features = keras.layers.Concatenate(name="all_features")(fields)
    return build_mmoe(
        num_experts=num_experts, num_tasks=num_tasks, features=features, name="mmoe_recommender", **settings
    )
