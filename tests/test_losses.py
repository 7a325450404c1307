import keras
import numpy as np
import pytest
from keras import ops

from mvke_tf.losses import (
    TaskUncertainty,
    UncertaintyLoss,
    task_loss,
    task_losses,
    uncertainty_layer,
    with_uncertainty,
)
from mvke_tf.models.dense_mmoe import build_mmoe
from tests.layer_checks import assert_close, loss_and_gradients

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


def bound_loss(kind: str, log_variance: float) -> tuple[UncertaintyLoss, TaskUncertainty]:
    layer = TaskUncertainty(("other", "task"))
    layer.build()
    layer.log_variances.assign([9.0, log_variance])
    loss = UncertaintyLoss("task", kind)
    loss.bind(layer)
    return loss, layer


@pytest.mark.parametrize(
    ("kind", "values", "factor"), [("binary", CROSS_ENTROPY, 1.0), ("regression", SQUARED_ERROR, 0.5)]
)
def test_uncertainty_loss_by_hand_and_its_gradient(kind, values, factor):
    loss, layer = bound_loss(kind, 0.3)
    mean = values[[0, 2]].mean()

    def function(_):
        return loss(LABELS, OUTPUTS, sample_weight=WEIGHTS), None

    value, _, _, (gradient,) = loss_and_gradients(function, {}, [layer.log_variances])
    assert value == pytest.approx(factor * np.exp(-0.3) * mean + 0.15, rel=1e-6)
    assert_close(gradient, [0.0, 0.5 - factor * np.exp(-0.3) * mean])


def test_the_best_log_variance_is_that_of_the_noise():
    """Of a regression task, s = ln(mean squared error): there the gradient is zero."""
    loss, layer = bound_loss("regression", float(np.log(SQUARED_ERROR.mean())))
    *_, (gradient,) = loss_and_gradients(lambda _: (loss(LABELS, OUTPUTS), None), {}, [layer.log_variances])
    assert_close(gradient, [0.0, 0.0], floor=1e-6)


def test_a_loss_that_no_model_was_compiled_with():
    with pytest.raises(ValueError, match="uncertainty loss of 'click' knows no log-variance"):
        UncertaintyLoss("click", "binary")(LABELS, OUTPUTS)


def small_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,), name="x")
    return keras.Model(inputs, {task: keras.layers.Dense(1, name=task)(inputs) for task in KINDS}, name="small")


def test_without_uncertainty_the_losses_are_plain():
    model = small_model()
    losses = task_losses(model, KINDS)
    assert uncertainty_layer(model) is None
    assert [type(losses[task]) for task in KINDS] == [
        keras.losses.BinaryCrossentropy,
        keras.losses.MeanSquaredError,
    ]


@pytest.mark.parametrize("uncertain", [False, True])
def test_kinds_that_do_not_fit_are_refused(uncertain):
    model = with_uncertainty(small_model()) if uncertain else small_model()
    with pytest.raises(
        ValueError, match=r"must name the tasks of .*\['click', 'stars'\]. Received: \['clik', 'stars'\]"
    ):
        task_losses(model, {"clik": "binary", "stars": "regression"})
    with pytest.raises(ValueError, match=r"one of \('binary', 'regression'\). Received: 'bianry'"):
        task_losses(model, {"click": "bianry", "stars": "regression"})
    if uncertain:
        with pytest.raises(ValueError, match=r"Received: \['stars'\]"):
            task_losses(model, {"stars": "regression"})
        with pytest.raises(ValueError, match="has log-variances already"):
            with_uncertainty(model)
    else:
        assert list(task_losses(model, {"stars": "regression"})) == ["stars"]


def test_outputs_that_are_no_tasks_have_no_log_variance():
    """Gate weights, for example, pass unchanged, and `fit` asks for no labels of theirs."""
    plain = build_mmoe(3, 2, 2, (4,), (), return_expert_weights=True)
    with pytest.raises(ValueError, match=r"Received the tasks: \['task_2'\]"):
        with_uncertainty(plain, tasks=["task_2"])
    model = with_uncertainty(plain, tasks=["task_0", "task_1"])
    assert set(uncertainty_layer(model).by_task()) == {"task_0", "task_1"}
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    model.compile("adam", loss=task_losses(model, {"task_0": "regression", "task_1": "regression"}))
    model.fit(x, {"task_0": x[:, :1], "task_1": x[:, 1:2]}, epochs=2, verbose=0)
    assert all(value != 0.0 for value in uncertainty_layer(model).by_task().values())
    gates = ops.convert_to_numpy(model(x)["task_1_expert_weights"])
    np.testing.assert_array_equal(gates, ops.convert_to_numpy(plain(x)["task_1_expert_weights"]))


def test_log_variances_learn_and_survive_saving(tmp_path):
    """`model.fit` by hand: a task with noise gets a larger log-variance; a loaded model goes on where it was."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 3)).astype("float32")
    labels = {"click": (x[:, :1] > 0).astype("float32"), "stars": 3.0 * rng.normal(size=(256, 1)).astype("float32")}
    plain = small_model()
    model = with_uncertainty(plain)
    for task, output in plain(x).items():
        np.testing.assert_array_equal(ops.convert_to_numpy(model(x)[task]), ops.convert_to_numpy(output))
    model.compile(keras.optimizers.Adam(0.05), loss=task_losses(model, KINDS))
    model.fit(x, labels, epochs=40, batch_size=64, verbose=0)
    learned = uncertainty_layer(model).by_task()
    assert learned["click"] < 0 < 1.0 < learned["stars"] < np.log(12.0)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert uncertainty_layer(loaded).by_task() == learned
    assert loaded.evaluate(x, labels, verbose=0) == pytest.approx(model.evaluate(x, labels, verbose=0))
    for one in (model, loaded):
        one.fit(x, labels, batch_size=256, epochs=2, verbose=0)
    after = uncertainty_layer(loaded).by_task()
    assert after["stars"] != learned["stars"]
    assert after == pytest.approx(uncertainty_layer(model).by_task(), abs=1e-6)
