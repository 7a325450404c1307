# SPDX-License-Identifier: Apache-2.0
"""The scoring heads that every two-tower model shares: from user and item vectors to logits and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from mvke_tf.schema import TRANSFORMS


@keras.saving.register_keras_serializable(package="mvke_tf")
class RowDot(keras.layers.Layer):
    """The inner product of each user vector with the item vector of the same row: the logit of a binary task.

    Call arguments:
        user: User vectors `(B, W)`.
        item: Item vectors `(B, W)`.

    Returns:
        Logits `(B, 1)`, in nats.

    Raises:
        ValueError: If the widths differ.

    Example:

    >>> RowDot()(np.ones((2, 3)), np.ones((2, 3)))
    <tf.Tensor: shape=(2, 1), dtype=float32, numpy=
    array([[3.],
           [3.]], dtype=float32)>
    """

    kind = "binary"

    def build(self, user_shape, item_shape) -> None:
        if user_shape[-1] != item_shape[-1]:
            raise ValueError(
                f"{self.name}: user and item vectors need the same width. "
                f"Received: {tuple(user_shape)} and {tuple(item_shape)}"
            )
        super().build(user_shape)

    def call(self, user, item):
        return self.from_product(ops.expand_dims(self.product(user, item), -1))

    def product(self, user, item):
        """What the vectors `(..., W)` of a user and an item meet in: their inner product `(...)`."""
        return ops.sum(user * item, axis=-1)

    def from_product(self, product):
        """The output for an inner product, elementwise: what exact scoring of all pairs by one matrix product needs."""
        return product

    def prediction(self, output):
        """The probability for an output, elementwise."""
        return ops.sigmoid(output)

    def compute_output_shape(self, user_shape, item_shape):
        return (user_shape[0], 1)


@keras.saving.register_keras_serializable(package="mvke_tf")
class RegressionHead(RowDot):
    """The value of a regression task: the inner product of user and item vector plus a constant.

    Args:
        offset: The constant, for example the mean label.
        transform: None, or `"log1p"` if the labels in training are log(1 + label); outputs are on that scale too, and
            `prediction` undoes it.

    Call arguments:
        user: User vectors `(B, W)`.
        item: Item vectors `(B, W)`.

    Returns:
        Values `(B, 1)`, in the (transformed) unit of the label.

    Raises:
        ValueError: If the widths differ, or `transform` is unknown.

    Example:

    >>> head = RegressionHead(offset=3.5)
    >>> head(np.zeros((1, 3)), np.ones((1, 3)))
    <tf.Tensor: shape=(1, 1), dtype=float32, numpy=array([[3.5]], dtype=float32)>
    >>> round(float(RegressionHead(transform="log1p").prediction(np.log(8.0))), 4)
    7.0
    """

    kind = "regression"

    def __init__(self, offset: float = 0.0, transform: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if transform not in (None, *TRANSFORMS):
            raise ValueError(f"`transform` must be None or one of {TRANSFORMS}. Received: {transform!r}")
        self.offset = float(offset)
        self.transform = transform

    def from_product(self, product):
        return product + self.offset

    def prediction(self, output):
        """The value for an output, elementwise, in the unit of the label."""
        return output if self.transform is None else ops.expm1(output)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "offset": self.offset, "transform": self.transform}


@keras.saving.register_keras_serializable(package="mvke_tf")
class CountHead(RegressionHead):
    """The logarithm of the Poisson rate of a count task: the inner product of user and item vector plus a constant.

    Args:
        offset: The constant, for example the logarithm of the mean label.

    Call arguments:
        user: User vectors `(B, W)`.
        item: Item vectors `(B, W)`.

    Returns:
        Logarithms of rates `(B, 1)`; `prediction` makes rates of them, in the unit of the label.

    Raises:
        ValueError: If the widths differ.

    Example:

    >>> round(float(CountHead().prediction(np.log(8.0))), 4)
    8.0
    """

    kind = "count"

    def prediction(self, output):
        """The rate for an output, elementwise."""
        return ops.exp(output)


@keras.saving.register_keras_serializable(package="mvke_tf")
class ClassHead(RowDot):
    """The logits of a multi-class task: one inner product per class, of which each weighs the entries by a vector.

        logit_c = Σ_w user_w item_w a_cw + b_c = ⟨user, a_c ⊙ item⟩ + b_c

    So class c has an item vector of its own, `a_c ⊙ item`, of one item tower; `a` and `b` are trained. (The bilinear
    form of DistMult, Yang et al., ICLR 2015, with a class in the place of a relation.)

    Args:
        classes: Names of the C classes.

    Call arguments:
        user: User vectors `(B, W)`.
        item: Item vectors `(B, W)`.

    Returns:
        Logits `(B, C)`, in nats; their softmax is the probability of each class.

    Raises:
        ValueError: If the widths differ.

    Example:

    >>> ClassHead(("low", "high"))(np.ones((3, 2)), np.ones((3, 2))).shape
    TensorShape([3, 2])
    """

    kind = "multiclass"

    def __init__(self, classes: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = tuple(classes)

    def build(self, user_shape, item_shape) -> None:
        count = len(self.classes)
        self.class_vectors = self.add_weight(
            shape=(count, user_shape[-1]), initializer=keras.initializers.RandomNormal(stddev=1.0), name="class_vectors"
        )
        self.class_biases = self.add_weight(shape=(count,), initializer="zeros", name="class_biases")
        super().build(user_shape, item_shape)

    def call(self, user, item):
        return self.from_product(self.product(user, item))

    def product(self, user, item):
        """The products of all classes for vectors `(..., W)`: `(..., C)`."""
        return ops.matmul(user * item, ops.transpose(self.class_vectors))

    def from_product(self, product):
        return product + self.class_biases

    def prediction(self, output):
        """The probabilities for logits `(..., C)`."""
        return ops.softmax(output, axis=-1)

    def compute_output_shape(self, user_shape, item_shape):
        return (user_shape[0], len(self.classes))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "classes": self.classes}


@keras.saving.register_keras_serializable(package="mvke_tf")
class JointLogit(keras.layers.Layer):
    """The logit of two events in a row: `logit(p(first) p(second given first))`, elementwise and without overflow.

    Args:
        given: Name of the task of the first event. Like `objective`, it is not read by `call`: a model keeps it here.
        objective: `"joint"` if training compares this logit with the labels of all rows, `"conditional"` if it compares
            the logit of the second event given the first, on the rows with the first event.

    Call arguments:
        first: Logits of the first event, of any shape.
        second: Logits of the second event given the first, of the same shape.

    Returns:
        Logits of both events, of that shape.

    Raises:
        ValueError: If `objective` is something else.

    Example:

    >>> joint = JointLogit("click")(np.zeros((1, 1)), np.zeros((1, 1)))
    >>> round(float(joint[0, 0]), 4)  # ln(0.25 / 0.75)
    -1.0986

    Reference: Ma et al., SIGIR 2018, equation 2 (ESMM).
    """

    kind = "binary"

    def __init__(self, given: str, objective: str = "joint", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if objective not in ("joint", "conditional"):
            raise ValueError(f"`objective` must be 'joint' or 'conditional'. Received: {objective!r}")
        self.given = given
        self.objective = objective

    def build(self, first_shape, second_shape) -> None:
        super().build(first_shape)

    def call(self, first, second):
        both = -ops.softplus(-first) - ops.softplus(-second)
        # Not both: no first event, or a first without a second one.
        ways = [-ops.softplus(first), -ops.softplus(-first) - ops.softplus(second)]
        # Under TensorFlow, the gradient of `logaddexp` is wrong where its arguments are equal.
        return both - ops.logsumexp(ops.stack(ways, axis=-1), axis=-1)

    def prediction(self, output):
        """The probability for an output, elementwise."""
        return ops.sigmoid(output)

    def compute_output_shape(self, first_shape, second_shape):
        return tuple(first_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "given": self.given, "objective": self.objective}


@keras.saving.register_keras_serializable(package="mvke_tf")
class GatherRows(keras.layers.Layer):
    """Rows of a table of vectors, by index: takes vectors of distinct entities back to the pairs of a batch.

    Call arguments:
        vectors: `(N, W)`, one row per distinct entity.
        rows: Integer indices `(B,)` into the first axis.

    Returns:
        `(B, W)`.

    Example:

    >>> GatherRows()(np.eye(2), np.array([1, 0, 1])).shape
    TensorShape([3, 2])
    """

    def build(self, vectors_shape, rows_shape) -> None:
        super().build(vectors_shape)

    def call(self, vectors, rows):
        return ops.take(vectors, rows, axis=0)

    def compute_output_shape(self, vectors_shape, rows_shape):
        return (rows_shape[0], vectors_shape[-1])
