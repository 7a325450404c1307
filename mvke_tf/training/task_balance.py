# SPDX-License-Identifier: Apache-2.0
"""A training step whose gradient is balanced between the tasks, under TensorFlow and JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from mvke_tf.layers import FieldEmbedding, TaskBalance
from mvke_tf.models import MultiTaskModel
from mvke_tf.models.multi_task import source


class BalancedModel(MultiTaskModel):
    """A model to train whose `TaskBalance` weighs the losses of its tasks in every step; made by `balanced`."""

    @property
    def balance(self) -> TaskBalance:
        """The state of the method; part of the model's variables, so that a resumed training goes on with it."""
        return next(layer for layer in self.layers if isinstance(layer, TaskBalance))

    def train_step(self, *arguments):
        step = _jax_step if keras.backend.backend() == "jax" else _tensorflow_step
        return step(self, *arguments)

    def losses_of_tasks(self, y: Any, outputs: Any, weights: Any) -> Any:
        """The loss of each task `(T,)`."""
        losses = [self.loss[task](y[task], outputs[task], (weights or {}).get(task)) for task in self.balance.tasks]
        return ops.stack(losses)

    def read_by_several(self) -> list[bool]:
        """Of each trainable variable, whether GradNorm reads its gradients."""
        readers: dict[int, int] = {}
        layers: dict[int, keras.Layer] = {}
        for output in source(self.output[self.balance.tasks[0]])[1]:
            for layer in _ancestors(output):
                readers[id(layer)] = readers.get(id(layer), 0) + 1
                layers[id(layer)] = layer
        shared = [layers[key] for key, count in readers.items() if count > 1 and layers[key].trainable_variables]
        chosen = [layer for layer in shared if not isinstance(layer, FieldEmbedding)] or shared
        ids = {id(variable) for layer in chosen for variable in layer.trainable_variables}
        return [id(variable) in ids for variable in self.trainable_variables]


def balanced(model: MultiTaskModel, method: str, seed: int = 0) -> BalancedModel:
    """A model of `TwoTowerModel.training_model`, sharing its weights, whose training is balanced between its tasks."""
    outputs = TaskBalance(tuple(model.output), method, seed, name="task_balance")(model.output)
    return BalancedModel(model.input, outputs, name=model.name)


def _ancestors(output: Any) -> list[keras.Layer]:
    """The layers that a symbolic tensor is computed by."""
    found: dict[int, keras.Layer] = {}
    seen: set[int] = set()
    stack = [output]
    while stack:
        tensor = stack.pop()
        if id(tensor) not in seen:
            seen.add(id(tensor))
            layer, inputs = source(tensor)
            found[id(layer)] = layer
            stack.extend(inputs)
    return list(found.values())


def _products(gradients: Sequence[Sequence[Any]], chosen: Sequence[bool]) -> Any:
    """Inner products `(T, T)` of the gradients of T tasks by the chosen variables; None is a gradient of 0."""
    count = len(gradients)
    rows = [[ops.zeros(()) for _ in range(count)] for _ in range(count)]
    for number, wanted in enumerate(chosen):
        for i in range(count):
            for j in range(i, count):
                one, other = gradients[i][number], gradients[j][number]
                if wanted and one is not None and other is not None:
                    rows[i][j] = rows[i][j] + ops.sum(ops.cast(one, "float32") * ops.cast(other, "float32"))
    return ops.stack([ops.stack([rows[min(i, j)][max(i, j)] for j in range(count)]) for i in range(count)])


def _chosen(model: BalancedModel) -> list[bool]:
    every = [True] * len(model.trainable_variables)
    return model.read_by_several() if model.balance.method == "gradnorm" else every


def _weighed(weights: Any, gradients: Sequence[Sequence[Any]], rest: Sequence[Any]) -> list[Any]:
    """`Σ_t w_t g_t` and the gradient of the losses of layers, per variable."""
    result = []
    for number, own in enumerate(rest):
        parts = [weights[t] * each[number] for t, each in enumerate(gradients) if each[number] is not None]
        parts += [] if own is None else [own]
        result.append(sum(parts[1:], parts[0]) if parts else None)
    return result


