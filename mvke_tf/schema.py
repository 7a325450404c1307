"""What the columns are, which tower reads them, and what is predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from mvke_tf.config import from_dict

TOWERS = ("user", "item")
TASK_KINDS = ("binary", "regression")
WEIGHTS_SUFFIX = "_weights"
# Inputs of a batch of distinct entities: which user and which item each pair consists of.
USER_ROWS, ITEM_ROWS = "user_rows", "item_rows"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One field of one tower, as integers: index 0 means "unknown".

    Args:
        name: Name of the model input. A multi-valued feature has a second input, `<name>_weights`.
        tower: `"user"` or `"item"`.
        vocabulary_size: Number of indices, the unknown index 0 included.
        length: 1 for a single value; above 1 the number of slots of a multi-valued feature,
            in which a slot with weight 0 is empty. Give an empty list as one slot of index 0 and weight 1, as
            `mvke_tf.data.features.Encoder` does: a zero vector has no direction for a layer norm.
        embedding: Name of the feature whose embedding table this one shares; its own by default.
        unknown_rate: Share of the rows in which training replaces this feature by "unknown", so that index 0 is a
            trained embedding and not a random one. Single-valued features only.
        unknown_group: Features of one group, all of one tower and one rate, are replaced together: what is unknown
            together later (of a new item its id, its popularity and its mean rating) is so while training.
    """

    name: str
    tower: str
    vocabulary_size: int
    length: int = 1
    embedding: str | None = None
    unknown_rate: float = 0.0
    unknown_group: str | None = None

    def __post_init__(self) -> None:
        if self.tower not in TOWERS:
            raise ValueError(f"Feature {self.name!r}: `tower` must be one of {TOWERS}. Received: {self.tower!r}")
        if self.vocabulary_size < 1 or self.length < 1:
            raise ValueError(
                f"Feature {self.name!r}: `vocabulary_size` and `length` must be at least 1. "
                f"Received: vocabulary_size={self.vocabulary_size}, length={self.length}"
            )
        if not 0.0 <= self.unknown_rate <= 1.0:
            raise ValueError(f"Feature {self.name!r}: `unknown_rate` must lie in [0, 1]. Received: {self.unknown_rate}")

        if self.unknown_rate and self.length > 1:
            raise ValueError(
                f"Feature {self.name!r}: `unknown_rate` is for single-valued features. Received: length={self.length}"
            )

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
        kind: `"binary"` (label 0 or 1) or `"regression"`.
        given: Name of the binary task whose event must come first, as a click before a conversion. The model then
            learns p(task given that event) and puts out p(event) · p(task given the event), ESMM's idea (Ma et al.,
            SIGIR 2018).
        offset: Regression only: what the model adds to its inner product, for example the mean label, so that training
            starts from there.
        domain: Regression only: the lowest and the highest legal label; any by default.
        kernels: Indices of the virtual kernels that this task may select (MVKE), for example
            `(0, 1, 2)`. By default they follow `mvke_tf.models.mvke.default_kernels`.
        experts: Indices of the experts that this task sees (MMoE, CGC), for example `(0, 1, 2, 3, 4, 5)`; by default
            all of them in MMoE, and those of `mvke_tf.models.mmoe.cgc_experts` in CGC.
    """

    name: str
    kind: str = "binary"
    given: str | None = None
    offset: float = 0.0
    domain: tuple[float, float] | None = None
    kernels: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in TASK_KINDS:
            raise ValueError(f"Task {self.name!r}: `kind` must be one of {TASK_KINDS}. Received: {self.kind!r}")
        if self.kind == "regression" and self.given is not None:
            raise ValueError(f"Task {self.name!r}: `given` is for binary tasks. Received: {self.given!r}")
        if self.kind == "binary" and (self.offset or self.domain is not None):
            raise ValueError(
                f"Task {self.name!r}: `offset` and `domain` are for regression tasks. "
                f"Received: offset={self.offset}, domain={self.domain}"
            )
        for name in ("kernels", "experts", "domain"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.domain is not None and (len(self.domain) != 2 or not self.domain[0] < self.domain[1]):
            raise ValueError(
                f"Task {self.name!r}: `domain` must be the lowest and the highest legal label. Received: {self.domain}"
            )
        if self.domain is not None and self.offset and not self.domain[0] <= self.offset <= self.domain[1]:
            raise ValueError(
                f"Task {self.name!r}: `offset` must lie in the domain {self.domain}. Received: {self.offset}"
            )


CTR_CVR = (Task("ctr"), Task("cvr"))
"""The published pair of tasks. Of five virtual kernels CTR sees 0 to 2 and CVR 1 to 4 (`default_kernels`)."""


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
    tasks: tuple[Task, ...] = CTR_CVR

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        _check_unique("feature", (feature.name for feature in self.features))
        _check_unique("task", (task.name for task in self.tasks))
        if both := sorted({name for feature in self.features for name in feature.inputs} & set(self.task_names)):
            raise ValueError(f"A task and a feature (or its weights) need different names. Received twice: {both}")
        for number, task in enumerate(self.tasks):
            earlier = [other.name for other in self.tasks[:number] if other.kind == "binary"]
            if task.given is not None and task.given not in earlier:
                raise ValueError(
                    f"Task {task.name!r}: `given` must name a binary task before it, one of {earlier}. "
                    f"Received: {task.given!r}"
                )
        if not self.tasks:
            raise ValueError("A schema needs at least one task. Received: no task")
        for tower in TOWERS:
            if not self.of_tower(tower):
                raise ValueError(f"The {tower} tower needs at least one feature. Received: {self.features}")
        by_name = {feature.name: feature for feature in self.features}
        for feature in self.features:
            owner = by_name.get(feature.table)
            if owner is None or owner.embedding is not None:
                tables = sorted(name for name, other in by_name.items() if other.embedding is None)
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

    def to_dict(self) -> dict:
        """A dictionary that JSON can hold; `Schema.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Schema:
        """Reads what `to_dict` wrote."""
        return cls(
            features=tuple(from_dict(Feature, feature) for feature in values["features"]),
            tasks=tuple(from_dict(Task, task) for task in values["tasks"]),
        )
