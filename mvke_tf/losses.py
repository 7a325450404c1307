"""Losses of multi-task models: by kind of task, with fixed weights or with learned uncertainty weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from mvke_tf.schema import TASK_KINDS

# The mean over the rows that count: rows of weight 0 (no label there) do not dilute the others.
REDUCTION = "mean_with_sample_weight"


def task_loss(kind: str) -> keras.losses.Loss:
    """The loss of one task from its output and label `(B, 1)`: sigmoid cross entropy in nats, or squared error.

    Args:
        kind: `"binary"` or `"regression"`.

    Raises:
        ValueError: If it is another kind.
    """
    if kind not in TASK_KINDS:
        raise ValueError(f"The kind of a task must be one of {TASK_KINDS}. Received: {kind!r}")
    if kind == "binary":
        return keras.losses.BinaryCrossentropy(from_logits=True, reduction=REDUCTION)
    return keras.losses.MeanSquaredError(reduction=REDUCTION)


@keras.saving.register_keras_serializable(package="mvke_tf")
class TaskUncertainty(keras.layers.Layer):
    """Passes the outputs of a model on unchanged, and owns one trained log-variance s per task.

    As a layer of the model, the log-variances are trained, saved and restored with it; `UncertaintyLoss` reads them
    once `UncertaintyModel.compile` has shown it where they are.

    Args:
        tasks: Names of the tasks.

    Call arguments:
        inputs: `{task: (B, n)}`.

    Returns:
        The same.

    Example:

    >>> layer = TaskUncertainty(("ctr", "rating"))
    >>> outputs = layer({"ctr": np.ones((2, 1)), "rating": np.ones((2, 1))})
    >>> {task: float(value) for task, value in layer.by_task().items()}
    {'ctr': 0.0, 'rating': 0.0}

    Reference: Kendall et al., CVPR 2018, section 3.2.
    """

    def __init__(self, tasks: Sequence[str], **kwargs: Any) -> None:
        # Outputs stay what they are under every dtype policy, as those of the heads do.
        super().__init__(**{"dtype": "float32", **kwargs})
        self.tasks = tuple(tasks)

    def build(self, inputs_shape=None) -> None:
        self.log_variances = self.add_weight(shape=(len(self.tasks),), initializer="zeros", name="log_variances")
        super().build(inputs_shape)

    def call(self, inputs):
        return dict(inputs)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def by_task(self) -> dict[str, Any]:
        """`{task: log-variance}`, as NumPy scalars."""
        return dict(zip(self.tasks, ops.convert_to_numpy(self.log_variances), strict=True))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tasks": self.tasks}


def uncertainty_weight(log_variance: Any, kind: str) -> Any:
    """What the loss of a task is multiplied with: `exp(-s)` for a binary task, `exp(-s) / 2` for a regression task."""
    return ops.exp(-log_variance) * (1.0 if kind == "binary" else 0.5)


@keras.saving.register_keras_serializable(package="mvke_tf")
class UncertaintyLoss(keras.losses.Loss):
    """The loss L of one task, weighted by its trained log-variance s.

        exp(-s) L + s / 2        for a binary task
        exp(-s) L / 2 + s / 2    for a regression task

    Args:
        task: Name of the task.
        kind: `"binary"` or `"regression"`.

    Call arguments:
        y_true: Labels `(B, 1)`.
        y_pred: Outputs of the model `(B, 1)`.

    Returns:
        The mean over the rows that count, in nats. It may become negative.

    Raises:
        ValueError: If it is called before `UncertaintyModel.compile` has given it the log-variances of the model.

    Reference: Kendall et al., CVPR 2018, equations 5 to 10.
    """

    def __init__(self, task: str, kind: str, name: str = "uncertainty_loss", **kwargs: Any) -> None:
        super().__init__(name=name, reduction=kwargs.pop("reduction", REDUCTION), **kwargs)
        self.loss = task_loss(kind)
        self.task, self.kind = task, kind
        self._log_variance: Callable[[], Any] | None = None

    def bind(self, layer: TaskUncertainty) -> None:
        """Reads the log-variance of this task from `layer` from now on."""
        index = layer.tasks.index(self.task)
        # Behind a function: Keras would save an attribute with weights here, and miss them in the model.
        self._log_variance = lambda: layer.log_variances[index]

    def call(self, y_true, y_pred):
        if self._log_variance is None:
            raise ValueError(
                f"The uncertainty loss of {self.task!r} knows no log-variance. Compile a model of `with_uncertainty` "
                "with it. Received: a loss that no such model was compiled with"
            )
        log_variance = self._log_variance()
        return uncertainty_weight(log_variance, self.kind) * self.loss.call(y_true, y_pred) + 0.5 * log_variance

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "task": self.task, "kind": self.kind}


@keras.saving.register_keras_serializable(package="mvke_tf")
class UncertaintyModel(keras.Model):
    """A functional model with a `TaskUncertainty`, whose log-variances its `UncertaintyLoss`es read once compiled."""

    def compile(self, optimizer="rmsprop", loss=None, **kwargs):
        layer = uncertainty_layer(self)
        for task_loss_ in keras.tree.flatten(loss):
            if isinstance(task_loss_, UncertaintyLoss):
                task_loss_.bind(layer)
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    def compile_from_config(self, config):
        # Keras leaves this to models that override `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)


def uncertainty_layer(model: keras.Model) -> TaskUncertainty | None:
    """The layer with the log-variances of a model, if it has one."""
    return next((layer for layer in model.layers if isinstance(layer, TaskUncertainty)), None)


def with_uncertainty(
    model: keras.Model, layer: TaskUncertainty | None = None, tasks: Sequence[str] | None = None
) -> UncertaintyModel:
    """The same model, sharing its weights, with a trained log-variance for each of its outputs `{task: tensor}`.

    Compile it with `task_losses(model, kinds)`. Weight decay would pull the weights of the tasks towards 1: with it,
    call `optimizer.exclude_from_weight_decay(var_names=["log_variances"])` before.

    Args:
        model: A functional model of `{task: output}`.
        layer: The log-variances; new ones by default.
        tasks: Names of the outputs that are tasks; all by default. Other outputs, such as the gate weights of
            `return_expert_weights=True`, pass unchanged.

    Raises:
        ValueError: If the model has log-variances already, or no output of one of the names.
    """
    if uncertainty_layer(model) is not None:
        raise ValueError(f"The model {model.name!r} has log-variances already. Compile it with `task_losses`.")
    tasks = tuple(model.output) if tasks is None else tuple(tasks)
    if unknown := sorted(set(tasks) - set(model.output)):
        raise ValueError(f"The model {model.name!r} has outputs {sorted(model.output)}. Received the tasks: {unknown}")
    layer = layer or TaskUncertainty(tasks, name="task_uncertainty")
    return UncertaintyModel(model.input, layer(model.output), name=model.name)


def task_losses(model: keras.Model, kinds: Mapping[str, str]) -> dict[str, keras.losses.Loss]:
    """The loss of each task for `model.compile(loss=...)`.

    Args:
        model: A model of `{task: output}`; one of `with_uncertainty` gets `UncertaintyLoss`.
        kinds: `{task: "binary" or "regression"}`, for a two-tower model from `mvke_tf.models.two_tower.task_kinds`.
            An output that is left out has no loss, unless it has a log-variance.

    Raises:
        ValueError: If a kind is unknown, or `kinds` does not name the outputs (the log-variances) of the model.
    """
    layer = uncertainty_layer(model)
    known = set(model.output) if layer is None else set(layer.tasks)
    if set(kinds) - known or (layer is not None and known - set(kinds)):
        raise ValueError(
            f"`kinds` must name the tasks of the model {model.name!r}, {sorted(known)}. Received: {sorted(kinds)}"
        )
    if layer is None:
        return {task: task_loss(kind) for task, kind in kinds.items()}
    return {task: UncertaintyLoss(task, kind, name=f"{task}_loss") for task, kind in kinds.items()}