def _tensorflow_step(model: BalancedModel, data: Any) -> dict[str, Any]:
    import tensorflow as tf

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    balance, variables = model.balance, [variable.value for variable in model.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(x, training=True)
        losses = model.losses_of_tasks(y, outputs, sample_weight)
        rest = ops.sum(ops.stack(model.losses)) if model.losses else None
        if balance.reads_gradients:
            of_tasks = [losses[task] for task in range(len(balance.tasks))]
        else:
            weights = balance.step_weights(losses)
            total = ops.sum(tf.stop_gradient(weights) * losses) + (0.0 if rest is None else rest)
    if balance.reads_gradients:
        gradients = [[_dense(each) for each in tape.gradient(loss, variables)] for loss in of_tasks]
        weights = balance.step_weights(losses, _products(gradients, _chosen(model)))
        of_layers = [None] * len(variables) if rest is None else tape.gradient(rest, variables)
        summed = _weighed(weights, gradients, [_dense(each) for each in of_layers])
    else:
        summed = tape.gradient(total, variables)
    del tape
    model.optimizer.apply_gradients(zip(summed, model.trainable_variables, strict=True))
    if balance.method == "famo":
        changed = model.losses_of_tasks(y, model(x, training=True), sample_weight)
        balance.after_step(losses, changed)
    return _report(model, x, y, outputs, sample_weight, losses, rest)


def _dense(gradient: Any) -> Any:
    """A gradient as a tensor: that of an embedding table comes as rows."""
    return None if gradient is None else ops.convert_to_tensor(gradient)


def _report(model: BalancedModel, x: Any, y: Any, outputs: Any, weights: Any, losses: Any, rest: Any) -> dict[str, Any]:
    """The logs of a step: the sum of the losses, and what the compiled metrics say."""
    # For the trackers of the tasks' losses.
    model.compute_loss(x, y, outputs, weights)
    model._loss_tracker.update_state(ops.sum(losses) + (0.0 if rest is None else rest))
    return model.compute_metrics(x, y, outputs, sample_weight=weights)


def _jax_step(model: BalancedModel, state: Any, data: Any) -> tuple[dict[str, Any], Any]:
    import jax

    trainable, others, of_optimizer, metrics = state
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    balance = model.balance

    def forward(trainable: Any, others: Any) -> tuple[Any, Any]:
        outputs, others, added = model.stateless_call(trainable, others, x, training=True, return_losses=True)
        rest = ops.sum(ops.stack(added)) if added else ops.zeros(())
        losses = model.losses_of_tasks(y, outputs, sample_weight)
        return ops.append(losses, rest), (outputs, others)

    def with_state(function: Callable[[], Any], others: Any) -> tuple[Any, Any]:
        """What a function returns that changes the state of the balance, and the variables after it."""
        own = model.non_trainable_variables
        with keras.StatelessScope(state_mapping=list(zip(own, others, strict=True))) as scope:
            result = function()
        return result, [scope.get_current_value(variable) for variable in own]

    every, pullback, (outputs, others) = jax.vjp(lambda values: forward(values, others), trainable, has_aux=True)
    losses, rest = every[:-1], every[-1]
    if balance.reads_gradients:
        (rows,) = jax.vmap(pullback)(ops.eye(len(every)))
        gradients = [[row[task] for row in rows] for task in range(len(balance.tasks))]
        products = _products(gradients, _chosen(model))
        weights, others = with_state(lambda: balance.step_weights(losses, products), others)
        summed = _weighed(weights, gradients, [row[-1] for row in rows])
    else:
        weights, others = with_state(lambda: balance.step_weights(losses), others)
        (summed,) = pullback(ops.append(weights, 1.0))
    trainable, of_optimizer = model.optimizer.stateless_apply(of_optimizer, summed, trainable)
    if balance.method == "famo":
        changed, (_, others) = forward(trainable, others)
        _, others = with_state(lambda: balance.after_step(losses, changed[:-1]), others)
    with keras.StatelessScope(state_mapping=list(zip(model.metrics_variables, metrics, strict=True))) as scope:
        logs = _report(model, x, y, outputs, sample_weight, losses, rest)
    metrics = [scope.get_current_value(variable) for variable in model.metrics_variables]
    return logs, (trainable, others, of_optimizer, metrics)
