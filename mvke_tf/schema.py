# SPDX-License-Identifier: Apache-2.0
"""What a model reads and predicts: encoded features of two towers, and tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from mvke_tf.config import OBJECTIVES, from_dict

TOWERS = ("user", "item")
TASK_KINDS = ("binary", "regression", "count", "multiclass")
TRANSFORMS = ("log1p",)
WEIGHTS_SUFFIX = "_weights"
# The dense field derived from a list with weights: its mean weight and its length.
SUMMARY_SUFFIX = "_summary"
# Inputs of a batch of distinct entities: which user and which item each pair consists of.
USER_ROWS, ITEM_ROWS = "user_rows", "item_rows"
# Of each item of a training batch the logarithm of its share of the rows, and its number.
ITEM_SAMPLING = "item_sampling"
# The field of an item side without features: one index for every row.
CONSTANT_ITEM = "constant_item"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One encoded field of one tower: indices into an embedding table, or a dense vector.

    Args:
        name: Name of the model input. A multi-valued feature has a second input, `<name>_weights`.
        tower: `"user"` or `"item"`.
        vocabulary_size: Number of indices, the unknown index 0 included; 0 of a dense feature.
        length: 1 for a single value; above 1 the number of slots of a multi-valued feature,
            in which a slot with weight 0 is empty. Give an empty list as one slot of index 0 and weight 1, as
            `mvke_tf.data.encoder.Encoder` does: a zero vector has no direction for a layer norm.
        width: Entries of a dense feature, float32; 0 of a feature of indices. The first entry is 1 where the value is
            unknown, and then all others are 0.
        embedding: Name of the feature whose embedding table this one shares; its own by default.
        unknown_rate: Share of the rows in which training replaces this feature by "unknown", so that "unknown" is
            trained and not random. Single-valued and dense features only.
        unknown_group: Features of one group, all of one tower and one rate, are replaced together: what is unknown
            together later (of a new item its id and its statistics) is so while training.
    """

    name: str
    tower: str
    vocabulary_size: int = 0
    length: int = 1
    width: int = 0
    embedding: str | None = None
    unknown_rate: float = 0.0
    unknown_group: str | None = None

    def __post_init__(self) -> None:
        if self.tower not in TOWERS:
            raise ValueError(f"Feature {self.name!r}: `tower` must be one of {TOWERS}. Received: {self.tower!r}")
        if (self.vocabulary_size < 1) == (self.width < 1) or min(self.vocabulary_size, self.width) < 0:
            raise ValueError(
                f"Feature {self.name!r}: either `vocabulary_size` or `width` must be at least 1, the other 0. "
                f"Received: vocabulary_size={self.vocabulary_size}, width={self.width}"
            )
        if self.length < 1 or (self.width and self.length > 1):
            raise ValueError(
                f"Feature {self.name!r}: `length` must be at least 1, and 1 of a dense feature. "
                f"Received: length={self.length}, width={self.width}"
            )
        if self.width and self.embedding is not None:
            raise ValueError(
                f"Feature {self.name!r}: a dense feature has no embedding table to share. "
                f"Received: embedding={self.embedding!r}"
            )
        if not 0.0 <= self.unknown_rate <= 1.0:
            raise ValueError(f"Feature {self.name!r}: `unknown_rate` must lie in [0, 1]. Received: {self.unknown_rate}")
        if self.unknown_rate and self.length > 1:
            raise ValueError(
                f"Feature {self.name!r}: `unknown_rate` is for single-valued features. Received: length={self.length}"
            )

    @property
    def is_dense(self) -> bool:
        """Whether this is a dense vector."""
        return self.width > 0

    @property
    def table(self) -> str:
        """Name of the feature that owns the embedding table."""
        return self.embedding or self.name

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the model inputs that carry this feature."""
        return (self.name,) if self.length == 1 else (self.name, self.name + WEIGHTS_SUFFIX)


@dataclasses.dataclass(frozen=True)
class Task:
    """One objective.

    Args:
        name: Name of the model output and of the label.
        kind: `"binary"` (label 0 or 1), `"regression"`, `"count"` (label 0, 1, 2, ...: the model learns a Poisson rate)
            or `"multiclass"` (label: index of one of `classes`).
        classes: Names of the classes of a multi-class task, two or more, in the order of the labels.
        given: Name of the binary task whose event comes first, as a click before a conversion.
        objective: How a task with `given` is learned: over all rows as p(event) · p(task given the event), ESMM's idea
            (Ma et al., SIGIR 2018; `"joint"`); p(task given the event) on the rows with that event only
            (`"conditional"`), put out as that product where the model has the other task; or over all rows as one
            probability, as if there were no event before (`"marginal"`). Without influence on other tasks.
        offset: Regression and count: what the model adds to its inner product, for example the mean label (count: the
            logarithm of it), so that training starts from there.
        domain: Regression only: the lowest and the highest legal label; any by default.
        transform: Regression only: `"log1p"` if the model learns log(1 + label); serving and reports undo it.
        kernels: Indices of the virtual kernels that this task may select (MVKE), for example
            `(0, 1, 2)`. By default they follow `mvke_tf.models.mvke.default_kernels`.
        experts: Indices of the experts that this task sees (MMoE, CGC), for example `(0, 1, 2, 3, 4, 5)`; by default
            all of them in MMoE, and those of `mvke_tf.models.mmoe.cgc_experts` in CGC.
    """

    name: str
    kind: str = "binary"
    classes: tuple[str, ...] = dataclasses.field(default=(), metadata={"entries": str})
    given: str | None = None
    objective: str = "joint"
    offset: float = 0.0
    domain: tuple[float, float] | None = None
    transform: str | None = None
    kernels: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, legal in (("kind", TASK_KINDS), ("objective", OBJECTIVES), ("transform", (None, *TRANSFORMS))):
            if getattr(self, name) not in legal:
                raise ValueError(
                    f"Task {self.name!r}: `{name}` must be one of {legal}. Received: {getattr(self, name)!r}"
                )
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.kind != "binary" and self.given is not None:
            raise ValueError(f"Task {self.name!r}: `given` is for binary tasks. Received: {self.given!r}")
        if self.kind != "regression" and (self.domain is not None or self.transform):
            raise ValueError(
                f"Task {self.name!r}: `domain` and `transform` are for regression tasks. "
                f"Received: domain={self.domain}, transform={self.transform}"
            )
        if self.kind not in ("regression", "count") and self.offset:
            raise ValueError(f"Task {self.name!r}: `offset` is for regression and count tasks. Received: {self.offset}")
        if (self.kind == "multiclass") != (len(self.classes) > 1) or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"Task {self.name!r}: `classes` are two or more different names of a multi-class task, of no other. "
                f"Received: kind={self.kind!r}, classes={self.classes}"
            )
        for name in ("kernels", "experts", "domain"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.domain is not None and (len(self.domain) != 2 or not self.domain[0] < self.domain[1]):
            raise ValueError(
                f"Task {self.name!r}: `domain` must be the lowest and the highest legal label. Received: {self.domain}"
            )

    @property
    def factorised_by(self) -> str | None:
        """The task whose probability this one's is multiplied with; None where it is learned as one probability."""
        return None if self.objective == "marginal" else self.given


