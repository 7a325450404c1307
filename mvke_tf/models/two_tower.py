"""What all two-tower models share: field embeddings, the scoring head, and cutting towers out of a model.

A model file builds two towers and nothing else. Every logit is the inner product of a vector that depends on the
user alone and one that depends on the item alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from mvke_tf.config import ModelConfig
from mvke_tf.layers import Experts, FieldEmbedding, GatherRows, ReplaceByUnknown, RowDot, SelectExperts
from mvke_tf.schema import ITEM_ROWS, USER_ROWS, WEIGHTS_SUFFIX, Feature, Schema, Task

Vectors = dict[str, Any]
Towers = Callable[[Any, Any, Sequence[Task], ModelConfig], tuple[Vectors, Vectors]]

USER_VECTOR, ITEM_VECTOR = "user_vector_{task}", "item_vector_{task}"


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


def score(user_vectors: Vectors, item_vectors: Vectors) -> dict[str, Any]:
    """The scoring head: logits `{task: (B, 1)}`, float32 under every dtype policy."""
    return {task: RowDot(name=task, dtype="float32")(user_vectors[task], item_vectors[task]) for task in user_vectors}


def build_two_tower(schema: Schema, config: ModelConfig, towers: Towers) -> keras.Model:
    """A functional model `{feature: tensor} -> {task: logit (B, 1)}` from a function that builds its two towers.

    Args:
        schema: Features and tasks.
        config: Shape of the model.
        towers: From user fields `(B, F, D)`, item fields `(B, F', D)`, tasks and config to two dictionaries of
            vectors `{task: (B, W_task)}`, the outputs of layers named `user_vector_<task>` and `item_vector_<task>`.
    """
    inputs = feature_inputs(schema.features)
    fields = embed_fields(schema, config, inputs)
    user_vectors, item_vectors = towers(fields["user"], fields["item"], schema.tasks, config)
    return keras.Model(inputs, score(user_vectors, item_vectors), name=config.name)


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


def gate_model(model: keras.Model) -> keras.Model:
    """The gates of a built or loaded model, sharing its weights.

    Returns:
        `{feature: tensor} -> {task: gate weights (B, n_task)}`, which sum to 1 over the experts that the task sees.
        MVKE's gates read item features only, the others' user features only. A task with a single expert has no gate.

    Raises:
        ValueError: If the model has no gate at all.
    """
    layers = {layer.name for layer in model.layers}
    outputs = {task: model.get_layer(f"gate_{task}").output for task in task_names(model) if f"gate_{task}" in layers}
    if not outputs:
        raise ValueError(f"The model {model.name!r} has no gates. Models of mixtures of experts have.")
    return cut(model, outputs, name="gates")


def distinct_model(model: keras.Model) -> keras.Model:
    """The same model for batches of distinct users and items, sharing its weights.

    It takes the features of U distinct users and I distinct items, and two more inputs, `user_rows` and `item_rows`
    `(B,)`, that say which of them each pair of the batch consists of. Outputs equal those of the plain model on the
    B pairs; a tower runs once per distinct row.
    """
    user, item = tower(model, "user"), tower(model, "item")
    rows = {name: keras.Input((), dtype="int32", name=name) for name in (USER_ROWS, ITEM_ROWS)}
    vectors = {}
    for side, part, name in (("user", user, USER_ROWS), ("item", item, ITEM_ROWS)):
        vectors[side] = {
            task: GatherRows(name=f"{side}_rows_{task}")(vector, rows[name]) for task, vector in part.output.items()
        }
    logits = {task: model.get_layer(task)(vectors["user"][task], vectors["item"][task]) for task in task_names(model)}
    return keras.Model({**user.input, **item.input, **rows}, logits, name=f"{model.name}_distinct")
