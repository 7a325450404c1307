"""What all two-tower models share: field embeddings, the scoring head, and cutting towers out of a model.

A model file builds two towers and nothing else. Every logit is the inner product of a vector that depends on the
user alone and one that depends on the item alone. (With `Task(given=...)`, that is the logit of the task given the
event before it; with a regression task, the value less a constant.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from mvke_tf.config import ModelConfig, index_range
from mvke_tf.layers import (
    Experts,
    FieldEmbedding,
    GatherRows,
    JointLogit,
    MixExperts,
    RegressionHead,
    ReplaceByUnknown,
    RowDot,
    SelectExperts,
)
from mvke_tf.losses import uncertainty_layer, with_uncertainty
from mvke_tf.schema import ITEM_ROWS, USER_ROWS, WEIGHTS_SUFFIX, Feature, Schema, Task

Vectors = dict[str, Any]
Towers = Callable[[Any, Any, Sequence[Task], ModelConfig], tuple[Vectors, Vectors]]

USER_VECTOR, ITEM_VECTOR = "user_vector_{task}", "item_vector_{task}"
# The head of a task that another task's event comes before.
CONDITIONAL = "{task}_given_{given}"


def feature_inputs(features: Sequence[Feature]) -> dict[str, Any]:
    """Symbolic inputs: int32 `(B,)` or `(B, L)` indices, float32 `(B, L)` weights."""
    inputs = {}
    for feature in features:
        shape = () if feature.length == 1 else (feature.length,)
        inputs[feature.name] = keras.Input(shape, dtype="int32", name=feature.name)
        if feature.length > 1:
            inputs[feature.name + WEIGHTS_SUFFIX] = keras.Input(
                shape, dtype="float32", name=feature.name + WEIGHTS_SUFFIX
            )
    return inputs


def embed_fields(schema: Schema, config: ModelConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Field embeddings of both towers, `{tower: (B, F, D)}`; features that share a table call one layer."""
    tables = {
        feature.name: FieldEmbedding(
            feature.vocabulary_size,
            config.embedding_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=config.embedding_stddev),
            name=f"embedding_{feature.name}",
        )
        for feature in schema.features
        if feature.embedding is None
    }
    inputs = dict(inputs)
    groups: dict[str, list[Feature]] = {}
    for feature in schema.features:
        if feature.unknown_rate:
            groups.setdefault(feature.unknown_group or feature.name, []).append(feature)
    for group, features in groups.items():
        replace = ReplaceByUnknown(features[0].unknown_rate, name=f"unknown_{group}")
        inputs |= dict(zip([f.name for f in features], replace([inputs[f.name] for f in features]), strict=True))
    fields = {}
    for tower in ("user", "item"):
        embedded = [
            tables[feature.table](*(inputs[name] for name in feature.inputs)) for feature in schema.of_tower(tower)
        ]
        merged = keras.layers.Concatenate(name=f"{tower}_concat")(embedded) if len(embedded) > 1 else embedded[0]
        fields[tower] = keras.layers.Reshape((len(embedded), config.embedding_dim), name=f"{tower}_fields")(merged)
        if config.embedding_dropout_rate:
            fields[tower] = keras.layers.Dropout(config.embedding_dropout_rate, name=f"{tower}_fields_dropout")(
                fields[tower]
            )
    return fields


def tag_vectors(item_fields: Any, tasks: Sequence[Task], config: ModelConfig, name: str = ITEM_VECTOR) -> Vectors:
    """The published tag tower: one MLP per task on the flattened item fields.

    Args:
        item_fields: `(B, F, D)`.
        tasks: The tasks.
        config: Shape of the model.
        name: Pattern of the names of the layers that put the vectors out.

    Returns:
        `{task: (B, D)}`.
    """
    return _per_task_networks(item_fields, tasks, config, "tag_towers", name)


def user_networks(user_fields: Any, tasks: Sequence[Task], config: ModelConfig) -> Vectors:
    """One MLP per task on the flattened user fields `(B, F, D)`: user vectors `{task: (B, D)}`."""
    return _per_task_networks(user_fields, tasks, config, "user_towers", USER_VECTOR)


def _per_task_networks(fields: Any, tasks: Sequence[Task], config: ModelConfig, networks: str, vector: str) -> Vectors:
    flat = keras.layers.Flatten(name=f"{networks}_input")(fields)
    outputs = Experts(
        len(tasks), config.hidden_dims, config.embedding_dim, dropout_rate=config.dropout_rate, name=networks
    )(flat)
    return {
        task.name: SelectExperts((index,), name=vector.format(task=task.name))(outputs)
        for index, task in enumerate(tasks)
    }


