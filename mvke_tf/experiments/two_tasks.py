# SPDX-License-Identifier: Apache-2.0
"""The synthetic two-task regression data of the MMoE paper, whose tasks are as related as one asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mvke_tf.errors import ConfigError

# Frequencies and phases of the sinusoids. The paper leaves them open.
ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0)
BETAS = (0.5, 1.0, 1.5, 2.0, 2.5)


@dataclasses.dataclass(frozen=True)
class TwoTaskRegression:
    """Data of two regression tasks.

    Args:
        features: x `(n, d)`, float32.
        labels: y1 and y2 `(n, 2)`, float32.
        weights: w1 and w2 `(2, d)`, float64.
    """

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def two_task_regression(
    num_rows: int,
    correlation: float,
    num_features: int = 100,
    scale: float = 1.0,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
    noise_variance: float = 0.01,
    seed: int = 0,
) -> TwoTaskRegression:
    """Two regression tasks whose weight vectors have a chosen cosine.

        u1, u2 orthogonal unit vectors, w1 = c u1, w2 = c (p u1 + sqrt(1 - p²) u2)
        x ~ N(0, I), y_t = w_tᵀx + Σ_i sin(alpha_i w_tᵀx + beta_i) + noise, noise ~ N(0, noise_variance)

    The cosine p of the weights is not the correlation of the labels, which rises with it (p = 0: none; p = 1: all but
    the noise).

    Args:
        num_rows: Number n of examples.
        correlation: Cosine p of the weight vectors.
        num_features: Number d of features, at least 2.
        scale: Length c of the weight vectors.
        alphas: Frequency of each sinusoid.
        betas: Phase of each sinusoid.
        noise_variance: Variance of the noise of each label.
        seed: Seed of the vectors, the features and the noise. Of one seed, vectors u1, u2, features and noise are the
            same for every `correlation`.

    Raises:
        ConfigError: If `correlation` lies outside [-1, 1], phases and frequencies differ in number, or a size
            is too small.

    Reference: Ma et al., KDD 2018, section 3.2.
    """
    if not -1.0 <= correlation <= 1.0:
        raise ConfigError(f"`correlation` is a cosine in [-1, 1]. Received: {correlation}")
    if num_rows < 1 or num_features < 2 or noise_variance < 0.0:
        raise ConfigError(
            "Expected at least one row, two features and a variance of 0 or more. "
            f"Received: num_rows={num_rows}, num_features={num_features}, noise_variance={noise_variance}"
        )
    if len(alphas) != len(betas):
        raise ConfigError(f"Expected as many phases as frequencies. Received: {len(betas)} and {len(alphas)}")
    rng = np.random.default_rng(seed)
    first, second = np.linalg.qr(rng.normal(size=(num_features, 2)))[0].T
    weights = scale * np.stack([first, correlation * first + np.sqrt(1.0 - correlation**2) * second])
    features = rng.normal(size=(num_rows, num_features))
    linear = features @ weights.T
    waves = sum(np.sin(alpha * linear + beta) for alpha, beta in zip(alphas, betas, strict=True))
    labels = linear + waves + rng.normal(scale=np.sqrt(noise_variance), size=linear.shape)
    return TwoTaskRegression(features.astype("float32"), labels.astype("float32"), weights)
