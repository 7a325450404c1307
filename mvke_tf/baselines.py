"""Models without a neural network, on the same data as the others: popularity and gradient-boosted trees.

They say how much of a result is owed to the data alone. Both learn binary tasks, each task by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from mvke_tf.data.prepared import Prepared
from mvke_tf.evaluation import Report, measure
from mvke_tf.schema import WEIGHTS_SUFFIX

ROUNDS, EARLY_STOPPING_ROUNDS = 2000, 50
LIGHTGBM = {
    "objective": "binary",
    "metric": "auc",
    "learning_rate": 0.1,
    "num_leaves": 31,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "feature_fraction": 0.5,
    # One thread, so that no result depends on the machine, and none waits for a core that another process holds.
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What a baseline made of the data.

    Args:
        report: `{part: {task: {metric: value}}}`, as `mvke_tf.evaluation.evaluate_model` gives it.
        parameters: How many numbers were learned from the labels.
        rounds: Boosting rounds of all tasks together; 0 where nothing is boosted.
    """

    report: Report
    parameters: int
    rounds: int = 0


def check_baseline(name: str, prepared: Prepared, tasks: Sequence[str]) -> None:
    """Does nothing if there is a baseline of this name for these tasks, and what it needs is installed.

    Raises:
        ValueError: If a task is not binary, LightGBM is not installed, or there is no such baseline.
    """
    if name not in BASELINES:
        raise ValueError(f"Unknown baseline. Expected one of {sorted(BASELINES)}. Received: {name!r}")
    for task in tasks:
        if not np.isin(prepared.pairs[task], (0, 1)).all():
            raise ValueError(f"The baseline {name} is for binary tasks; leave it or the task out. Received: {task!r}")
    if name == "lightgbm":
        _lightgbm()


def run_baseline(name: str, prepared: Prepared, tasks: Sequence[str], parts: Sequence[str], seed: int = 0) -> Baseline:
    """Fits a baseline on the training part and measures it.

    Args:
        name: `"popularity"` or `"lightgbm"`.
        prepared: The data.
        tasks: Names of binary tasks.
        parts: The parts to measure it on.
        seed: Seed of LightGBM; popularity knows no chance.

    Raises:
        ValueError: As `check_baseline`.
    """
    check_baseline(name, prepared, tasks)
    return BASELINES[name](prepared, tasks, parts, seed)


def popularity(prepared: Prepared, tasks: Sequence[str], parts: Sequence[str], seed: int = 0) -> Baseline:
    """Scores an item by the number of times that the event of the task befell it in the training part.

    For clicks under the protocol `"impressions"` this is the number of its training impressions; for conversions it is
    that number times the item's conversion rate. A logistic regression on log(1 + number), fitted on the validation
    part, where no pair has counted itself, turns the number into a probability without changing the order of items.

    Args:
        prepared: The data.
        tasks: Names of binary tasks.
        parts: The parts to measure it on.
        seed: Without influence.
    """
    items = prepared.pairs["item_row"].to_numpy()
    rows = {part: prepared.part_rows(part) for part in {"train", "validation", *parts}}
    probabilities = {}
    for task in tasks:
        labels = prepared.pairs[task].to_numpy()
        events = items[rows["train"]][labels[rows["train"]] == 1]
        score = np.log1p(np.bincount(events, minlength=items.max() + 1))[:, None]
        calibration = LogisticRegression(C=1e6).fit(score[items[rows["validation"]]], labels[rows["validation"]])
        probabilities[task] = {part: calibration.predict_proba(score[items[rows[part]]])[:, 1] for part in parts}
    return Baseline(_report(prepared, probabilities, parts), len(tasks) * len(prepared.titles))


def lightgbm(prepared: Prepared, tasks: Sequence[str], parts: Sequence[str], seed: int = 0) -> Baseline:
    """LightGBM on `tabular_features`, one classifier per task; the validation AUC ends the boosting.

    Args:
        prepared: The data.
        tasks: Names of binary tasks.
        parts: The parts to measure it on.
        seed: Seed of the sampling of rows and columns.
    """
    library = _lightgbm()
    names, features, categorical = tabular_features(prepared)
    rows = {part: prepared.part_rows(part) for part in {"train", "validation", *parts}}
    training = features(rows["train"])
    _make_unknown(prepared, names, training, categorical, np.random.default_rng(seed))
    inputs = {part: features(rows[part]) for part in {"validation", *parts}}
    probabilities, leaves, rounds = {}, 0, 0
    for task in tasks:
        labels = prepared.pairs[task].to_numpy()
        data = library.Dataset(training, labels[rows["train"]], feature_name=names, categorical_feature=categorical)
        model = library.train(
            {**LIGHTGBM, "seed": seed},
            data,
            ROUNDS,
            valid_sets=[data.create_valid(inputs["validation"], labels[rows["validation"]])],
            callbacks=[library.early_stopping(EARLY_STOPPING_ROUNDS, verbose=False)],
        )
        trees = model.dump_model(num_iteration=model.best_iteration)["tree_info"]
        leaves, rounds = leaves + sum(tree["num_leaves"] for tree in trees), rounds + len(trees)
        probabilities[task] = {part: model.predict(inputs[part], num_iteration=model.best_iteration) for part in parts}
    return Baseline(_report(prepared, probabilities, parts), leaves, rounds)