def score(user_vectors: Vectors, item_vectors: Vectors, tasks: Sequence[Task]) -> dict[str, Any]:
    """The scoring heads: logits, or values of regression tasks, `{task: (B, 1)}`, float32 under every dtype policy."""
    layers: dict[str, keras.Layer] = {}
    for task in tasks:
        if task.kind == "regression":
            layers[task.name] = RegressionHead(task.offset, name=task.name, dtype="float32")
        elif task.given is None:
            layers[task.name] = RowDot(name=task.name, dtype="float32")
        else:
            conditional = CONDITIONAL.format(task=task.name, given=task.given)
            layers[conditional] = RowDot(name=conditional, dtype="float32")
            layers[task.name] = JointLogit(task.given, name=task.name, dtype="float32")
    return _through_heads(layers, [task.name for task in tasks], lambda head, t: head(user_vectors[t], item_vectors[t]))


def _through_heads(
    layers: Mapping[str, keras.Layer],
    tasks: Sequence[str],
    product: Callable[[RowDot, str], Any],
    conditional: bool = False,
) -> dict[str, Any]:
    """Outputs of all tasks, where `product` applies the head of one task to whatever its vectors are.

    With `conditional`, tasks that another event comes before give their logit given that event, not the joint one.
    """
    outputs: dict[str, Any] = {}
    for task in tasks:
        head = layers[task]
        if isinstance(head, JointLogit):
            outputs[task] = product(layers[CONDITIONAL.format(task=task, given=head.given)], task)
            if not conditional:
                outputs[task] = head(outputs[head.given], outputs[task])
        else:
            outputs[task] = product(head, task)
    return outputs


def build_two_tower(schema: Schema, config: ModelConfig | None, towers: Towers, name: str = "two_tower") -> keras.Model:
    """A functional model `{feature: tensor} -> {task: logit (B, 1)}` from a function that builds its two towers.

    Args:
        schema: Features and tasks.
        config: Shape of the model; the default shape if None.
        towers: From user fields `(B, F, D)`, item fields `(B, F', D)`, tasks and config to two dictionaries of
            vectors `{task: (B, W_task)}`, the outputs of layers named `user_vector_<task>` and `item_vector_<task>`.
        name: Name of the model.
    """
    config = dataclasses.replace(config or ModelConfig(), name=name)
    inputs = feature_inputs(schema.features)
    fields = embed_fields(schema, config, inputs)
    tasks = with_ranges(schema.tasks, config)
    user_vectors, item_vectors = towers(fields["user"], fields["item"], tasks, config)
    return keras.Model(inputs, score(user_vectors, item_vectors, tasks), name=name)


def with_ranges(tasks: Sequence[Task], config: ModelConfig) -> tuple[Task, ...]:
    """The tasks with the kernels and experts that the settings state for them; those of others stay as they are."""
    kernels = dict(zip(config.tasks, map(index_range, config.task_kernels), strict=False))
    experts = dict(zip(config.tasks, map(index_range, config.task_experts), strict=False))
    return tuple(
        dataclasses.replace(
            task, kernels=kernels.get(task.name, task.kernels), experts=experts.get(task.name, task.experts)
        )
        for task in tasks
    )


def task_names(model: keras.Model) -> list[str]:
    """Names of the tasks of a two-tower model, in order.

    Raises:
        ValueError: If the model is not a two-tower model of this package.
    """
    names = list(model.output) if isinstance(model.output, dict) else []
    layers = {layer.name for layer in model.layers}
    if not names or any(USER_VECTOR.format(task=name) not in layers for name in names):
        raise ValueError(
            f"Expected a two-tower model of mvke_tf with outputs {{task: logit}} and layers `user_vector_<task>`. "
            f"Received: {model.name!r} with layers {sorted(layers)}"
        )
    return names


def task_kinds(model: keras.Model) -> dict[str, str]:
    """`{task: "binary" or "regression"}` of a two-tower model: whether an output is a logit or a value."""
    return {
        task: "regression" if isinstance(model.get_layer(task), RegressionHead) else "binary"
        for task in task_names(model)
    }


def conditional_tasks(model: keras.Model) -> dict[str, str]:
    """`{task: task whose event comes before it}` of the tasks built with `Task(given=...)`."""
    heads = {task: model.get_layer(task) for task in task_names(model)}
    return {task: head.given for task, head in heads.items() if isinstance(head, JointLogit)}


def conditional_model(model: keras.Model) -> keras.Model:
    """The logits given the event before, `{feature: tensor} -> {task: (B, 1)}`, of the tasks of `conditional_tasks`.

    Raises:
        ValueError: If there is no such task.
    """
    given = conditional_tasks(model)
    if not given:
        raise ValueError(f"No task of {model.name!r} was built with `Task(given=...)`. Tasks: {task_names(model)}")
    outputs = {task: model.get_layer(CONDITIONAL.format(task=task, given=of)).output for task, of in given.items()}
    return cut(model, outputs, name="conditional")


