# SPDX-License-Identifier: Apache-2.0
"""What every multi-task model of this package is: a functional Keras model that knows its tasks and parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import keras

from mvke_tf.layers import CounterfactualRisk, InBatchSoftmax, TaskUncertainty
from mvke_tf.losses import uncertainty_weight


class Mixture(NamedTuple):
    """How a task mixes experts, in symbolic tensors.

    Args:
        side: `"user"` or `"item"`, what the gate reads.
        gate: Gate weights `(B, n)`; None where a single expert needs none.
        outputs: Outputs of all experts `(B, E, D)`.
        experts: Indices of the experts, in the order of the gate weights.
        has_kernels: Whether the experts are those of virtual kernels.
    """

    side: str
    gate: Any
    outputs: Any
    experts: tuple[int, ...]
    has_kernels: bool = False


@keras.saving.register_keras_serializable(package="mvke_tf")
class MultiTaskModel(keras.Model):
    """A functional model `{feature: tensor} -> {task: output}`, whose losses a `TaskUncertainty` weighs if it has one.

    Compile it with `mvke_tf.losses.task_losses`. With a `TaskUncertainty`, the loss is the sum over its tasks of

        exp(-s) L / 2 + s / 2    for a regression task
        exp(-s) L + s / 2        for every other

    with the loss L and the trained log-variance s of each task (it may become negative), plus what layers add; the
    losses per task that `fit` reports are the L. A `CounterfactualRisk` or
    an `InBatchSoftmax` adds to either.

    The parts of a model (towers, gates, experts) are models that share its weights. They are found in its graph when
    they are first asked for, so that a file need not keep them.

    Reference: Kendall et al., CVPR 2018, equations 5 to 10.
    """

    @property
    def log_variances(self) -> TaskUncertainty | None:
        """The layer with the trained log-variances, in a model of `with_uncertainty`."""
        return next((layer for layer in self.layers if isinstance(layer, TaskUncertainty)), None)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(self.output)

    def compile(self, optimizer="rmsprop", loss=None, loss_weights=None, **kwargs):
        if self.log_variances is not None:
            tasks = self.log_variances.tasks
            if not isinstance(loss, Mapping) or set(loss) != set(tasks):
                raise ValueError(
                    f"A model with log-variances is compiled with a loss for each of its tasks, {list(tasks)}: "
                    f"`task_losses(kinds)`. Received: {loss}"
                )
            if loss_weights:
                raise ValueError(
                    "A model with log-variances learns the weights of its losses; compile it without `loss_weights`. "
                    f"Received: {loss_weights}"
                )
        super().compile(optimizer=optimizer, loss=loss, loss_weights=loss_weights, **kwargs)

    def compile_from_config(self, config):
        # Keras leaves this to models that override `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    @property
    def added_losses(self) -> list[CounterfactualRisk | InBatchSoftmax]:
        """The layers that add to the losses of the tasks; each has an output of its name besides those of the tasks."""
        return [layer for layer in self.layers if isinstance(layer, (CounterfactualRisk, InBatchSoftmax))]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        added = self.added_losses
        if added:
            every, y_pred, y = y_pred, {task: y_pred[task] for task in self.loss}, {task: y[task] for task in self.loss}
        total = super().compute_loss(x, y, y_pred, sample_weight, training)
        for layer in added:
            total = total + layer.weight * layer.added_loss(y, every[layer.name], sample_weight)
        if self.log_variances is None:
            return total
        for index, task in enumerate(self.log_variances.tasks):
            loss = self.loss[task](y[task], y_pred[task], (sample_weight or {}).get(task))
            log_variance = self.log_variances.log_variances[index]
            kind = "regression" if isinstance(self.loss[task], keras.losses.MeanSquaredError) else "binary"
            # The total has the loss itself already.
            total = total + (uncertainty_weight(log_variance, kind) - 1.0) * loss + 0.5 * log_variance
        return total

    def _mixtures(self) -> dict[str, Mixture]:
        """How each task mixes experts. Models of mixtures of experts override this."""
        return {}

    @cached_property
    def gate_side(self) -> str | None:
        """`"user"` or `"item"`, whose features the gates read; None of a model without gates.

        Raises:
            ValueError: If gates read different sides.
        """
        sides = {task: mixture.side for task, mixture in self._mixtures().items() if mixture.gate is not None}
        if len(set(sides.values())) > 1:
            raise ValueError(f"All gates of a model must read the same side. Received: {sides}")
        return next(iter(sides.values()), None)

    @cached_property
    def gates(self) -> keras.Model | None:
        """`{feature: tensor} -> {task: gate weights (B, n_task)}`, which sum to 1 over the experts that a task sees.

        MVKE's gates read the item, all others the user. A task with a single expert has no gate; None of a model
        without any.

        Raises:
            ValueError: If gates read different sides.
        """
        if self.gate_side is None:
            return None
        mixtures = self._mixtures().items()
        return self.part({task: mixture.gate for task, mixture in mixtures if mixture.gate is not None}, "gates")

    @cached_property
    def expert_outputs(self) -> keras.Model | None:
        """`{user feature: tensor} -> (B, E, D)`, the outputs of all experts; None of a model without experts.

        Raises:
            ValueError: If tasks mix the outputs of different layers.
        """
        sources = {id(mixture.outputs): mixture.outputs for mixture in self._mixtures().values()}
        if len(sources) > 1:
            raise ValueError(f"All tasks of a model must mix the same experts. Received: {len(sources)} layers of them")
        return self.part(next(iter(sources.values())), "experts") if sources else None

    def experts_of(self, task: str) -> tuple[int, ...]:
        """Indices of the experts that a task mixes, in the order of its gate weights; () of a model without experts."""
        mixtures = self._mixtures()
        return mixtures[task].experts if task in mixtures else ()

    def kernels_of(self, task: str) -> tuple[int, ...]:
        """The same of the virtual kernels of MVKE; () of every other model."""
        mixtures = self._mixtures()
        return self.experts_of(task) if task in mixtures and mixtures[task].has_kernels else ()

    def with_outputs(self, outputs: Any) -> MultiTaskModel:
        """A model of the same class and name with other symbolic outputs, sharing its weights."""
        return type(self)(self.input, outputs, name=self.name)

    def part(self, outputs: Any, name: str = "part") -> keras.Model:
        """The part of this model that computes some of its symbolic tensors, on just the inputs that they need.

        It takes a dictionary, also where the model itself takes a single tensor, whose name is that of its input.
        """
        inputs = self.input if isinstance(self.input, Mapping) else {self.input.name: self.input}
        return keras.Model(needed_inputs(inputs, outputs), outputs, name=name)


def with_uncertainty(model: MultiTaskModel, tasks: Sequence[str] | None = None) -> MultiTaskModel:
    """The same model, sharing its weights, with a trained log-variance for each of its outputs `{task: tensor}`.

    Weight decay would pull the weights of the tasks towards 1: with it, call
    `optimizer.exclude_from_weight_decay(var_names=["log_variances"])` before.

    Args:
        model: A model of this package, or another functional model of `{task: output}`.
        tasks: Names of the outputs that are tasks; by default `model.task_names`. Other outputs, such as gate weights,
            pass unchanged.

    Raises:
        ValueError: If the model has log-variances already, or no output of one of the names.
    """
    if not isinstance(model, MultiTaskModel):
        model = MultiTaskModel(model.input, model.output, name=model.name)
    if model.log_variances is not None:
        raise ValueError(f"The model {model.name!r} has log-variances already. Compile it with `task_losses`.")
    tasks = tuple(model.task_names if tasks is None else tasks)
    if unknown := sorted(set(tasks) - set(model.output)):
        raise ValueError(f"The model {model.name!r} has outputs {sorted(model.output)}. Received the tasks: {unknown}")
    return model.with_outputs(TaskUncertainty(tasks, name="task_uncertainty")(model.output))


def source(tensor: Any) -> tuple[keras.Layer, list[Any]]:
    """The layer that a symbolic tensor is an output of, and the symbolic inputs of that call."""
    # No public function of Keras says this of a layer that is called more than once.
    layer, call, _ = tensor._keras_history
    return layer, layer._inbound_nodes[call].input_tensors


def needed_inputs(inputs: Mapping[str, Any], outputs: Any) -> dict[str, Any]:
    """Those of the symbolic inputs that symbolic outputs depend on."""
    seen: dict[int, Any] = {}
    stack = keras.tree.flatten(outputs)
    while stack:
        tensor = stack.pop()
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor
            stack.extend(source(tensor)[1])
    return {name: tensor for name, tensor in inputs.items() if id(tensor) in seen}
