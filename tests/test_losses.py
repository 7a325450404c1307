# SPDX-License-Identifier: Apache-2.0
import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.losses import task_loss, task_losses, uncertainty_weight
from mvke_tf.models import MultiTaskModel, build_mmoe, with_uncertainty
from tests.layer_checks import assert_close, loss_and_gradients
from tests.models.problems import JIT_COMPILE

LABELS = np.array([[1.0], [0.0], [1.0]], "float32")
OUTPUTS = np.array([[0.5], [2.0], [-1.0]], "float32")
WEIGHTS = np.array([[1.0], [0.0], [1.0]], "float32")
CROSS_ENTROPY = np.log1p(np.exp(-np.where(LABELS == 1, OUTPUTS, -OUTPUTS)))
SQUARED_ERROR = (LABELS - OUTPUTS) ** 2
KINDS = {"click": "binary", "stars": "regression"}


@pytest.mark.parametrize(("kind", "expected"), [("binary", CROSS_ENTROPY), ("regression", SQUARED_ERROR)])
def test_task_loss_is_the_mean_over_the_rows_that_count(kind, expected):
    loss = task_loss(kind)
    assert_close(loss(LABELS, OUTPUTS), expected.mean())
    assert_close(loss(LABELS, OUTPUTS, sample_weight=WEIGHTS), expected[[0, 2]].mean())
    assert float(loss(LABELS, OUTPUTS, sample_weight=0 * WEIGHTS)) == 0.0


def test_losses_of_counts_and_classes_by_hand():
    labels = np.array([[2.0], [0.0], [1.0]])
    expected = np.exp(OUTPUTS) - labels * OUTPUTS
    assert_close(task_loss("count")(labels, OUTPUTS, sample_weight=WEIGHTS), expected[[0, 2]].mean())
    logits = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -(log_probabilities[0, 2] + log_probabilities[2, 1]) / 2
    assert_close(task_loss("multiclass")(labels, logits, sample_weight=WEIGHTS), expected)


def small_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,), name="x")
    return keras.Model(inputs, {task: keras.layers.Dense(1, name=task)(inputs) for task in KINDS}, name="small")


def test_losses_by_kind():
    losses = task_losses(KINDS)
    assert [type(losses[task]) for task in KINDS] == [keras.losses.BinaryCrossentropy, keras.losses.MeanSquaredError]
    with pytest.raises(
        ValueError, match=r"one of \('binary', 'regression', 'count', 'multiclass'\). Received: 'bianry'"
    ):
        task_losses({"click": "bianry"})


def test_uncertainty_weight_by_hand():
    assert float(uncertainty_weight(np.float32(0.3), "binary")) == pytest.approx(np.exp(-0.3))
    assert float(uncertainty_weight(np.float32(0.3), "regression")) == pytest.approx(np.exp(-0.3) / 2)


def test_the_loss_of_a_model_with_log_variances_by_hand_and_its_gradient():
    model = with_uncertainty(small_model())
    model.compile(loss=task_losses(KINDS))
    model.log_variances.log_variances.assign([0.3, -0.7])
    outputs, labels = {"click": OUTPUTS, "stars": 2 * OUTPUTS}, {"click": LABELS, "stars": LABELS}
    errors = (LABELS - 2 * OUTPUTS) ** 2

    def function(_):
        return model.compute_loss(None, labels, outputs, {"click": WEIGHTS, "stars": 2 - WEIGHTS}), None

    value, _, _, (gradient,) = loss_and_gradients(function, {}, [model.log_variances.log_variances])
    click, stars = CROSS_ENTROPY[[0, 2]].mean(), np.average(errors, weights=2 - WEIGHTS)
    parts = [np.exp(-0.3) * click, np.exp(0.7) * stars / 2]
    assert value == pytest.approx(sum(parts) + 0.15 - 0.35, rel=1e-5)
    assert_close(gradient, [0.5 - parts[0], 0.5 - parts[1]])


def test_the_best_log_variance_is_that_of_the_noise():
    """Of a regression task, s = ln(mean squared error): there the gradient is zero."""
    model = with_uncertainty(small_model(), tasks=["stars"])
    model.compile(loss=task_losses({"stars": "regression"}))
    model.log_variances.log_variances.assign([np.log(SQUARED_ERROR.mean())])
    pair = {"stars": LABELS}, {"stars": OUTPUTS, "click": OUTPUTS}
    *_, (gradient,) = loss_and_gradients(
        lambda _: (model.compute_loss(None, *pair), None), {}, [model.log_variances.log_variances]
    )
    assert_close(gradient, [0.0], floor=1e-6)