def outputs_of_products(model: keras.Model, products: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a two-tower model for given inner products of its user and item vectors, elementwise.

    Args:
        model: A built or loaded two-tower model.
        products: `{task: tensor}` of all tasks, of any one shape, for example `users @ items.T`.

    Returns:
        `{task: tensor}` of that shape: logits of binary tasks (joint ones of the tasks of `conditional_tasks`), values
        of regression tasks.
    """
    layers = {layer.name: layer for layer in model.layers}
    return _through_heads(layers, task_names(model), lambda head, task: head.from_product(products[task]))


def predictions(model: keras.Model, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Probabilities of binary tasks and values of regression tasks from the outputs of a two-tower model."""
    kinds = task_kinds(model)
    return {task: ops.sigmoid(output) if kinds[task] == "binary" else output for task, output in outputs.items()}


def cut(model: keras.Model, outputs: Any, name: str) -> keras.Model:
    """The part of a functional model that computes `outputs`, sharing its weights, on the inputs that it needs."""
    inputs = {key: tensor for key, tensor in model.input.items() if _reaches(tensor, outputs)}
    return keras.Model(inputs, outputs, name=name)


def _reaches(source: Any, outputs: Any) -> bool:
    """Whether `outputs` depend on the symbolic tensor `source`."""
    seen, stack = set(), list(keras.tree.flatten(outputs))
    while stack:
        tensor = stack.pop()
        if tensor is source:
            return True
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        operation, node, _ = tensor._keras_history
        stack.extend(operation._inbound_nodes[node].input_tensors)
    return False


def tower(model: keras.Model, side: str) -> keras.Model:
    """One tower of a two-tower model, `{feature: tensor} -> {task: vector (B, W_task)}`, sharing its weights.

    Args:
        model: A built or loaded two-tower model.
        side: `"user"` or `"item"`.

    Raises:
        ValueError: If `side` or the model is something else.
    """
    if side not in ("user", "item"):
        raise ValueError(f"`side` must be 'user' or 'item'. Received: {side!r}")
    vector = USER_VECTOR if side == "user" else ITEM_VECTOR
    outputs = {task: model.get_layer(vector.format(task=task)).output for task in task_names(model)}
    return cut(model, outputs, name=f"{side}_tower")


def gated_tasks(model: keras.Model) -> list[str]:
    """Names of the tasks of a two-tower model that have a gate, in order."""
    layers = {layer.name for layer in model.layers}
    return [task for task in task_names(model) if f"gate_{task}" in layers]


def mixed_experts(layer: keras.layers.Layer | None, number: int) -> tuple[int, ...]:
    """Indices of the experts that a layer mixes or selects by so many gate weights; 0, 1, ... if it does not say."""
    if isinstance(layer, MixExperts):
        return layer.experts
    return layer.indices if isinstance(layer, SelectExperts) else tuple(range(number))


def gate_model(model: keras.Model) -> keras.Model:
    """The gates of a built or loaded model, sharing its weights.

    Returns:
        `{feature: tensor} -> {task: gate weights (B, n_task)}`, which sum to 1 over the experts that the task sees.
        MVKE's gates read item features only, the others' user features only. A task with a single expert has no gate.

    Raises:
        ValueError: If the model has no gate at all.
    """
    outputs = {task: model.get_layer(f"gate_{task}").output for task in gated_tasks(model)}
    if not outputs:
        raise ValueError(f"The model {model.name!r} has no gates. Models of mixtures of experts have.")
    return cut(model, outputs, name="gates")


def training_model(model: keras.Model, distinct: bool = False, conditional: bool = False) -> keras.Model:
    """A model to compile and train, which shares its weights with a model to checkpoint.

    Args:
        model: A built or loaded two-tower model, with or without `mvke_tf.losses.with_uncertainty`.
        distinct: Whether it takes batches of distinct users and items, as `distinct_model` does.
        conditional: Whether tasks built with `Task(given=...)` give their logit given the event before: to learn from
            the rows with that event only.
    """
    if distinct:
        trained = distinct_model(model, conditional)
    else:
        outputs = {task: model.get_layer(task).output for task in task_names(model)}
        if conditional and conditional_tasks(model):
            outputs |= conditional_model(model).output
        trained = keras.Model(model.input, outputs, name=f"{model.name}_training")
    uncertainty = uncertainty_layer(model)
    return trained if uncertainty is None else with_uncertainty(trained, uncertainty)


def distinct_model(model: keras.Model, conditional: bool = False) -> keras.Model:
    """The same model for batches of distinct users and items, sharing its weights.

    It takes the features of U distinct users and I distinct items, and two more inputs, `user_rows` and `item_rows`
    `(B,)`, that say which of them each pair of the batch consists of. Outputs equal those of the plain model on the
    B pairs; a tower runs once per distinct row. `conditional` is that of `training_model`.
    """
    user, item = tower(model, "user"), tower(model, "item")
    rows = {name: keras.Input((), dtype="int32", name=name) for name in (USER_ROWS, ITEM_ROWS)}
    vectors = {}
    for side, part, name in (("user", user, USER_ROWS), ("item", item, ITEM_ROWS)):
        vectors[side] = {
            task: GatherRows(name=f"{side}_rows_{task}")(vector, rows[name]) for task, vector in part.output.items()
        }
    layers = {layer.name: layer for layer in model.layers}
    outputs = _through_heads(
        layers,
        task_names(model),
        lambda head, task: head(vectors["user"][task], vectors["item"][task]),
        conditional,
    )
    return keras.Model({**user.input, **item.input, **rows}, outputs, name=f"{model.name}_distinct")
