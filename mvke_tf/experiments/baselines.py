# SPDX-License-Identifier: Apache-2.0
"""Models that are no two-tower models, on the same data as those: popularity, trees, and attention to the item.

The first two, without a neural network, say how much of a result is owed to the data alone, and learn each task by
itself; the last one says what the two-tower form costs. All are for binary tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse, special
from sklearn.linear_model import LogisticRegression

from mvke_tf.config import BASELINE_NAMES, RunConfig, TrainingConfig
from mvke_tf.data.batches import Batches
from mvke_tf.data.encoder import EncodedFeature
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError, MissingExtraError
from mvke_tf.evaluation import Report, measure
from mvke_tf.models.target_attention import attended_lists, build_target_attention
from mvke_tf.schema import WEIGHTS_SUFFIX
from mvke_tf.training.loop import compile_model, loss_weights, set_seed

ROUNDS, EARLY_STOPPING_ROUNDS = 2000, 50
PREDICTED_TOGETHER = 4096
# Largest vocabulary whose shares in a list are columns of their own.
MOST_SHARES = 256
LIGHTGBM = {
    "objective": "binary",
    "metric": "auc",
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "feature_fraction": 0.5,
    # One thread, so that no result depends on the machine, and none waits for a core that another process holds.
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}
# What is tried for LightGBM, so many of all combinations: as many as `mvke tune` tried for each network of the docs.
# Without ids, the features that are keys of the declaration are left out.
LIGHTGBM_SPACE: dict[str, tuple[float, ...]] = {
    "learning_rate": (0.03, 0.1),
    "num_leaves": (15, 31, 63),
    "ids": (True, False),
}
LIGHTGBM_TRIALS = 6
# Settings of a training that target attention does not follow.
OF_TWO_TOWERS = ("loss_weighting", "counterfactual", "in_batch_weight", "precision", "embedding_optimizer")


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What a baseline made of the data.

    Args:
        report: `{part: {task: {metric: value}}}`, as `mvke_tf.evaluation.report.evaluate_model` gives it.
        parameters: How many numbers were learned from the labels.
        rounds: Boosting rounds of all tasks together, or epochs; 0 where nothing is repeated.
        settings: What was chosen for each task, where something is searched.
    """

    report: Report
    parameters: int
    rounds: int = 0
    settings: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


def check_baseline(name: str, prepared: PreparedDataset, tasks: Sequence[str], config: RunConfig | None = None) -> None:
    """Does nothing if there is a baseline of this name for these tasks, and what it needs is installed.

    Raises:
        ConfigError: If a task is not binary, popularity finds no items, target attention no list of items, or settings
            that it cannot follow, or there is no such baseline.
        MissingExtraError: If LightGBM is not installed.
    """
    if name not in BASELINE_NAMES:
        raise ConfigError(f"Unknown baseline. Expected one of {sorted(BASELINE_NAMES)}. Received: {name!r}")
    for task in prepared.schema(tasks).tasks:
        if task.kind != "binary":
            raise ConfigError(
                f"The baseline {name} is for binary tasks; leave it or the task out. Received: {task.name!r}"
            )
    if name == "popularity" and not prepared.has_items:
        raise ConfigError("The baseline popularity needs items; declare `keys.item`, or leave it out of --models.")
    if name == "lightgbm":
        _lightgbm()
    if name == "target_attention":
        config = config or RunConfig()
        schema = prepared.schema(tasks, config.model.objective)
        attended_lists(schema)
        default = TrainingConfig()
        received = {key: getattr(config.training, key) for key in OF_TWO_TOWERS}
        received = {key: value for key, value in received.items() if value != getattr(default, key)}
        if any(task.given and task.objective == "conditional" for task in schema.tasks):
            received["objective"] = "conditional"
        if received:
            raise ConfigError(
                "The baseline target_attention learns all tasks from all rows, by the sum of their losses in float32; "
                f"leave it out of --models, or these settings. Received: {received}"
            )


