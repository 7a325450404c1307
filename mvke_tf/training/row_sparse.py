# SPDX-License-Identifier: Apache-2.0
"""Updates of embedding tables that cost what a batch touches, not what a table holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from mvke_tf.layers import FieldEmbedding
from mvke_tf.models.multi_task import MultiTaskModel
from mvke_tf.schema import Schema
from mvke_tf.training.fused_adam import FusedAdam

# Of row-wise Adagrad, as in FBGEMM.
EPSILON = 1e-8


class RowGradient(NamedTuple):
    """The gradient of a table in the rows of a batch; it is 0 in all others.

    Args:
        rows: Different rows `(n,)`, ascending under JAX; those that the table does not have fill up and count nothing.
        values: Their gradients, `(n, D)`.
    """

    rows: Any
    values: Any


class RowSparseAdam(FusedAdam):
    """Adam, or AdamW, for all variables but embedding tables, of which it updates the touched rows only.

    A step touches a row if an entry of its gradient g is not 0: not one that only fills up a batch, or is looked up
    with a weight of 0. No other row moves, and neither does its state. With the number t of the step, from 1, and the
    learning rate r of tables in that step, a touched row w of width D becomes

        "lazy_adam":        m ← m + (1 - β₁)(g - m)          w ← w - r √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε)
                            v ← v + (1 - β₂)(g² - v)         β₁ = 0.9, β₂ = 0.999, ε = 1e-7
        "rowwise_adagrad":  a ← a + (1/D) Σ g²               w ← w - r g / (√a + ε)
                            one number a per row, from 0     ε = 1e-8

    Lazy Adam is Adam where every row is touched in every step. Elsewhere it differs in that the moments of a row do not
    decay, and the row does not drift on, while nothing is learned of it, although t counts every step. Weight decay
    takes r · decay · w from a touched row before. `global_clipnorm` scales all gradients, those of tables summed by
    row, by the norm of all of them, as in Keras.

    Args:
        tables: Paths of the variables that are tables.
        rule: `"lazy_adam"` or `"rowwise_adagrad"`.
        table_rate: r divided by the learning rate of all other variables.
        global_clipnorm: Largest global norm of the gradients; None clips nothing.
        **kwargs: Arguments of `keras.optimizers.Adam`; gradient accumulation and loss scaling are not supported.

    References: Kingma & Ba, ICLR 2015, whose lazy form is that of `LazyAdamOptimizer` in TensorFlow 1; Duchi et al.,
    JMLR 2011; with one accumulator per row, Mudigere et al., ISCA 2022 (`EXACT_ROWWISE_ADAGRAD` of FBGEMM).
    """

    def __init__(
        self,
        tables: Sequence[str],
        rule: str,
        table_rate: float = 1.0,
        global_clipnorm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tables, self.rule, self.table_rate, self.clip = frozenset(tables), rule, table_rate, global_clipnorm

    def build(self, var_list):
        if self.built:
            return
        super().build([variable for variable in var_list if variable.path not in self.tables])
        self._table_state = {
            table.path: [
                self.add_variable_from_reference(table, name=name) for name in ("table_momentum", "table_velocity")
            ]
            if self.rule == "lazy_adam"
            else [self.add_variable(table.shape[:1], dtype=table.dtype, name=f"{table.path.replace('/', '_')}_squares")]
            for table in var_list
            if table.path in self.tables
        }
        # What `stateless_apply` pairs its values with; a new list would become a part of the optimizer's own variables.
        self._trainable_variables.clear()
        self._trainable_variables.extend(var_list)

    def apply(self, grads, trainable_variables=None):
        variables = list(trainable_variables or self._trainable_variables)
        if not self.built:
            self.build(variables)
        grads = [_by_row(gradient) for gradient in grads]
        if self.clip:
            grads = _clipped(grads, self.clip)
        dense = [(g, v) for g, v in zip(grads, variables, strict=True) if v.path not in self.tables]
        for gradient, variable in zip(grads, variables, strict=True):
            if variable.path in self.tables and gradient is not None:
                self._update_table(variable, gradient)
        # Counts the step.
        super().apply(*map(list, zip(*dense, strict=True)))

    def _update_table(self, table: keras.Variable, gradient: Any) -> None:
        rows, gradient = gradient if isinstance(gradient, RowGradient) else (None, gradient)
        state = self._table_state[table.path]
        old = [_read(variable, rows) for variable in (table, *state)]
        weights, rate = old[0], ops.cast(self.learning_rate, table.dtype) * self.table_rate
        if self.rule == "lazy_adam":
            step = ops.cast(self.iterations + 1, table.dtype)
            correction = ops.sqrt(1 - ops.power(self.beta_2, step)) / (1 - ops.power(self.beta_1, step))
            first = old[1] + (gradient - old[1]) * (1 - self.beta_1)
            second = old[2] + (ops.square(gradient) - old[2]) * (1 - self.beta_2)
            change, new_state = first * (rate * correction) / (ops.sqrt(second) + self.epsilon), [first, second]
        else:
            squares = old[1] + ops.mean(ops.square(gradient), axis=-1)
            change, new_state = rate * gradient / (ops.sqrt(squares) + EPSILON)[:, None], [squares]
        if self.weight_decay:
            weights = weights - weights * self.weight_decay * rate
        touched = ops.any(gradient != 0, axis=-1)
        for variable, before, after in zip((table, *state), old, (weights - change, *new_state), strict=True):
            chosen = touched[:, None] if len(variable.shape) > 1 else touched
            self._write(variable, rows, ops.where(chosen, after, before))

    def _write(self, variable: keras.Variable, rows: Any, values: Any) -> None:
        if rows is None:
            self.assign(variable, values)
        elif keras.backend.backend() == "jax":
            # In place, because the step's state is donated.
            scatter = variable.value.at[rows]
            self.assign(variable, scatter.set(values, mode="drop", unique_indices=True, indices_are_sorted=True))
        else:
            import tensorflow as tf

            self.assign(variable, tf.IndexedSlices(values, rows))


def _read(variable: keras.Variable, rows: Any) -> Any:
    return variable.value if rows is None else ops.take(variable.value, rows, axis=0)


def _by_row(gradient: Any) -> Any:
    """The `RowGradient` of what TensorFlow calls slices, in which a row may come several times."""
    if keras.backend.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    rows, position = tf.unique(gradient.indices)
    return RowGradient(rows, tf.math.unsorted_segment_sum(gradient.values, position, tf.size(rows)))


def _clipped(gradients: list[Any], limit: float) -> list[Any]:
    """Gradients scaled so that the norm of all of them is at most `limit`."""
    values = [gradient.values if isinstance(gradient, RowGradient) else gradient for gradient in gradients]
    norm = ops.sqrt(sum(ops.sum(ops.square(value)) for value in values if value is not None))
    scale = limit / ops.maximum(norm, limit)
    return [
        RowGradient(gradient.rows, gradient.values * scale)
        if isinstance(gradient, RowGradient)
        else None
        if gradient is None
        else gradient * scale
        for gradient in gradients
    ]


@keras.saving.register_keras_serializable(package="mvke_tf")
class RowSparseModel(MultiTaskModel):
    """A model to train with `RowSparseAdam`, whose step under JAX differentiates only the rows that a batch looks up.

    TensorFlow's gradient of a lookup names its rows. That of JAX is as large as the table: there a step gathers the
    different rows of the batch first, and the model reads these, by indices into them.
    """

    # `{name of an embedding layer: names of the inputs that it looks up}`.
    lookups: Mapping[str, Sequence[str]] = {}

    def train_step(self, *args):
        return self._jax_train_step(*args) if keras.backend.backend() == "jax" else super().train_step(*args)

    def _jax_train_step(self, state, data):
        import jax

        trainable, non_trainable, optimizer_variables, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        x, index = dict(x), {variable.path: number for number, variable in enumerate(self.trainable_variables)}
        rows: dict[int, Any] = {}
        layers: dict[int, FieldEmbedding] = {}
        for name, inputs in self.lookups.items():
            layer = self.get_layer(name)
            if layer.input_dim < sum(x[feature].size for feature in inputs):
                continue
            number = index[layer._embeddings.path]
            rows[number], places = _distinct_rows([x[feature] for feature in inputs], layer.input_dim)
            layers[number] = layer
            x |= dict(zip(inputs, places, strict=True))
        gathered = {number: jax.numpy.take(trainable[number], rows[number], axis=0, mode="clip") for number in rows}
        # Tables of which rows are gathered are constants.
        dense = {number: value for number, value in enumerate(trainable) if number not in rows}

        def loss(dense, gathered):
            with ExitStack() as stack:
                for number, layer in layers.items():
                    stack.enter_context(layer.reading(gathered[number]))
                return self.compute_loss_and_updates(
                    [dense.get(number, value) for number, value in enumerate(trainable)],
                    *(non_trainable, metrics, x, y, sample_weight),
                    training=True,
                    optimizer_variables=optimizer_variables,
                )

        (_, aux), (dense_gradients, row_gradients) = jax.value_and_grad(loss, (0, 1), has_aux=True)(dense, gathered)
        unscaled_loss, y_pred, non_trainable, metrics = aux
        gradients = [
            RowGradient(rows[number], row_gradients[number]) if number in rows else dense_gradients[number]
            for number in range(len(trainable))
        ]
        trainable, optimizer_variables = self.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
        logs, metrics = self._update_metrics_variables(metrics, unscaled_loss, x, y, y_pred, sample_weight)
        return logs, (trainable, non_trainable, optimizer_variables, metrics)


def _distinct_rows(indices: list[Any], count: int) -> tuple[Any, list[Any]]:
    """The different rows among indices under JAX, and the indices as places in them; row 0, "unknown", is the first.

    There are as many as indices and one more: different numbers from `count` on fill up.
    """
    from jax import numpy as jnp

    # Layers may put 0 in the place of an index.
    flat = jnp.concatenate([jnp.zeros(1, "int32"), *(jnp.ravel(column) for column in indices)])
    rows, places = jnp.unique(flat, return_inverse=True, size=flat.size, fill_value=count)
    rows = jnp.where(rows == count, count + jnp.arange(flat.size), rows)
    ends = np.cumsum([column.size for column in indices])[:-1]
    parts = jnp.split(places[1:], ends)
    return rows, [part.reshape(column.shape) for part, column in zip(parts, indices, strict=True)]


def row_sparse(model: MultiTaskModel, schema: Schema) -> tuple[RowSparseModel, list[str]]:
    """A model to train with `RowSparseAdam`, made of the layers of one with these features, and paths of its tables."""
    lookups: dict[str, list[str]] = {}
    for feature in schema.features:
        if not feature.is_dense:
            lookups.setdefault(f"embedding_{feature.table}", []).append(feature.name)
    trained = RowSparseModel(model.input, model.output, name=model.name)
    trained.lookups = lookups
    layers = [trained.get_layer(name) for name in lookups]
    for layer in layers:
        layer.row_gradients = True
    return trained, [layer._embeddings.path for layer in layers]