BASELINES: dict[str, Callable[..., Baseline]] = {"popularity": popularity, "lightgbm": lightgbm}


def tabular_features(prepared: Prepared) -> tuple[list[str], Callable[[np.ndarray], np.ndarray], list[str]]:
    """The features of both towers as one table of numbers, nothing added.

    A quantity stays as it is (NaN if unknown); an id or a category is its encoded index (0 if unknown). A weighted list
    of categories (genres) becomes its total weight and the share of every category. A list of ids of the other side
    (recently rated items) becomes its length, its mean weight, and the weighted means of the columns of those items.

    Args:
        prepared: The data.

    Returns:
        Names of the columns; a function from positions in `prepared.pairs` to a table, float32 `(n, columns)`; and the
        names of the columns that are categories.
    """
    item, item_categorical = _columns(prepared, "item")
    quantities = {name: column for name, column in item.items() if name not in item_categorical}
    user, user_categorical = _columns(prepared, "user", quantities)
    tables = [np.column_stack(list(columns.values())).astype(np.float32) for columns in (user, item)]
    sides = [prepared.pairs[name].to_numpy() for name in ("user_row", "item_row")]

    def features(rows: np.ndarray) -> np.ndarray:
        return np.hstack([table[side[rows]] for table, side in zip(tables, sides, strict=True)])

    return [*user, *item], features, [*user_categorical, *item_categorical]


def _columns(
    prepared: Prepared, tower: str, of_items: dict[str, np.ndarray] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns `{name: (n,)}` of one tower, and the names of those that are categories."""
    raw, encoded = prepared.raw[tower], prepared.encoded[tower]
    sizes = {feature.name: feature.vocabulary_size for feature in prepared.schema.features}
    columns: dict[str, np.ndarray] = {}
    categorical = []
    for feature in (feature for feature in prepared.encoder.features if feature.tower == tower):
        name = feature.name
        if feature.length == 1:
            columns[name] = raw[name] if feature.kind == "number" else encoded[name]
            if feature.kind != "number":
                categorical.append(name)
            continue
        weights = raw[name + WEIGHTS_SUFFIX]
        if feature.kind == "integer" and of_items is not None:
            ids = prepared.raw["item"][feature.shares]
            # The last column, of ids that are no item, is left out.
            lists = _sparse(_positions(raw[name], ids), weights, len(ids) + 1)[:, : len(ids)]
            filled = (weights > 0).sum(axis=1)
            columns[f"{name}_length"] = filled
            columns[f"{name}_mean_weight"] = _ratio(weights.sum(axis=1), filled)
            for other, column in of_items.items():
                known = np.isfinite(column)
                columns[f"{name}_{other}"] = _ratio(lists @ np.where(known, column, 0), lists @ known.astype(float))
        else:
            lists = _sparse(np.where(weights > 0, encoded[name], 0), weights, sizes[name]).toarray()
            columns[f"{name}_total"] = lists.sum(axis=1)
            columns |= {f"{name}_{index}": _ratio(share, lists.sum(axis=1)) for index, share in enumerate(lists.T)}
    return columns, categorical


def _positions(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Position of each value in `ids`, or their number where it is not among them."""
    order = np.argsort(ids, kind="stable")
    found = order[np.minimum(np.searchsorted(ids, values, sorter=order), len(ids) - 1)]
    return np.where(ids[found] == values, found, len(ids))


def _sparse(columns: np.ndarray, weights: np.ndarray, width: int) -> sparse.csr_array:
    """The lists `(n, L)` as a matrix of summed weights `(n, width)`."""
    return sparse.csr_array(
        (weights.ravel().astype(np.float64), (np.repeat(np.arange(len(columns)), columns.shape[1]), columns.ravel())),
        shape=(len(columns), width),
    )


def _ratio(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """`values / of`, NaN where `of` is 0."""
    return np.divide(values, of, out=np.full(len(values), np.nan), where=of != 0)


def _make_unknown(
    prepared: Prepared, names: list[str], table: np.ndarray, categorical: list[str], random: np.random.Generator
) -> None:
    """Makes features of training rows unknown, in place, as often and as jointly as the neural networks see it."""
    groups: dict[str, list[Any]] = {}
    for feature in prepared.schema.features:
        if feature.unknown_rate:
            groups.setdefault(feature.unknown_group or feature.name, []).append(feature)
    for group in groups.values():
        rows = random.random(len(table)) < group[0].unknown_rate
        for feature in group:
            table[rows, names.index(feature.name)] = 0 if feature.name in categorical else np.nan


def _report(prepared: Prepared, probabilities: dict[str, dict[str, np.ndarray]], parts: Sequence[str]) -> Report:
    kinds = dict.fromkeys(probabilities, "binary")
    report: Report = {}
    for part in parts:
        predicted = {task: by_part[part] for task, by_part in probabilities.items()}
        report |= measure(predicted, {}, kinds, prepared, part)
    return report


def _lightgbm() -> Any:
    try:
        import lightgbm as library
    except ImportError as error:
        raise ValueError(
            "The baseline lightgbm needs the package LightGBM: pip install '.[compare]', or leave it out of "
            f"--models. Received: {error}"
        ) from error
    return library