def run_baseline(
    name: str, prepared: PreparedDataset, tasks: Sequence[str], parts: Sequence[str], config: RunConfig | None = None
) -> Baseline:
    """Fits a baseline on the training part and measures it.

    Args:
        name: `"popularity"`, `"lightgbm"` or `"target_attention"`.
        prepared: The data.
        tasks: Names of binary tasks.
        parts: The parts to measure it on.
        config: Settings of target attention, of which LightGBM reads the seed and popularity nothing; the default ones
            if None.

    Raises:
        MvkeError: As `check_baseline`.
    """
    config = config or RunConfig()
    check_baseline(name, prepared, tasks, config)
    if name == "target_attention":
        return target_attention(prepared, tasks, parts, config)
    return (lightgbm if name == "lightgbm" else popularity)(prepared, tasks, parts, config.training.seed)


def popularity(prepared: PreparedDataset, tasks: Sequence[str], parts: Sequence[str], seed: int = 0) -> Baseline:
    """Scores an item by the number of its events of the task in the training part.

    A logistic regression on log(1 + number), fitted on the validation part, where no row has counted itself, turns the
    number into a probability without changing the order of items.

    Args:
        prepared: The data.
        tasks: Names of binary tasks.
        parts: The parts to measure it on.
        seed: Without influence.
    """
    # Of an item in several states, all states are one item.
    items = np.unique(np.asarray(prepared.items.key), return_inverse=True)[1][prepared.item_row]
    rows = {part: prepared.part_rows(part) for part in {"train", "validation", *parts}}
    probabilities = {}
    for task in tasks:
        labels, weights = prepared.label(task), prepared.weight(task)
        training, validation = (rows[part][weights[rows[part]] > 0] for part in ("train", "validation"))
        score = np.log1p(np.bincount(items[training][labels[training] == 1], minlength=items.max() + 1))[:, None]
        calibration = LogisticRegression(C=1e6).fit(score[items[validation]], labels[validation])
        probabilities[task] = {part: calibration.predict_proba(score[items[rows[part]]])[:, 1] for part in parts}
    return Baseline(_report(prepared, probabilities, parts), len(tasks) * (int(items.max()) + 1))


