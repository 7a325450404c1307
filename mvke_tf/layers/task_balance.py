# SPDX-License-Identifier: Apache-2.0
"""Weights of the losses of several tasks that follow from the losses and gradients of each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

METHODS = ("famo", "pcgrad", "gradnorm")


@keras.saving.register_keras_serializable(package="mvke_tf")
class TaskBalance(keras.layers.Layer):
    """Passes the outputs of a model on unchanged, and owns the state of a method that balances its T tasks.

    Each step's gradient is `Σ_t w_t ∇L_t`, with the weights w of

    - `"famo"` (Liu et al., NeurIPS 2023, algorithm 1): `w_t = z_t / L_t / Σ_s z_s / L_s`, `z = softmax(ξ)`. After the
      step, with the losses L' of the same batch, `ξ ← ξ - 0.025 (Jᵀδ + 0.001 ξ)`, `δ_t = log L_t - log L'_t`, J the
      Jacobian of z: what became better faster than the others weighs less.
    - `"pcgrad"` (Yu et al., NeurIPS 2020, algorithm 1): from each `g_t = ∇L_t` its part against another task's gradient
      is taken, `g_t ← g_t - (g_t·g_s / g_s·g_s) g_s` where `g_t·g_s < 0`, for the s in a random order, and the results
      are added up. As all of them are sums of the gradients, their inner products tell the weights.
    - `"gradnorm"` (Chen et al., ICML 2018, algorithm 1): w learns, at rate 0.025, to bring `G_t = w_t |∇L_t|` near
      `Ḡ r_t^1.5`, where Ḡ is the mean of G and r_t the part of its first loss that task t still has, relative to the
      mean over the tasks. The weights sum to T. The paper takes the gradient by the last shared layer,
      here it is by all layers but embeddings that more than one task reads.

    Args:
        tasks: Names of the tasks.
        method: `"famo"`, `"pcgrad"` or `"gradnorm"`.
        seed: Seed of the orders of PCGrad.

    Call arguments:
        inputs: `{task: (B, n)}`.

    Returns:
        The same.

    Raises:
        ValueError: If there is no such method.

    Example:

    >>> balance = TaskBalance(("click", "buy"), "pcgrad")
    >>> balance.build()
    >>> weights = balance.step_weights(np.array([1.0, 1.0]), np.array([[4.0, -2.0], [-2.0, 2.0]]))
    >>> [float(weight) for weight in weights]  # 1 + 2/4 and 1 + 2/2
    [1.5, 2.0]
    """

    RATE, DECAY, ALPHA = 0.025, 0.001, 1.5

    def __init__(self, tasks: Sequence[str], method: str, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}. Received: {method!r}")
        self.tasks, self.method, self.seed = tuple(tasks), method, seed
        self._generator = keras.random.SeedGenerator(seed)

    def build(self, inputs_shape=None) -> None:
        def state(name: str, initial: float) -> keras.Variable:
            shape, initializer = (len(self.tasks),), keras.initializers.Constant(initial)
            return self.add_weight(shape=shape, initializer=initializer, trainable=False, name=name)

        # Of the last step; of GradNorm also those of the next one.
        self.weights_of_tasks = state("weights", 1.0)
        if self.method == "famo":
            self.logits = state("logits", 0.0)
        if self.method == "gradnorm":
            self.first_losses = state("first_losses", -1.0)
        super().build(inputs_shape)

    def call(self, inputs):
        return dict(inputs)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    @property
    def reads_gradients(self) -> bool:
        """Whether `step_weights` reads inner products of gradients."""
        return self.method != "famo"

    def step_weights(self, losses: Any, products: Any = None) -> Any:
        """The weights `(T,)` of this step; changes the state.

        Args:
            losses: `(T,)`.
            products: Inner products of the tasks' gradients, `(T, T)`; see `reads_gradients`.
        """
        if self.method == "famo":
            share = ops.softmax(self.logits) / losses
            weights = share / ops.sum(share)
            self.weights_of_tasks.assign(weights)
            return weights
        products = ops.convert_to_tensor(products, "float32")
        if self.method == "pcgrad":
            weights = self._without_conflicts(products)
            self.weights_of_tasks.assign(weights)
            return weights
        # A copy: the state changes below.
        weights = self.weights_of_tasks * 1.0
        first = self.first_losses * 1.0
        first = ops.where(first < 0, ops.cast(losses, "float32"), first)
        self.first_losses.assign(first)
        norms = ops.sqrt(ops.diagonal(products))
        left = losses / ops.maximum(first, 1e-12)
        target = ops.mean(weights * norms) * (left / ops.mean(left)) ** self.ALPHA
        # |G_t - target_t| by w_t, where the target is a constant.
        changed = ops.maximum(weights - self.RATE * ops.sign(weights * norms - target) * norms, 1e-3)
        self.weights_of_tasks.assign(len(self.tasks) * changed / ops.sum(changed))
        return weights

    def _without_conflicts(self, products: Any) -> Any:
        count = len(self.tasks)
        total = ops.zeros((count,))
        for task in range(count):
            # g_task as a sum of the gradients.
            parts = ops.one_hot(task, count)
            order = keras.random.shuffle(ops.arange(count), seed=self._generator) if count > 2 else ops.arange(count)
            for place in range(count):
                other = ops.one_hot(order[place], count)
                towards = ops.sum(products * other, axis=-1)
                along, size = ops.sum(parts * towards), ops.sum(other * towards)
                conflicts = ops.logical_and(along < 0, order[place] != task)
                parts = parts - ops.where(conflicts, along / ops.maximum(size, 1e-30), 0.0) * other
            total = total + parts
        return total

    def after_step(self, losses: Any, changed: Any) -> None:
        """Learns from a step of FAMO: the losses of its batch `(T,)` before and after it."""
        share = ops.softmax(self.logits)
        gain = ops.log(losses) - ops.log(changed)
        slope = share * (gain - ops.sum(share * gain))
        self.logits.assign(self.logits - self.RATE * (slope + self.DECAY * self.logits))

    def by_task(self) -> dict[str, float]:
        """`{task: weight of its loss in the last step}`; of GradNorm in the next one."""
        return dict(zip(self.tasks, map(float, ops.convert_to_numpy(self.weights_of_tasks)), strict=True))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tasks": self.tasks, "method": self.method, "seed": self.seed}
