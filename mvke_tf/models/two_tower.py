# SPDX-License-Identifier: Apache-2.0
"""What all two-tower models share: field embeddings, scoring heads, and what a model knows of itself.

A model file builds two towers and nothing else. Every logit is the inner product of a vector that depends on the
user alone and one that depends on the item alone. (With `Task(given=...)`, that is the logit of the task given the
event before it; with a regression task, the value less a constant; with a count, the logarithm of the rate less a
constant; with a multi-class task, one inner product per class, see `mvke_tf.layers.ClassHead`.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

from mvke_tf.config import ModelConfig, index_range
from mvke_tf.errors import ConfigError
from mvke_tf.layers import (
    ClassHead,
    CounterfactualRisk,
    CountHead,
    Experts,
    FieldEmbedding,
    GatedTag,
    GatherRows,
    InBatchSoftmax,
    JointLogit,
    LogitMap,
    MixExperts,
    RegressionHead,
    ReplaceByUnknown,
    RowDot,
    SelectExperts,
    StackFields,
    VirtualKernelAttention,
    VirtualKernelGate,
    VirtualKernels,
)
from mvke_tf.models.multi_task import Mixture, MultiTaskModel, source
from mvke_tf.schema import ITEM_ROWS, ITEM_SAMPLING, USER_ROWS, WEIGHTS_SUFFIX, Feature, Schema, Task

Vectors = dict[str, Any]
Towers = Callable[[Any, Any, Sequence[Task], ModelConfig], tuple[Vectors, Vectors]]


@keras.saving.register_keras_serializable(package="mvke_tf")
class TwoTowerModel(MultiTaskModel):
    """A model `{feature: tensor} -> {task: output (B, 1)}` of a user tower and an item tower.

    Outputs are logits of binary tasks, values of regression tasks, logarithms of the rates of count tasks, and the
    logits `(B, C)` of the classes of multi-class tasks. `build_model` makes such a model, `load_model`
    loads one, and all models below are parts of it, which share its weights.
    """

    # Of binary tasks, what makes calibrated logits of their outputs: `predictions` applies it. Not part of the file.
    calibration: Mapping[str, LogitMap] = MappingProxyType({})

    # === Tasks ===

    @cached_property
    def _heads(self) -> dict[str, RowDot | JointLogit]:
        """The layer that puts a task out."""
        layers = {layer.name: layer for layer in self.layers}
        found = {task: layers.get(task) for task in self.output}
        heads = {task: head for task, head in found.items() if isinstance(head, (RowDot, JointLogit))}
        wrong = [task for task in found if task not in heads]
        if wrong:
            raise ValueError(
                "Every output of a two-tower model must come from a head of its name, as `score` makes them. "
                f"Received: {wrong} without one in {self.name!r}"
            )
        return heads

    @cached_property
    def _dots(self) -> dict[str, RowDot]:
        """The layer in which the vectors of a task meet: its head, or the one given the event before it."""
        joint = {task: head for task, head in self._heads.items() if isinstance(head, JointLogit)}
        return self._heads | {task: self.get_layer(_conditional(task, head.given)) for task, head in joint.items()}

    @property
    def kinds(self) -> dict[str, str]:
        """`{task: kind}`, one of `mvke_tf.schema.TASK_KINDS`: what an output is."""
        return {task: head.kind for task, head in self._heads.items()}

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """`{multi-class task: names of its classes}`."""
        return {task: head.classes for task, head in self._heads.items() if isinstance(head, ClassHead)}

    @property
    def class_weights(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """`{multi-class task: vectors (C, W_task) and biases (C,) of its classes}`."""
        heads = {task: self._heads[task] for task in self.classes}
        convert = keras.ops.convert_to_numpy
        return {task: (convert(head.class_vectors), convert(head.class_biases)) for task, head in heads.items()}

    @property
    def ranked_tasks(self) -> tuple[str, ...]:
        """The tasks that rank items: those whose output is one number per pair, all but the multi-class ones."""
        return tuple(task for task in self.task_names if task not in self.classes)

    def check_ranked(self, tasks: Sequence[str]) -> None:
        """Does nothing if items can be ranked by each of the tasks.

        Raises:
            ConfigError: If one is a multi-class task, or none is left.
        """
        if not tasks or (wrong := [task for task in tasks if task in self.classes]):
            raise ConfigError(
                "Items are ranked by one number per pair, and a multi-class task has one per class; expected some of "
                f"the tasks {list(self.ranked_tasks)}. Received: {wrong if tasks else []}"
            )

    @property
    def given(self) -> dict[str, str]:
        """`{task: task whose event comes before it}`, of the tasks whose output is the joint logit of both."""
        return {task: head.given for task, head in self._heads.items() if isinstance(head, JointLogit)}

    @property
    def transforms(self) -> dict[str, str | None]:
        """`{task: "log1p" or None}`: the scale of the outputs; `predictions` undoes it."""
        return {task: getattr(head, "transform", None) for task, head in self._heads.items()}

    @property
    def offsets(self) -> dict[str, float]:
        """`{regression or count task: what is added to the inner product}`."""
        return {task: head.offset for task, head in self._heads.items() if isinstance(head, RegressionHead)}

    @property
    def schema_tasks(self) -> tuple[Task, ...]:
        """The tasks as the model has them; `domain`, which only labels have, is left out."""
        tasks = []
        for name, head in self._heads.items():
            settings: dict[str, Any] = {"kind": head.kind}
            if isinstance(head, RegressionHead):
                settings |= {"offset": head.offset, "transform": head.transform}
            if isinstance(head, ClassHead):
                settings |= {"classes": head.classes}
            if isinstance(head, JointLogit):
                settings |= {"given": head.given, "objective": head.objective}
            kernels = self.kernels_of(name)
            settings |= {"kernels": kernels} if kernels else {"experts": self.experts_of(name) or None}
            tasks.append(Task(name, **settings))
        return tuple(tasks)

    # === Parts ===

    def _vectors(self, side: str) -> Vectors:
        """The symbolic vectors of one side, `{task: (B, W_task)}`."""
        return {task: dot.input[0 if side == "user" else 1] for task, dot in self._dots.items()}

    @cached_property
    def user_tower(self) -> keras.Model:
        """`{user feature: tensor} -> {task: vector (B, W_task)}`."""
        return self.part(self._vectors("user"), "user_tower")

    @cached_property
    def item_tower(self) -> keras.Model:
        """`{item feature: tensor} -> {task: vector (B, W_task)}`."""
        return self.part(self._vectors("item"), "item_tower")

    @cached_property
    def conditional(self) -> keras.Model | None:
        """`{feature: tensor} -> {task: logit given the event before it (B, 1)}`; None without such a task."""
        logits = {task: self._dots[task].output for task in self.given}
        return self.part(logits, "conditional") if logits else None

    def _mixtures(self) -> dict[str, Mixture]:
        users, items, mixtures = self._vectors("user"), self._vectors("item"), {}
        for task in self._heads:
            (mix, mixed), (tag, tagged) = source(users[task]), source(items[task])
            if isinstance(mix, MixExperts):
                mixtures[task] = Mixture("user", mixed[1] if len(mixed) > 1 else None, mixed[0], mix.experts)
            elif isinstance(tag, GatedTag) and isinstance(mix, SelectExperts):
                kernels = isinstance(source(tagged[1])[0], VirtualKernelGate)
                # A task with one virtual kernel has nothing to choose: its gate is 1.
                gate = tagged[1] if len(mix.indices) > 1 else None
                mixtures[task] = Mixture("item", gate, mixed[0], mix.indices, kernels)
        return mixtures

    @cached_property
    def tags(self) -> keras.Model:
        """`{item feature: tensor} -> {task: (B, D)}`: what each expert output is multiplied with.

        In MVKE these are the vectors that the gate compares with the virtual kernels, otherwise the item vectors.
        """
        tags = {}
        for task, vector in self._vectors("item").items():
            layer, inputs = source(vector)
            tags[task] = inputs[0] if isinstance(layer, GatedTag) else vector
        return self.part(tags, "tags")

    @cached_property
    def field_attention(self) -> keras.Model | None:
        """`{user feature: tensor} -> (B, F, K)`, the attention of MVKE, which sums to 1 over the fields F."""
        layer = self._find(VirtualKernelAttention)
        return None if layer is None else self.part(layer.output[1], "field_attention")

    @property
    def user_fields(self) -> tuple[str, ...]:
        """Names of the user features in the order of the field axis."""
        return self.get_layer("user_fields").fields

    @property
    def virtual_kernels(self) -> np.ndarray | None:
        """The virtual kernels of MVKE, `(K, D)`."""
        layer = self._find(VirtualKernels)
        return None if layer is None else keras.ops.convert_to_numpy(layer.kernels)

    def _find(self, kind: type) -> Any:
        return next((layer for layer in self.layers if isinstance(layer, kind)), None)

    # === Scores ===

    def _through_heads(
        self,
        product: Callable[[RowDot, str], Any],
        conditional: Sequence[str] = (),
        tasks: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Outputs of all or some tasks, where `product` applies the head of one task to whatever its vectors are.

        The tasks in `conditional` give their logit given the event before, not the joint one.
        """
        outputs: dict[str, Any] = {}
        joint: dict[str, Any] = {}
        for task, head in self._heads.items():
            if tasks is not None and task not in tasks:
                continue
            outputs[task] = joint[task] = product(self._dots[task], task)
            if isinstance(head, JointLogit):
                joint[task] = head(joint[head.given], outputs[task])
                if task not in conditional:
                    outputs[task] = joint[task]
        return outputs

    def products(self, users: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, Any]:
        """Products of vectors `{task: (..., W_task)}` of users and items, `{task: (...)}`; multi-class `(..., C)`."""
        return {task: self._dots[task].product(users[task], items[task]) for task in users}

    def outputs_of_products(self, products: Mapping[str, Any], conditional: bool = False) -> dict[str, Any]:
        """The outputs for given inner products of user and item vectors, elementwise.

        Args:
            products: `{task: tensor}` of any one shape, for example `users @ items.T`, of tasks and with them of those
                whose event comes before; of a multi-class task with one more axis, of the classes.
            conditional: Whether the tasks in `given` give their logit given the event before, not the joint one.

        Returns:
            `{task: tensor}` of that shape, as the model puts them out.
        """
        return self._through_heads(
            lambda head, task: head.from_product(products[task]), tuple(self.given) if conditional else (), products
        )

    def predictions(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Probabilities of binary and multi-class tasks, and values and rates of the others, in the unit of the label.

        Those of binary tasks in `calibration` are calibrated.

        Args:
            outputs: `{task: tensor}` of any tasks, as the model or `outputs_of_products` puts them out.
        """
        calibrated = {task: self.calibration[task](outputs[task]) for task in outputs if task in self.calibration}
        return {task: self._heads[task].prediction(calibrated.get(task, output)) for task, output in outputs.items()}

    def for_tasks(self, tasks: Sequence[str]) -> TwoTowerModel:
        """The part of this model that some tasks need, tasks of earlier events included.

        Raises:
            ConfigError: If the model has no such task, or none is named.
        """
        unknown = [task for task in tasks if task not in self.task_names]
        if unknown or not tasks:
            raise ConfigError(
                f"Expected tasks of the model {self.name!r}, which are {list(self.task_names)}. Received: {list(tasks)}"
            )
        needed = set(tasks)
        for task in reversed(self.task_names):
            if task in needed and task in self.given:
                needed.add(self.given[task])
        outputs = {task: self._heads[task].output for task in self.task_names if task in needed}
        model = TwoTowerModel(self.part(outputs).input, outputs, name=self.name)
        model.calibration = {task: each for task, each in self.calibration.items() if task in needed}
        return model

    # === Training ===

    def training_model(
        self,
        deduplicate: bool = True,
        conditional: bool | None = None,
        risk: Callable[[str, str], CounterfactualRisk] | None = None,
        softmax: Callable[[str], InBatchSoftmax] | None = None,
    ) -> MultiTaskModel:
        """A model to compile and train, which shares its weights with this one, to be saved uncompiled.

        With `deduplicate` it takes the features of U distinct users and I distinct items, and two more inputs,
        `user_rows` and `item_rows` `(B,)`, that say which of them each pair of the batch consists of. Outputs equal
        those of this model on the B pairs; a tower runs once per distinct row.

        Args:
            deduplicate: Whether it takes batches of distinct users and items.
            conditional: Whether the tasks in `given` put out their logit given the event before, to learn from the rows
                with that event only. By default those do whose objective is `"conditional"`.
            risk: Makes the `CounterfactualRisk` of a task from its name and that of the event before it, for all tasks
                that put out the joint logit.
            softmax: Makes the `InBatchSoftmax` of a task from its name, for all binary tasks without an event before
                them. The model then has one more input, `item_sampling`, with the features of the items.
        """
        if conditional is None:
            chosen = tuple(task.name for task in self.schema_tasks if task.objective == "conditional")
        else:
            chosen = tuple(self.given) if conditional else ()
        inputs, users, items = dict(self.input), self._vectors("user"), self._vectors("item")
        if softmax is not None:
            inputs[ITEM_SAMPLING] = sampling = keras.Input((2,), name=ITEM_SAMPLING)
        if deduplicate:
            rows = {name: keras.Input((), dtype="int32", name=name) for name in (USER_ROWS, ITEM_ROWS)}
            inputs |= rows
            users = _gathered(users, rows[USER_ROWS], "user")
            items = _gathered(items, rows[ITEM_ROWS], "item")
            if softmax is not None:
                sampling = GatherRows(name=f"item_rows_{ITEM_SAMPLING}")(sampling, rows[ITEM_ROWS])
            outputs = self._through_heads(lambda head, task: head(users[task], items[task]), chosen)
        else:
            outputs = {
                task: self._dots[task].output if task in chosen else head.output for task, head in self._heads.items()
            }
        added: dict[str, Any] = {}
        if risk is not None:
            for task, given in self.given.items():
                if task not in chosen:
                    layer, (first, logit) = risk(task, given), source(outputs[task])[1]
                    added[layer.name] = layer(first, logit, *source(logit)[1])
        if softmax is not None:
            for task, kind in self.kinds.items():
                if kind == "binary" and task not in self.given:
                    of_task = softmax(task)
                    added[of_task.name] = of_task(users[task], items[task], sampling)
        if self.log_variances is not None:
            outputs = self.log_variances(outputs)
        return MultiTaskModel(inputs, {**outputs, **added}, name=f"{self.name}_training")


def _gathered(vectors: Vectors, rows: Any, side: str) -> Vectors:
    return {task: GatherRows(name=f"{side}_rows_{task}")(vector, rows) for task, vector in vectors.items()}


def _conditional(task: str, given: str) -> str:
    """Name of the head of a task given the event of another."""
    return f"{task}_given_{given}"


# === Building blocks ===


def build_two_tower(
    schema: Schema, config: ModelConfig | None, towers: Towers, name: str = "two_tower", embeddings: int = 1
) -> TwoTowerModel:
    """A model from a function that builds its two towers.

    Args:
        schema: Features and tasks.
        config: Shape of the model; the default shape if None.
        towers: From user fields `(B, F, D)`, item fields `(B, F', D)`, tasks and config to the vectors of users and
            those of items, `{task: (B, W_task)}` each.
        name: Name of the model.
        embeddings: Embeddings of width D that every field has, side by side.

    Raises:
        ValueError: If a tower reads features of the other side.
    """
    config = dataclasses.replace(config or ModelConfig(), name=name)
    tasks = with_ranges(schema.tasks, config)
    inputs = feature_inputs(schema.features)
    fields = embed_fields(schema, dataclasses.replace(config, embedding_dim=config.embedding_dim * embeddings), inputs)
    user_vectors, item_vectors = towers(fields["user"], fields["item"], tasks, config)
    try:
        model = TwoTowerModel(inputs, score(user_vectors, item_vectors, tasks), name=name)
    except ValueError as error:
        if (taken := re.search(r'The name "(.+?)" is used', str(error))) is None:
            raise
        raise ConfigError(
            f"A layer of {name!r} has the name of a feature or of a task: give that another name. "
            f"Received: {taken[1]!r}"
        ) from error
    both = sorted(set(model.user_tower.input) & set(model.item_tower.input))
    if both:
        raise ValueError(f"The towers of {name!r} must read different features. Received: both read {both}")
    return model


def feature_inputs(features: Sequence[Feature]) -> dict[str, Any]:
    """Symbolic inputs: int32 `(B,)` or `(B, L)` indices, float32 `(B, L)` weights, float32 `(B, W)` dense vectors."""
    inputs = {}
    for feature in features:
        if feature.is_dense:
            inputs[feature.name] = keras.Input((feature.width,), dtype="float32", name=feature.name)
            continue
        shape = () if feature.length == 1 else (feature.length,)
        inputs[feature.name] = keras.Input(shape, dtype="int32", name=feature.name)
        if feature.length > 1:
            weights = feature.name + WEIGHTS_SUFFIX
            inputs[weights] = keras.Input(shape, dtype="float32", name=weights)
    return inputs


def embed_fields(schema: Schema, config: ModelConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Field embeddings of both towers, `{tower: (B, F, D)}`.

    A field of indices is looked up in an embedding table, which features may share; a dense one goes through a linear
    layer of its own.
    """

    def normal() -> keras.initializers.Initializer:
        return keras.initializers.RandomNormal(stddev=config.embedding_stddev)

    embed: dict[str, keras.Layer] = {}
    for feature in schema.features:
        name = f"embedding_{feature.name}"
        if feature.is_dense:
            # A bias like an embedding: without one, a value of 0 would be a zero vector, which has no direction.
            embed[feature.name] = keras.layers.Dense(
                config.embedding_dim, kernel_initializer=normal(), bias_initializer=normal(), name=name
            )
        elif feature.embedding is None:
            embed[feature.name] = FieldEmbedding(
                feature.vocabulary_size, config.embedding_dim, embeddings_initializer=normal(), name=name
            )
    inputs = dict(inputs)
    groups: dict[str, list[Feature]] = {}
    for feature in schema.features:
        if feature.unknown_rate:
            groups.setdefault(feature.unknown_group or feature.name, []).append(feature)
    for group, members in groups.items():
        replace = ReplaceByUnknown(members[0].unknown_rate, name=f"unknown_{group}")
        inputs |= dict(zip([f.name for f in members], replace([inputs[f.name] for f in members]), strict=True))
    fields = {}
    for tower in ("user", "item"):
        features = schema.of_tower(tower)
        embedded = [embed[feature.table](*(inputs[name] for name in feature.inputs)) for feature in features]
        fields[tower] = StackFields([feature.name for feature in features], name=f"{tower}_fields")(embedded)
        if config.embedding_dropout_rate:
            dropout = keras.layers.Dropout(config.embedding_dropout_rate, name=f"{tower}_fields_dropout")
            fields[tower] = dropout(fields[tower])
    return fields


def tag_vectors(
    item_fields: Any, tasks: Sequence[Task], config: ModelConfig, name: str = "item_vector_{task}"
) -> Vectors:
    """The published tag tower: one MLP per task on the flattened item fields `(B, F, D)`, `{task: (B, D)}`.

    `name` is the pattern of the names of the layers that put the vectors out.
    """
    return task_networks(item_fields, tasks, config, "tag_towers", name)


def task_networks(fields: Any, tasks: Sequence[Task], config: ModelConfig, networks: str, vector: str) -> Vectors:
    """One MLP per task on the flattened fields `(B, F, D)`, as one layer of the name `networks`: `{task: (B, D)}`."""
    flat = keras.layers.Flatten(name=f"{networks}_input")(fields)
    outputs = Experts(
        len(tasks), config.hidden_dims, config.embedding_dim, dropout_rate=config.dropout_rate, name=networks
    )(flat)
    return {
        task.name: SelectExperts((index,), name=vector.format(task=task.name))(outputs)
        for index, task in enumerate(tasks)
    }


def score(user_vectors: Vectors, item_vectors: Vectors, tasks: Sequence[Task]) -> dict[str, Any]:
    """The scoring heads by kind of task, `{task: (B, 1)}` (multi-class `(B, C)`), float32 under every dtype policy."""
    outputs: dict[str, Any] = {}
    for task in tasks:
        vectors, earlier = (user_vectors[task.name], item_vectors[task.name]), task.factorised_by
        if task.kind == "multiclass":
            outputs[task.name] = ClassHead(task.classes, name=task.name, dtype="float32")(*vectors)
        elif task.kind == "count":
            outputs[task.name] = CountHead(task.offset, name=task.name, dtype="float32")(*vectors)
        elif task.kind == "regression":
            outputs[task.name] = RegressionHead(task.offset, task.transform, name=task.name, dtype="float32")(*vectors)
        elif earlier is None:
            outputs[task.name] = RowDot(name=task.name, dtype="float32")(*vectors)
        else:
            conditional = RowDot(name=_conditional(task.name, earlier), dtype="float32")(*vectors)
            joint = JointLogit(earlier, task.objective, name=task.name, dtype="float32")
            outputs[task.name] = joint(outputs[earlier], conditional)
    return outputs


def with_ranges(tasks: Sequence[Task], config: ModelConfig) -> tuple[Task, ...]:
    """The tasks with the kernels and experts that the settings state for them; those of others stay as they are.

    Raises:
        ConfigError: If the settings state them for another number of tasks.
    """
    names = config.tasks or tuple(task.name for task in tasks)
    config.check_tasks(names)
    kernels = dict(zip(names, map(index_range, config.task_kernels), strict=False))
    experts = dict(zip(names, map(index_range, config.task_experts), strict=False))
    return tuple(
        dataclasses.replace(
            task, kernels=kernels.get(task.name, task.kernels), experts=experts.get(task.name, task.experts)
        )
        for task in tasks
    )
