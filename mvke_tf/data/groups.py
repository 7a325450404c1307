# SPDX-License-Identifier: Apache-2.0
"""Groups of users or items, over which metrics and gate weights are broken down."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mvke_tf.data.declaration import Group
from mvke_tf.data.encoder import EncodedFeature, as_kind, known_values
from mvke_tf.data.store import PreparedDataset
from mvke_tf.data.values import short
from mvke_tf.errors import DeclarationError
from mvke_tf.schema import TOWERS, WEIGHTS_SUFFIX

logger = logging.getLogger(__name__)

UNKNOWN, OTHER = "unknown", "other"
# Most values of a feature that are one group each unless the declaration says otherwise, and groups of more values.
MOST_VALUES, TOP = 30, 20
QUANTILES = 4
# More bands than anyone reads: the step must be wrong.
MOST_BANDS = 1_000
# Numbers of a group of fewer rows, or of a smaller share of all rows, say little.
FEW_ROWS, SMALL_SHARE = 100, 0.01


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Groups of the entities of one side; an entity may be in several groups (an item in each of its tags).

    Args:
        variable: What the groups are values of, for example `"age"`.
        side: `"user"` or `"item"`.
        groups: Names of the groups, in the order in which they are shown.
        members: `(N, len(groups))` bool: which rows of the table of that side are in which group.
        description: Variable and unit, as an axis states them; the variable by default.

    Raises:
        ValueError: If side or shapes are something else.
    """

    variable: str
    side: str
    groups: tuple[str, ...]
    members: np.ndarray
    description: str = ""

    def __post_init__(self) -> None:
        if self.side not in TOWERS:
            raise ValueError(f"Grouping {self.variable!r}: `side` must be one of {TOWERS}. Received: {self.side!r}")
        if self.members.ndim != 2 or self.members.shape[1] != len(self.groups):
            raise ValueError(
                f"Grouping {self.variable!r}: `members` must be (rows, {len(self.groups)}). "
                f"Received: {self.members.shape}"
            )
        if not self.description:
            object.__setattr__(self, "description", self.variable)

    @classmethod
    def of_labels(
        cls, variable: str, side: str, labels: Sequence[str], order: Sequence[str] | None = None, description: str = ""
    ) -> Grouping:
        """Groups of equal labels, one label per row.

        Args:
            variable: See above.
            side: See above.
            labels: `(N,)`, the group of each row.
            order: Groups in order; by default those that occur, sorted.
            description: See above.
        """
        label = np.asarray(labels, str)
        groups = tuple(np.unique(label).tolist() if order is None else order)
        members = label[:, None] == np.asarray(groups, str)
        return cls(variable, side, groups, members, description)


def is_small(rows: Any, total: int) -> Any:
    """Whether groups have too few of all rows for their numbers to say much, elementwise."""
    return (rows < FEW_ROWS) | (rows < SMALL_SHARE * total)