def _check_unique(kind: str, names: Iterable[str]) -> None:
    names = list(names)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Every {kind} needs a name of its own. Received twice: {repeated}")


@dataclasses.dataclass(frozen=True)
class Schema:
    """Features and tasks of one problem.

    Args:
        features: Fields of both towers; their order is the order of the field axis.
        tasks: What is predicted.
    """

    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        _check_unique("feature", (feature.name for feature in self.features))
        _check_unique("task", (task.name for task in self.tasks))
        if both := sorted({name for feature in self.features for name in feature.inputs} & set(self.task_names)):
            raise ValueError(f"A task and a feature (or its weights) need different names. Received twice: {both}")
        if not self.tasks:
            raise ValueError("A schema needs at least one task. Received: no task")
        for number, task in enumerate(self.tasks):
            earlier = [other.name for other in self.tasks[:number] if other.kind == "binary"]
            if task.given is not None and task.given not in earlier:
                raise ValueError(
                    f"Task {task.name!r}: `given` must name a binary task before it, one of {earlier}. "
                    f"Received: {task.given!r}"
                )
        for tower in TOWERS:
            if not self.of_tower(tower):
                raise ValueError(f"The {tower} tower needs at least one feature. Received: {self.features}")
        by_name = {feature.name: feature for feature in self.features}
        for feature in self.features:
            if feature.is_dense:
                continue
            owner = by_name.get(feature.table)
            if owner is None or owner.embedding is not None or owner.is_dense:
                tables = sorted(name for name, other in by_name.items() if not other.embedding and not other.is_dense)
                raise ValueError(
                    f"Feature {feature.name!r}: `embedding` must name a feature that owns a table. "
                    f"Received: {feature.embedding!r}; tables: {tables}"
                )
            if owner.vocabulary_size != feature.vocabulary_size:
                raise ValueError(
                    f"Feature {feature.name!r} shares the table of {owner.name!r} and needs its vocabulary_size "
                    f"{owner.vocabulary_size}. Received: {feature.vocabulary_size}"
                )

        groups: dict[str, Feature] = {}
        for feature in self.features:
            first = groups.setdefault(feature.unknown_group or feature.name, feature)
            if (first.tower, first.unknown_rate) != (feature.tower, feature.unknown_rate):
                raise ValueError(
                    f"Features of the unknown_group {feature.unknown_group!r} need one tower and one unknown_rate. "
                    f"Received: {first} and {feature}"
                )

    def of_tower(self, tower: str) -> tuple[Feature, ...]:
        """The features that the `"user"` or the `"item"` tower reads."""
        return tuple(feature for feature in self.features if feature.tower == tower)

    def inputs(self, tower: str) -> tuple[str, ...]:
        """Names of the model inputs of one tower."""
        return tuple(name for feature in self.of_tower(tower) for name in feature.inputs)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(task.name for task in self.tasks)

    def with_tasks(self, tasks: Iterable[Task]) -> Schema:
        """The same features with other tasks."""
        return dataclasses.replace(self, tasks=tuple(tasks))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `Schema.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Schema:
        """Reads what `to_dict` wrote."""
        return cls(
            features=tuple(from_dict(Feature, feature) for feature in values["features"]),
            tasks=tuple(from_dict(Task, task) for task in values["tasks"]),
        )
