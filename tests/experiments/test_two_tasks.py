# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from mvke_tf.experiments.two_tasks import two_task_regression


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.5, 0.9, 1.0])
def test_the_cosine_of_the_weights_is_the_correlation(correlation):
    first, second = two_task_regression(1, correlation, num_features=20, scale=3.0, seed=4).weights
    assert np.linalg.norm(first) == pytest.approx(3.0)
    assert np.linalg.norm(second) == pytest.approx(3.0)
    assert first @ second / 9.0 == pytest.approx(correlation, abs=1e-12)


def test_labels_by_hand():
    data = two_task_regression(50, 0.6, 8, alphas=(2.0, 0.0), betas=(0.25, np.pi / 2), noise_variance=0.0)
    linear = data.features.astype(np.float64) @ data.weights.T
    np.testing.assert_allclose(data.labels, linear + np.sin(2.0 * linear + 0.25) + 1.0, atol=1e-5)
    assert data.features.dtype == data.labels.dtype == np.float32


def test_noise_has_its_variance():
    clean, noisy = (two_task_regression(20_000, 0.3, 5, noise_variance=v).labels for v in (0.0, 0.01))
    noise = noisy - clean
    np.testing.assert_allclose(noise.var(axis=0), 0.01, rtol=0.05)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.03


def test_labels_correlate_more_the_closer_the_weights():
    data = [two_task_regression(20_000, p, seed=1) for p in (0.0, 0.5, 0.9, 1.0)]
    correlations = [np.corrcoef(one.labels.T)[0, 1] for one in data]
    assert abs(correlations[0]) < 0.05 and correlations[-1] > 0.99
    assert np.min(np.diff(correlations)) > 0.1
    for one in data:
        np.testing.assert_array_equal(one.features, data[0].features)
    assert np.abs(data[0].features.mean()) < 0.01 and data[0].features.std() == pytest.approx(1.0, abs=0.01)


def test_a_seed_repeats_the_data():
    first, same, other = (two_task_regression(3, 0.5, seed=seed).features for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correlation": 1.1}, r"a cosine in \[-1, 1\]. Received: 1.1"),
        ({"correlation": 0.5, "num_features": 1}, "two features .* Received: num_rows=3, num_features=1"),
        ({"correlation": 0.5, "alphas": (1.0,)}, "as many phases as frequencies. Received: 5 and 1"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        two_task_regression(3, **settings)