def lightgbm(prepared: PreparedDataset, tasks: Sequence[str], parts: Sequence[str], seed: int = 0) -> Baseline:
    """LightGBM on `tabular_features`, one classifier per task; the validation AUC ends the boosting.

    By the same AUC each task has its best settings of `LIGHTGBM_TRIALS` random ones of `LIGHTGBM_SPACE`.

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
    ids = _ids(prepared)
    columns = {
        True: np.arange(len(names)),
        False: np.array([place for place, name in enumerate(names) if name not in ids], int),
    }
    space = dict(LIGHTGBM_SPACE)
    if not 0 < len(columns[False]) < len(names):
        space["ids"] = (True,)
    every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    trials = random.Random(0).sample(every, min(LIGHTGBM_TRIALS, len(every)))
    probabilities, leaves, rounds = {}, 0, 0
    chosen: dict[str, dict[str, float]] = {}
    for task in tasks:
        labels, weights = prepared.label(task), prepared.weight(task)
        labelled = {part: {"label": labels[rows[part]], "weight": weights[rows[part]]} for part in rows}
        best = -math.inf
        for trial in trials:
            kept = columns[bool(trial["ids"])]
            data = library.Dataset(
                training[:, kept],
                **labelled["train"],
                feature_name=[names[place] for place in kept],
                categorical_feature=[names[place] for place in kept if names[place] in categorical],
            )
            tried = library.train(
                {**LIGHTGBM, **{name: value for name, value in trial.items() if name != "ids"}, "seed": seed},
                data,
                ROUNDS,
                valid_sets=[data.create_valid(inputs["validation"][:, kept], **labelled["validation"])],
                callbacks=[library.early_stopping(EARLY_STOPPING_ROUNDS, verbose=False)],
            )
            score = tried.best_score["valid_0"]["auc"]
            if task not in chosen or score > best:
                best, model, chosen[task] = score, tried, trial
        kept = columns[bool(chosen[task]["ids"])]
        trees = model.dump_model(num_iteration=model.best_iteration)["tree_info"]
        leaves, rounds = leaves + sum(tree["num_leaves"] for tree in trees), rounds + len(trees)
        probabilities[task] = {
            part: model.predict(inputs[part][:, kept], num_iteration=model.best_iteration) for part in parts
        }
    return Baseline(_report(prepared, probabilities, parts), leaves, rounds, chosen)


def _ids(prepared: PreparedDataset) -> set[str]:
    """The features of one value that are the keys of users or items."""
    keys = {prepared.dataset.keys.user, prepared.dataset.keys.item} - {None, ""}
    single = [feature for feature in prepared.encoder.features if feature.length == 1 and not feature.constant]
    return {feature.name for feature in single if prepared.dataset.feature(feature.name).source_column in keys}


def target_attention(
    prepared: PreparedDataset, tasks: Sequence[str], parts: Sequence[str], config: RunConfig
) -> Baseline:
    """`build_target_attention`, trained as `mvke train` does: the best epoch by the mean AUC of the validation part.

    Args:
        prepared: The data.
        tasks: Names of binary tasks.
        parts: The parts to measure it on.
        config: Shape of the model; epochs, batch size, learning rate, patience and seed of the training.
    """
    training, schema = config.training, prepared.schema(tasks, config.model.objective)
    set_seed(training)
    data = {part: prepared.part(part, tasks, config.model.objective) for part in {"train", "validation", *parts}}
    batches = Batches(data["train"], training.batch_size)
    model = build_target_attention(schema, config.model)
    kinds = dict.fromkeys(tasks, "binary")
    compile_model(model, kinds, training, batches.steps, loss_weights(config, schema))

    def measured(part: str) -> Report:
        outputs = model.predict(Batches(data[part], PREDICTED_TOGETHER).in_order(), verbose=0)
        probabilities = {task: special.expit(np.asarray(outputs[task])[:, 0].astype(np.float64)) for task in tasks}
        return _report(prepared, {task: {part: values} for task, values in probabilities.items()}, [part])

    best, best_epoch, epoch, weights = -math.inf, 0, 0, model.get_weights()
    while epoch < training.epochs and (not training.patience or epoch - best_epoch < training.patience):
        model.fit(batches.epoch(training.seed, epoch), epochs=epoch + 1, initial_epoch=epoch, shuffle=False, verbose=0)
        epoch += 1
        found = measured("validation")["validation"]
        # Of a task whose labels are all the same there is none.
        score = sum(found[task]["auc"] or 0.0 for task in tasks)
        if score > best:
            best, best_epoch, weights = score, epoch, model.get_weights()
    model.set_weights(weights)
    report: Report = {}
    for part in parts:
        report |= measured(part)
    return Baseline(report, model.count_params(), epoch)


def tabular_features(
    prepared: PreparedDataset,
) -> tuple[list[str], Callable[[np.ndarray], np.ndarray], list[str]]:
    """The features of both towers as one table of numbers, nothing added.

    A quantity stays as it is (NaN if unknown), and so do the entries of a vector; an id or a category is its encoded
    index (0 if unknown). A weighted list of values becomes its length, its mean and total weight, and, of a vocabulary
    of at most `MOST_SHARES` values, the share of each. A list of items (recent ones) becomes its length, its mean
    weight, and the weighted means of the quantities of those items.

    Args:
        prepared: The data.

    Returns:
        Names of the columns; a function from rows of the log to a table, float32 `(n, columns)`; and the names of the
        columns that are categories.
    """
    item, item_categorical = _columns(prepared, "item")
    quantities = {name: column for name, column in item.items() if name not in item_categorical}
    user, user_categorical = _columns(prepared, "user", quantities)
    tables = [np.column_stack(list(columns.values())).astype(np.float32) for columns in (user, item) if columns]
    sides = [rows for rows, columns in ((prepared.user_row, user), (prepared.item_row, item)) if columns]

    def features(rows: np.ndarray) -> np.ndarray:
        return np.hstack([table[side[rows]] for table, side in zip(tables, sides, strict=True)])

    return [*user, *item], features, [*user_categorical, *item_categorical]


def _columns(
    prepared: PreparedDataset, tower: str, of_items: dict[str, np.ndarray] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns `{name: (n,)}` of one tower, and the names of those that are categories."""
    table = prepared.users if tower == "user" else prepared.items
    encoder = prepared.encoder
    by_name = {feature.name: feature for feature in encoder.features}
    sizes = {feature.name: feature.vocabulary_size for feature in encoder.schema_features()}
    columns: dict[str, np.ndarray] = {}
    categorical = []
    for feature in (feature for feature in encoder.features if feature.tower == tower and not feature.constant):
        name, owner = feature.name, by_name[feature.embedding or feature.name]
        if owner.raw == "vector":
            vector = np.asarray(table.raw[name])
            columns |= {f"{name}_{index}": vector[:, index] for index in range(vector.shape[1])}
        elif feature.length == 1:
            columns[name] = _quantity(table.raw[name], feature) if owner.raw == "number" else table.encoded[name]
            if owner.raw != "number":
                categorical.append(name)
        else:
            values, weights = table.raw[name], np.asarray(table.raw[name + WEIGHTS_SUFFIX])
            filled = (weights > 0).sum(axis=1)
            columns[f"{name}_length"] = filled
            columns[f"{name}_mean_weight"] = _ratio(weights.sum(axis=1), filled)
            if of_items is not None and _is_item(prepared, owner):
                # Of an item in several states, the latest one.
                catalogue = prepared.catalogue
                keys = np.asarray(prepared.items.key)[catalogue]
                # The last column, of ids that are no item, is left out.
                lists = _sparse(_positions(values, keys), weights, len(keys) + 1)[:, : len(keys)]
                for other, column in of_items.items():
                    known = np.isfinite(column[catalogue])
                    means = lists @ np.where(known, column[catalogue], 0), lists @ known.astype(float)
                    columns[f"{name}_{other}"] = _ratio(*means)
            elif sizes[name] <= MOST_SHARES:
                encoded, weights = table.encoded[name], np.asarray(table.encoded[name + WEIGHTS_SUFFIX])
                lists = _sparse(np.where(weights > 0, encoded, 0), weights, sizes[name]).toarray()
                lists[filled == 0] = 0
                columns[f"{name}_total"] = lists.sum(axis=1)
                columns |= {f"{name}_{index}": _ratio(share, lists.sum(axis=1)) for index, share in enumerate(lists.T)}
    return columns, categorical