@pytest.mark.parametrize("loss", ["mse", task_losses({"click": "binary"})])
def test_log_variances_need_the_losses_of_their_tasks(loss):
    with pytest.raises(ValueError, match=r"a loss for each of its tasks, \['click', 'stars'\]: .* Received: "):
        with_uncertainty(small_model()).compile(loss=loss)


def test_log_variances_leave_no_place_for_fixed_weights():
    with pytest.raises(ValueError, match=r"without `loss_weights`. Received: {'click': 2.0"):
        with_uncertainty(small_model()).compile(loss=task_losses(KINDS), loss_weights={"click": 2.0, "stars": 1.0})


def test_log_variances_are_given_once():
    model = with_uncertainty(small_model())
    assert isinstance(model, MultiTaskModel) and model.name == "small"
    with pytest.raises(ValueError, match="has log-variances already"):
        with_uncertainty(model)


@pytest.mark.slow
def test_outputs_that_are_no_tasks_have_no_log_variance():
    """Gate weights, for example, pass unchanged, and `fit` asks for no labels of theirs."""
    plain = build_mmoe(3, 2, 2, (4,), (), return_expert_weights=True)
    with pytest.raises(ValueError, match=r"Received the tasks: \['task_2'\]"):
        with_uncertainty(plain, tasks=["task_2"])
    model = with_uncertainty(plain)
    assert set(model.log_variances.by_task()) == {"task_0", "task_1"}
    assert model.experts_of("task_0") == (0, 1)
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    losses = task_losses({"task_0": "regression", "task_1": "regression"})
    model.compile("adam", loss=losses, jit_compile=JIT_COMPILE)
    model.fit(x, {"task_0": x[:, :1], "task_1": x[:, 1:2]}, epochs=2, verbose=0)
    assert all(value != 0.0 for value in model.log_variances.by_task().values())
    gates = ops.convert_to_numpy(model(x)["task_1_expert_weights"])
    np.testing.assert_array_equal(gates, ops.convert_to_numpy(plain(x)["task_1_expert_weights"]))


@pytest.mark.slow
def test_log_variances_learn_and_survive_saving(tmp_path):
    """`model.fit` by hand: a task with noise gets a larger log-variance; a loaded model goes on where it was."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 3)).astype("float32")
    labels = {"click": (x[:, :1] > 0).astype("float32"), "stars": 3.0 * rng.normal(size=(256, 1)).astype("float32")}
    plain = small_model()
    model = with_uncertainty(plain)
    for task, output in plain(x).items():
        np.testing.assert_array_equal(ops.convert_to_numpy(model(x)[task]), ops.convert_to_numpy(output))
    model.compile(keras.optimizers.Adam(0.05), loss=task_losses(KINDS), jit_compile=JIT_COMPILE)
    model.fit(x, labels, epochs=40, batch_size=64, verbose=0)
    learned = model.log_variances.by_task()
    assert learned["click"] < 0 < 1.0 < learned["stars"] < np.log(12.0)
    logs = model.evaluate(x, labels, return_dict=True, verbose=0)
    # Reported are the losses of the tasks themselves, and their weighted sum.
    assert logs["stars_loss"] == pytest.approx(np.mean((labels["stars"] - numpy(model(x)["stars"])) ** 2), rel=1e-4)
    weighted = np.exp(-learned["click"]) * logs["click_loss"] + np.exp(-learned["stars"]) * logs["stars_loss"] / 2
    assert logs["loss"] == pytest.approx(weighted + sum(learned.values()) / 2, rel=1e-4)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.log_variances.by_task() == learned
    assert loaded.evaluate(x, labels, return_dict=True, verbose=0) == pytest.approx(logs)
    for one in (model, loaded):
        one.fit(x, labels, batch_size=256, epochs=2, verbose=0)
    after = loaded.log_variances.by_task()
    assert after["stars"] != learned["stars"]
    assert after == pytest.approx(model.log_variances.by_task(), abs=1e-6)


def numpy(tensor):
    return ops.convert_to_numpy(tensor)
