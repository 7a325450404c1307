# SPDX-License-Identifier: Apache-2.0
"""What the validation part says after an epoch: exact metrics and the loss, from one pass of predictions."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mvke_tf.data.batches import Interactions, Shards
from mvke_tf.errors import DataError, MvkeError
from mvke_tf.inference.predictions import PAIRS, predict
from mvke_tf.inference.vectors import slices
from mvke_tf.losses import uncertainty_weight
from mvke_tf.metrics import auc, multiclass_metrics, poisson_deviance
from mvke_tf.models import TwoTowerModel
from mvke_tf.schema import Task

LOGGER = logging.getLogger(__name__)


class Validation:
    """Measures a model on the validation part.

    Args:
        model: The model; its weights are those of the moment in which `measure` is called.
        data: The validation part, with the weights of the objectives of the tasks.
        tasks: The tasks of the schema.
        loss_weights: Weight of the loss of each task, unless the model has trained log-variances; 1 each by default.
    """

    def __init__(
        self,
        model: TwoTowerModel,
        data: Interactions | Shards,
        tasks: Sequence[Task],
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.data, self.tasks = model, data, tuple(tasks)
        self.loss_weights = dict(loss_weights or {})
        # Shards are read once here, and then for each prediction.
        pieces = [(len(piece), piece.labels, piece.weights) for piece in data.pieces()]
        self._labels: dict[str, np.ndarray] = {}
        # Of the rows that count; None where each counts as one.
        self._weights: dict[str, np.ndarray | None] = {}
        self._rows: dict[str, np.ndarray | slice] = {}
        for name in [task.name for task in tasks]:
            labels = np.concatenate([labels[name] for _, labels, _ in pieces])
            weights: np.ndarray | None = None
            rows: np.ndarray | slice = slice(None)
            if any(name in some for _, _, some in pieces):
                weights = np.concatenate([some.get(name, np.ones(size, np.float32)) for size, _, some in pieces])
                rows = slice(None) if np.all(weights > 0) else np.flatnonzero(weights > 0)
                weights = None if np.all(weights[rows] == 1) else weights[rows]
            self._labels[name], self._weights[name], self._rows[name] = labels[rows], weights, rows
        for task in self.tasks:
            if reason := self._undefined(task):
                LOGGER.warning(
                    "The validation part %s for the task %r: its score is not defined there, and the best epoch is "
                    "chosen by the other tasks.",
                    reason,
                    task.name,
                )

    def _undefined(self, task: Task) -> str | None:
        labels = self._labels[task.name]
        if not len(labels):
            return "has no row that counts"
        if task.kind == "binary" and labels.min() == labels.max():
            return f"has only the label {labels[0]:g}"
        return None

    def measure(self) -> dict[str, float]:
        """Metrics by the names of their columns in the log.

        Returns:
            `val_loss`, the sum of the losses of the tasks with their weights, without losses of layers such as that of
            load balancing; `val_<task>_loss` (nats, or the squared error in the unit in which the model learns);
            `val_<task>_auc` of a binary task (given the event before it, if that is its objective), of a multi-class
            task the mean over its classes and with it `val_<task>_accuracy`; `val_<task>_rmse` and `val_<task>_mae` of
            a regression (in the unit of the label); `val_<task>_poisson_deviance` of a count, over the rows that count,
            each as one; and `val_score`, the mean AUC, or minus the mean RMSE or deviance where there is no AUC, or
            minus the loss where there is neither. What is not defined is NaN and left out of the score. Only
            `val_loss`, which is NaN, if the predictions are not finite.
        """
        try:
            predictions = predict(self.model, self.data)
        except DataError:
            raise
        except MvkeError:
            # The outputs are not finite.
            return {"val_loss": math.nan}
        measured: dict[str, float] = {}
        losses, aucs, errors = [], [], []
        for task in self.tasks:
            rows = self._rows[task.name]
            conditional = task.objective == "conditional" and task.name in predictions.conditional
            predicted = np.asarray((predictions.conditional if conditional else predictions.values)[task.name])[rows]
            labels = self._labels[task.name]
            if not np.isfinite(predicted).all():
                return {"val_loss": math.nan}
            loss = math.nan
            if len(labels):
                loss = _mean_loss(task, labels, predicted, self._weights[task.name])
                losses.append(self._weighted(task, loss))
            measured[f"val_{task.name}_loss"] = loss
            if task.kind == "binary":
                area = math.nan if self._undefined(task) else auc(labels, predicted)
                measured[f"val_{task.name}_auc"] = area
                aucs.append(area)
            elif task.kind == "multiclass":
                metrics = multiclass_metrics(labels, predicted)
                for name, column in (("macro_auc", "auc"), ("accuracy", "accuracy")):
                    value = metrics[name]
                    measured[f"val_{task.name}_{column}"] = math.nan if value is None else float(value)
                aucs.append(measured[f"val_{task.name}_auc"])
            elif task.kind == "count":
                deviance = poisson_deviance(labels.astype(np.float64), predicted)
                measured[f"val_{task.name}_poisson_deviance"] = deviance
                errors.append(deviance)
            else:
                error = predicted - _untransformed(task, labels.astype(np.float64))
                rmse = float(np.sqrt(np.mean(np.square(error)))) if len(labels) else math.nan
                measured[f"val_{task.name}_rmse"] = rmse
                measured[f"val_{task.name}_mae"] = float(np.mean(np.abs(error))) if len(labels) else math.nan
                errors.append(rmse)
        total = float(np.sum(losses))
        return {"val_loss": total, **measured, "val_score": _score(aucs, errors, total)}

    def _weighted(self, task: Task, loss: float) -> float:
        if self.model.log_variances is None:
            return self.loss_weights.get(task.name, 1.0) * loss
        log_variance = float(self.model.log_variances.by_task()[task.name])
        return float(uncertainty_weight(log_variance, task.kind)) * loss + 0.5 * log_variance


def _score(aucs: Sequence[float], errors: Sequence[float], loss: float) -> float:
    aucs = [area for area in aucs if not math.isnan(area)]
    errors = [error for error in errors if not math.isnan(error)]
    if aucs:
        return float(np.mean(aucs))
    return -float(np.mean(errors)) if errors else -loss


def _mean_loss(task: Task, labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None) -> float:
    """The mean of the losses, in float64, of which few are held at a time."""
    total = 0.0
    for some in slices(len(labels), PAIRS):
        losses = _losses(task, labels[some].astype(np.float64), predicted[some])
        total += float(np.sum(losses if weights is None else losses * weights[some]))
    return total / (len(labels) if weights is None else float(np.sum(weights, dtype=np.float64)))


def _losses(task: Task, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The loss of each row `(n,)`, as in `mvke_tf.losses.task_loss`, from what `predict` gives."""
    if task.kind == "regression":
        learned = np.log1p(predicted) if task.transform == "log1p" else predicted
        return np.square(learned - labels)
    if task.kind == "count":
        return predicted - labels * np.log(predicted)
    if task.kind == "multiclass":
        of_label = predicted[np.arange(len(labels)), labels.astype(int)]
        return -np.log(np.maximum(of_label, np.finfo(np.float64).tiny))
    # The nearest numbers to 0 and 1: a probability that was rounded to them costs much and not infinitely much.
    positive, negative = np.maximum(predicted, np.finfo(np.float64).tiny), np.minimum(predicted, 1 - 2**-53)
    return -(labels * np.log(positive) + (1 - labels) * np.log1p(-negative))


def _untransformed(task: Task, labels: np.ndarray) -> np.ndarray:
    return np.expm1(labels) if task.transform == "log1p" else labels