def _is_item(prepared: PreparedDataset, owner: EncodedFeature) -> bool:
    """Whether the values of a feature are the ids of items."""
    declared = prepared.dataset.feature(owner.name)
    return owner.tower == "item" and declared.source_column == prepared.dataset.keys.item


def _quantity(values: np.ndarray, feature: EncodedFeature) -> np.ndarray:
    """A number as it is, NaN where it is one of the values that mean "unknown"."""
    return np.where(np.isin(values, [float(value) for value in feature.missing]), np.nan, values)


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
    prepared: PreparedDataset, names: list[str], table: np.ndarray, categorical: list[str], random: np.random.Generator
) -> None:
    """Makes features of training rows unknown, in place, as often and as jointly as the neural networks see it."""
    groups: dict[str, list[EncodedFeature]] = {}
    for feature in prepared.encoder.features:
        if feature.unknown_rate:
            groups.setdefault(feature.unknown_group or feature.name, []).append(feature)
    for group in groups.values():
        rows = random.random(len(table)) < group[0].unknown_rate
        for feature in group:
            columns = (
                [feature.name] if feature.raw != "vector" else [f"{feature.name}_{i}" for i in range(feature.width)]
            )
            for name in columns:
                table[rows, names.index(name)] = 0 if name in categorical else np.nan


def _report(prepared: PreparedDataset, probabilities: dict[str, dict[str, np.ndarray]], parts: Sequence[str]) -> Report:
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
        raise MissingExtraError(
            "The baseline lightgbm needs the package LightGBM: pip install 'mvke_tf[compare]', or leave it out of "
            f"--models. Received: {error}"
        ) from error
    return library
