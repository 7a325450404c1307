"""Other models, other tasks and another problem than MovieLens."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.data.features import Encoder, RawFeature
from mvke_tf.models import build_model
from mvke_tf.models.two_tower import gate_model
from mvke_tf.schema import Task
from mvke_tf.serving import Catalogue, Serving, export_saved_model
from mvke_tf.training import build_training_model
from tests.serving.helpers import assert_close, predicted, rows_of

FEATURES = (
    RawFeature("country", "user", "string"),
    RawFeature("clicked", "user", "string", length=3, shares="ad"),
    RawFeature("ad", "item", "string"),
    RawFeature("price", "item", "number", bins=3),
)
TABLES = {
    "user": {
        "country": np.array(["fr", "de", "fr", "xx"], object),
        "clicked": np.array([["a", "b"], ["c", ""], ["a", "q"], ["", ""]], object),
        "clicked_weights": np.array([[1, 1], [2, 0], [1, 3], [0, 0]], np.float32),
    },
    "item": {
        "ad": np.array(["a", "b", "c", "d", "new"], object),
        "price": np.array([1.0, 5.0, 20.0, np.nan, 3.0], np.float32),
    },
}
FEATURE_DTYPES = {"country": "string", "clicked": "string", "clicked_weights": "float32"}
TASKS = (Task("click"), Task("sale", given="click"), Task("stars", kind="regression", offset=3.5))
CATALOGUE = Catalogue(TABLES["item"]["ad"], TABLES["item"], ["Ad A", "Ad B", "Ad C", "Ad D", "Ad new"])


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(FEATURES, TABLES, {"user": np.arange(3), "item": np.arange(4)})


def build(encoder: Encoder, name: str, tasks=TASKS) -> keras.Model:
    config = ModelConfig(name, embedding_dim=4, hidden_dims=(6,), num_experts=4, embedding_stddev=1.0)
    keras.utils.set_random_seed(2)
    return build_model(name, encoder.schema(tuple(tasks)), config)


def wanted(model: keras.Model, encoder: Encoder) -> dict[str, np.ndarray]:
    """What the Keras model predicts of all users with all items, `{task: (4, 5)}`."""
    users, items = (
        {name: column.numpy() for name, column in encoder.encode(TABLES[side], side).items()}
        for side in ("user", "item")
    )
    pairs = rows_of(users, np.repeat(np.arange(4), 5)) | rows_of(items, np.tile(np.arange(5), 4))
    return {task: values.reshape(4, 5) for task, values in predicted(model, pairs).items()}


@pytest.fixture(scope="module")
def conditional(encoder) -> keras.Model:
    """An MMoE with a task that comes after another one and a regression task."""
    return build(encoder, "mmoe")


@pytest.fixture(scope="module")
def ask(conditional, encoder, elsewhere, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    path = export_saved_model(conditional, encoder, folder, CATALOGUE)

    def ask(signature: str, **inputs):
        return elsewhere.ask(path, signature, inputs)

    ask.described = json.loads((path / "signatures.json").read_text(encoding="utf-8"))
    return ask


def test_conditional_and_regression_tasks(conditional, encoder, ask):
    predictions = wanted(conditional, encoder)
    assert (predictions["sale"] < predictions["click"]).all() and predictions["stars"].min() > 1
    assert min(np.ptp(values) for values in predictions.values()) > 0.01
    ids = np.tile(CATALOGUE.ids, (4, 1))
    assert_close(ask("score_ids", **TABLES["user"], item_ids=ids), predictions)
    pairs = rows_of(TABLES["user"], np.repeat(np.arange(4), 5)) | rows_of(TABLES["item"], np.tile(np.arange(5), 4))
    assert_close(ask("serving_default", **pairs), {task: values.ravel() for task, values in predictions.items()})


def test_products_of_conditional_and_regression_tasks(conditional, encoder, ask):
    predictions = wanted(conditional, encoder)
    users, items = ask("user_vectors", **TABLES["user"]), ask("item_vectors", **TABLES["item"])
    products = {task: users[f"user_vector_{task}"] @ items[f"item_vector_{task}"].T for task in predictions}
    click, sale_given_click = (1 / (1 + np.exp(-products[task])) for task in ("click", "sale"))
    np.testing.assert_allclose(click, predictions["click"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(click * sale_given_click, predictions["sale"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(products["stars"] + 3.5, predictions["stars"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["click", "sale", "stars"])
def test_recommend_by_each_task(conditional, encoder, ask, task):
    exclude = np.array([["a"], ["d"], [""], ["zz"]])
    answer = ask("recommend", **TABLES["user"], k=5, task=task, exclude=exclude)
    values = wanted(conditional, encoder)[task]
    for row, left_out in enumerate(exclude[:, 0]):
        order = [n for n in np.argsort(-values[row], kind="stable") if CATALOGUE.ids[n] != left_out]
        empty = 5 - len(order)
        assert answer["item_ids"][row].tolist() == [CATALOGUE.ids[n].encode() for n in order] + [b""] * empty
        assert answer["titles"][row].tolist() == [CATALOGUE.titles[n].encode() for n in order] + [b""] * empty
        np.testing.assert_allclose(answer["predictions"][row], [*values[row][order]] + [0.0] * empty, rtol=0, atol=1e-6)


def test_gates_of_the_user_side(conditional, encoder, ask):
    weights = gate_model(conditional)(encoder.encode(TABLES["user"], "user"))
    answer = ask("gate_weights", **TABLES["user"])
    assert_close(answer, {f"gate_{task}": values.numpy() for task, values in weights.items()})
    assert answer["gate_sale"].shape == (4, 4) and np.ptp(answer["gate_sale"]) > 1e-4


def test_signatures_json_says_what_conditional_and_regression_tasks_are(ask):
    assert ask.described["tasks"] == {
        "click": {"kind": "binary", "given": None, "prediction": "probability of click"},
        "sale": {"kind": "binary", "given": "click", "prediction": "probability of sale (of click and then sale)"},
        "stars": {"kind": "regression", "given": None, "prediction": "value of stars, in the unit of its label"},
    }
    vectors = ask.described["signatures"]["user_vectors"]["outputs"]
    assert vectors["user_vector_sale"]["description"].endswith("is the logit of sale given click")
    assert vectors["user_vector_stars"]["description"].endswith("+ 3.5 is the value of stars")
    assert ask.described["catalogue"] == {"items": 5, "id_dtype": "string", "padding_id": ""}


@pytest.mark.parametrize(("name", "tasks"), [("shared_bottom", TASKS), ("single_task", TASKS[:1])])
def test_a_model_without_gates_has_all_other_signatures(encoder, name, tasks):
    model = build(encoder, name, tasks)
    serving = Serving(model, encoder, CATALOGUE)
    signatures = serving.signatures()
    assert sorted(signatures) == ["item_vectors", "recommend", "score_ids", "serving_default", "user_vectors"]
    assert serving.left_out() == [f"Without the signature gate_weights: {name} has no gates."]
    users = {name: tf.constant(column.tolist(), FEATURE_DTYPES[name]) for name, column in TABLES["user"].items()}
    ids = tf.constant([CATALOGUE.ids.tolist()] * 4)
    answer = signatures["score_ids"].concrete()(**users, item_ids=ids)
    assert_close({task: values.numpy() for task, values in answer.items()}, wanted(model, encoder))


def test_without_a_catalogue_nothing_is_known_by_id(encoder, conditional):
    serving = Serving(conditional, encoder)
    assert sorted(serving.signatures()) == ["gate_weights", "item_vectors", "serving_default", "user_vectors"]
    assert serving.left_out() == ["Without the signatures score_ids and recommend: no catalogue of items was given."]
    assert serving.describe_catalogue() is None


def test_a_feature_must_not_have_the_name_of_another_input(tmp_path):
    features = (RawFeature("k", "user", "integer"), RawFeature("ad", "item", "string"))
    tables = {"user": {"k": np.array([1, 2])}, "item": {"ad": TABLES["item"]["ad"]}}
    encoder = Encoder.fit(features, tables, {"user": np.arange(2), "item": np.arange(5)})
    model = build(encoder, "hard_sharing")
    with pytest.raises(ValueError, match=r"rename the feature.*Received: \['k'\]"):
        export_saved_model(model, encoder, tmp_path, Catalogue(tables["item"]["ad"], tables["item"]))
    assert "recommend" not in Serving(model, encoder).signatures()


def test_vectors_of_damaged_weights_are_refused(encoder):
    model = build(encoder, "single_task", TASKS[:1])
    model.get_layer("embedding_ad").set_weights([np.full((5, 4), np.nan)])
    with pytest.raises(ValueError, match=r"finite item vectors.*\['click'\]; the weights are damaged"):
        Serving(model, encoder, CATALOGUE)


@pytest.mark.parametrize(
    ("ids", "titles", "message"),
    [
        ([1, 2, 3, 4, 1], None, r"Received twice: \[1\]"),
        ([1, 2, 3, 4, -1], None, "-1 is reserved"),
        (["a", "b", "c", "d", ""], None, "'' is reserved"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], None, r"integers or of strings\. Received: float64"),
        ([1, 2, 3, 4], None, r"one row for each of the 4 ids .*'ad': 5, 'price': 5"),
        ([1, 2, 3, 4, 5], ["one"], r"one row for each of the 5 ids .*\{'titles': 1\}"),
    ],
)
def test_a_catalogue_that_cannot_be_used(ids, titles, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(ids, TABLES["item"], titles)


def test_titles_are_the_ids_where_there_are_none():
    assert Catalogue([5, 3, 4, 2, 1], TABLES["item"]).titles.tolist() == ["5", "3", "4", "2", "1"]


def test_every_door_of_a_half_precision_model_with_uncertainty_weights(encoder):
    """Heads are float32 under every policy, so the doors agree and nothing is rounded behind them."""
    config = ModelConfig("mmoe", embedding_dim=4, hidden_dims=(6,), num_experts=4, embedding_stddev=1.0)
    settings = TrainingConfig(precision="mixed_bfloat16", loss_weighting="uncertainty")
    model, _ = build_training_model(RunConfig(model=config, training=settings), encoder.schema(TASKS), 1)
    served = Serving(model, encoder, CATALOGUE)
    users = {name: tf.convert_to_tensor(column) for name, column in TABLES["user"].items()}
    scores = served.score_ids(item_ids=tf.constant([list(TABLES["item"]["ad"])] * 4), **users)
    for task, values in wanted(model, encoder).items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(scores[task], values, rtol=0, atol=1e-6)
        # Half precision would leave a handful of values.
        assert len(np.unique(values)) > 0.7 * values.size