def group_counts(inside: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """How many pairs of each group each entity of one side has.

    Args:
        inside: `(n, G)` bool: the groups in which each pair is, through its user or its item.
        rows: `(n,)`, the entity of each pair.
        size: Number E of entities.

    Returns:
        `(G, E)`.
    """
    counts = [np.bincount(rows, weights=column, minlength=size) for column in inside.T]
    return np.stack(counts) if counts else np.zeros((0, size))


def groups(prepared: PreparedDataset, sides: Sequence[str] = TOWERS) -> tuple[Grouping, ...]:
    """The groups that the declaration of a dataset names, over the rows of `prepared.users` or `prepared.items`.

    Without `[groups]`, those of each feature that is neither an id nor a history of values, in the order of the
    features: one group per value of at most 30 values, and quartiles of a number; a feature that has one group only is
    left out. Values that are unknown are the last group, "unknown".

    Args:
        prepared: The data.
        sides: Sides whose groups are wanted.

    Raises:
        DeclarationError: If bands are declared of a feature whose values are text, or too many; if one of the declared
            `values` is none that the feature can have.
    """
    dataset = prepared.dataset
    features = {feature.name: feature for feature in prepared.encoder.features}
    if dataset.groups is not None:
        grouped = [(features[group.feature], group) for group in dataset.groups]
        return tuple(_declared(prepared, feature, group) for feature, group in grouped if feature.tower in sides)
    found = []
    for declared in dataset.features:
        feature = features[declared.name]
        is_id = declared.source_column is not None and declared.source_column in (dataset.keys.user, dataset.keys.item)
        if (
            feature.tower not in sides
            or is_id
            or feature.raw == "vector"
            or (declared.history is not None and feature.is_list)
        ):
            continue
        values, known = _values(prepared, feature)
        if feature.raw != "number" and len(_distinct(values[known])[0]) > MOST_VALUES:
            continue
        grouping = _declared(prepared, feature, Group(feature.name, feature.name))
        if len(grouping.groups) > 1:
            found.append(grouping)
    return tuple(found)


def _declared(prepared: PreparedDataset, feature: EncodedFeature, group: Group) -> Grouping:
    values, known = _values(prepared, feature)
    if group.is_numeric or (feature.raw == "number" and not (group.values or group.top)):
        if feature.raw == "string":
            raise DeclarationError(
                f"{prepared.dataset.name}, [groups.{group.name}]: bands need a number, and the values of "
                f"{feature.name!r} are texts, such as {_example(values[known])!r}. Group by `values` or `top`."
            )
        code, labels = _bands(group, values.astype(np.float32), known, prepared.dataset.name)
    else:
        code, labels = _by_value(group, _wanted(group, feature, prepared.dataset.name), values, known)
    return _grouping(group, feature.tower, code, labels)


def _wanted(group: Group, feature: EncodedFeature, dataset: str) -> dict[Any, str]:
    """The declared values as the raw table has them, and what each is called."""
    wanted: dict[Any, str] = {}
    for value in group.values:
        raw = as_kind([value], feature.raw)
        if not raw:
            expected = {"integer": "whole numbers", "number": "numbers"}.get(feature.raw, "texts, not empty")
            raise DeclarationError(
                f"{dataset}, [groups.{group.name}]: `values` of the feature {feature.name!r} must be {expected}. "
                f"Received: {short(value)}"
            )
        # As float32 a number may be another one.
        stored = np.float32(raw[0]).item() if feature.raw == "number" else raw[0]
        wanted.setdefault(stored, _shown(raw[0]))
    return wanted


def _values(prepared: PreparedDataset, feature: EncodedFeature) -> tuple[np.ndarray, np.ndarray]:
    """Raw values `(N, L)`, and which of them are known."""
    table = prepared.users if feature.tower == "user" else prepared.items
    values = np.asarray(table.raw[feature.name])
    known = known_values(feature, values)
    if feature.is_list:
        return values, known & (np.asarray(table.raw[feature.name + WEIGHTS_SUFFIX]) > 0)
    return values[:, None], known[:, None]


def _example(values: np.ndarray) -> Any:
    return values[0] if len(values) else ""


def _grouping(group: Group, side: str, code: np.ndarray, labels: list[str]) -> Grouping:
    """Groups of slots `(N, L)`, -1 of an unknown one, as groups of entities."""
    members = np.zeros((len(code), len(labels)), bool)
    for number in range(len(labels)):
        members[:, number] = (code == number).any(axis=1)
    unknown: np.ndarray = np.all(code < 0, axis=1)
    if unknown.any():
        if UNKNOWN in labels:
            members[unknown, labels.index(UNKNOWN)] = True
        else:
            labels, members = [*labels, UNKNOWN], np.concatenate([members, unknown[:, None]], axis=1)
    return Grouping(group.name, side, tuple(labels), members, group.title or group.name)


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct values, sorted; of each value its position among them; and how often each occurs."""
    coded = pa.array(values).dictionary_encode()
    distinct = coded.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(distinct, kind="stable")
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    number = position[coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)]
    return distinct[order], number, np.bincount(number, minlength=len(order))


def _by_value(
    group: Group, wanted: dict[Any, str], values: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    distinct, number, count = _distinct(values[known])
    if group.values:
        position = {value: place for place, value in enumerate(distinct.tolist())}
        chosen, words = [position.get(value, -1) for value in wanted], list(wanted.values())
    elif group.top or len(distinct) > MOST_VALUES:
        chosen = np.argsort(-count, kind="stable")[: group.top or TOP].tolist()
        words = [_shown(distinct[place]) for place in chosen]
    else:
        chosen, words = list(range(len(distinct))), [_shown(value) for value in distinct]
    labels = list(words)
    # Values that are not chosen are the last group.
    of_value = np.full(len(distinct), len(chosen))
    for place, value in enumerate(chosen):
        if value >= 0:
            of_value[value] = place
    if (of_value == len(chosen)).any():
        labels.append(OTHER if OTHER not in words else f"all {OTHER}s")
    code = np.full(values.shape, -1)
    code[known] = of_value[number]
    return code, labels


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, (float, np.floating)) else str(value)


def _bands(group: Group, values: np.ndarray, known: np.ndarray, dataset: str) -> tuple[np.ndarray, list[str]]:
    code, numbers = np.full(values.shape, -1), values[known]
    whole = bool((numbers == np.floor(numbers)).all())
    if group.bounds:
        code[known] = np.digitize(numbers, np.asarray(group.bounds, np.float32))
        return code, _bound_labels(group.bounds, whole, bool((numbers < 0).any()))
    if not len(numbers):
        return code, []
    if group.step:
        # Neither float32 nor the division moves a value on a bound into the band below.
        with np.errstate(over="ignore"):
            band = np.floor(np.round(numbers.astype(np.float64) / group.step, 6))
        bands, code[known] = np.unique(band, return_inverse=True)
        if len(bands) > MOST_BANDS or not np.isfinite(bands).all():
            raise DeclarationError(
                f"{dataset}, [groups.{group.name}]: a `step` that makes at most {MOST_BANDS:,} bands of the values, "
                f"from {_shown(numbers.min())} to {_shown(numbers.max())}, is expected. Received: {group.step:g}, "
                f"which makes {len(bands):,}, or numbers that are too large"
            )
        return code, [_between(low * group.step, (low + 1) * group.step, whole) for low in bands.tolist()]
    edges = np.unique(np.quantile(numbers.astype(np.float64), np.linspace(0, 1, (group.quantiles or QUANTILES) + 1)))
    band = np.clip(np.searchsorted(edges, numbers, side="left") - 1, 0, None)
    bands, code[known] = np.unique(band, return_inverse=True)
    ends = [(numbers[band == place].min(), numbers[band == place].max()) for place in bands]
    return code, _range_labels(ends, whole)


def _range_labels(ends: Sequence[tuple[float, float]], whole: bool) -> list[str]:
    """Names of bands by their lowest and highest value, with as many digits as tell them apart."""
    labels: list[str] = []
    for digits in (4, 6, 9):
        texts = [[f"{end:.0f}" if whole else f"{end:.{digits}g}" for end in pair] for pair in ends]
        labels = [low if low == high else f"{low} to {high}" for low, high in texts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _bound_labels(bounds: Sequence[float], whole: bool, negative: bool) -> list[str]:
    first = "0" if bounds[0] == 1 and whole and not negative else f"below {bounds[0]:.9g}"
    between = [_between(low, high, whole) for low, high in itertools.pairwise(bounds)]
    return [first, *between, f"{bounds[-1]:.9g} and more"]


def _between(low: float, high: float, whole: bool) -> str:
    """The name of the band [low, high)."""
    if whole and float(low).is_integer() and float(high).is_integer():
        return f"{low:.0f}" if high == low + 1 else f"{low:.0f} to {high - 1:.0f}"
    return f"{low:.9g} to below {high:.9g}"
