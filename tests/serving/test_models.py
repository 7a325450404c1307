# SPDX-License-Identifier: Apache-2.0
"""All kinds of models, tasks and items."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from mvke_tf.config import ModelConfig
from mvke_tf.data.encoder import EncodedFeature, Encoder
from mvke_tf.errors import MvkeError
from mvke_tf.inference.vectors import run_model
from mvke_tf.models import TwoTowerModel, build_model, with_uncertainty
from mvke_tf.schema import Schema, Task
from mvke_tf.serving import Catalogue, ServingModule, export_saved_model
from tests.serving.helpers import assert_close, predicted_pairs, rows_of

pytestmark = pytest.mark.slow

FEATURES = (
    EncodedFeature("country", "user", "vocabulary", "string"),
    EncodedFeature("clicked", "user", "vocabulary", "string", length=3, embedding="ad"),
    EncodedFeature("ad", "item", "vocabulary", "string"),
    EncodedFeature("price", "item", "buckets", "number", bins=3),
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
TASKS = (
    Task("click"),
    Task("sale", given="click"),
    Task("stars", kind="regression", offset=3.5),
    Task("revenue", kind="regression", offset=1.25, transform="log1p"),
)
CATALOGUE = Catalogue(TABLES["item"]["ad"], TABLES["item"], ["Ad A", "Ad B", "Ad C", "Ad D", "Ad new"])


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(FEATURES, TABLES, {"user": np.arange(3), "item": np.arange(4)})


def build(encoder: Encoder, name: str, tasks=TASKS) -> TwoTowerModel:
    config = ModelConfig(name, embedding_dim=4, hidden_dims=(6,), num_experts=4, embedding_stddev=1.0)
    keras.utils.set_random_seed(2)
    return build_model(name, Schema(encoder.schema_features(), tuple(tasks)), config)


def wanted(model: TwoTowerModel, encoder: Encoder) -> dict[str, np.ndarray]:
    """What the Keras model predicts of all users with all items, `{task: (4, 5)}`."""
    return predicted_pairs(model, *(encoder.encode_numpy(TABLES[side], side) for side in ("user", "item")))


@pytest.fixture(scope="module")
def conditional(encoder) -> TwoTowerModel:
    """An MMoE with a task that comes after another one and regression tasks."""
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
    assert predictions["revenue"].min() < 2 < predictions["revenue"].max()
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
    np.testing.assert_allclose(np.expm1(products["revenue"] + 1.25), predictions["revenue"], rtol=1e-6)


@pytest.mark.parametrize("task", ["click", "sale", "stars", "revenue"])
def test_recommend_by_each_task(conditional, encoder, ask, task):
    exclude = np.array([["a"], ["d"], [""], ["zz"]])
    answer = ask("recommend", **TABLES["user"], k=5, task=task, exclude=exclude)
    values = wanted(conditional, encoder)[task]
    for row, left_out in enumerate(exclude[:, 0]):
        order = [n for n in np.argsort(-values[row], kind="stable") if CATALOGUE.ids[n] != left_out]
        empty = 5 - len(order)
        assert answer["item_ids"][row].tolist() == [CATALOGUE.ids[n].encode() for n in order] + [b""] * empty
        assert answer["item_names"][row].tolist() == [CATALOGUE.names[n].encode() for n in order] + [b""] * empty
        np.testing.assert_allclose(answer["predictions"][row], [*values[row][order]] + [0.0] * empty, rtol=0, atol=1e-6)


def test_gates_of_the_user_side(conditional, encoder, ask):
    weights = run_model(conditional.gates, encoder.encode_numpy(TABLES["user"], "user"))
    answer = ask("gate_weights", **TABLES["user"])
    assert_close(answer, {f"gate_{task}": values for task, values in weights.items()})
    assert answer["gate_sale"].shape == (4, 4) and np.ptp(answer["gate_sale"]) > 1e-4


def test_signatures_json_says_what_conditional_and_regression_tasks_are(ask):
    assert ask.described["tasks"] == {
        "click": {"kind": "binary", "given": None, "prediction": "probability of click"},
        "sale": {"kind": "binary", "given": "click", "prediction": "probability of sale (of click and then sale)"},
        **{
            task: {"kind": "regression", "given": None, "prediction": f"value of {task}, in the unit of its label"}
            for task in ("stars", "revenue")
        },
    }
    vectors = ask.described["signatures"]["user_vectors"]["outputs"]
    assert vectors["user_vector_sale"]["description"].endswith("is the logit of sale given click")
    assert vectors["user_vector_stars"]["description"].endswith("+ 3.5 is the value of stars")
    assert vectors["user_vector_revenue"]["description"].endswith("+ 1.25 is log(1 + value of revenue)")
    assert ask.described["catalogue"] == {"items": 5, "id_dtype": "string", "padding_id": ""}


@pytest.mark.parametrize(("name", "tasks"), [("shared_bottom", TASKS), ("single_task", TASKS[:1])])
def test_a_model_without_gates_has_all_other_signatures(encoder, name, tasks):
    model = build(encoder, name, tasks)
    serving = ServingModule(model, encoder, CATALOGUE)
    signatures = serving.signatures()
    assert sorted(signatures) == ["item_vectors", "recommend", "score_ids", "serving_default", "user_vectors"]
    assert serving.left_out() == [f"Without the signature gate_weights: {name} has no gates."]
    users = {name: tf.constant(column.tolist(), FEATURE_DTYPES[name]) for name, column in TABLES["user"].items()}
    ids = tf.constant([CATALOGUE.ids.tolist()] * 4)
    answer = signatures["score_ids"].concrete()(**users, item_ids=ids)
    assert_close({task: values.numpy() for task, values in answer.items()}, wanted(model, encoder))


def test_without_a_catalogue_nothing_is_known_by_id(encoder, conditional):
    serving = ServingModule(conditional, encoder)
    assert sorted(serving.signatures()) == ["gate_weights", "item_vectors", "serving_default", "user_vectors"]
    assert serving.left_out() == [
        "Without the signatures score_ids and recommend: [keys] names no item, or no item is known."
    ]
    assert serving.describe_catalogue() is None


def test_a_feature_must_not_have_the_name_of_another_input(tmp_path):
    features = (
        EncodedFeature("k", "user", "vocabulary", "integer"),
        EncodedFeature("ad", "item", "vocabulary", "string"),
    )
    tables = {"user": {"k": np.array([1, 2])}, "item": {"ad": TABLES["item"]["ad"]}}
    encoder = Encoder.fit(features, tables, {"user": np.arange(2), "item": np.arange(5)})
    model = build(encoder, "hard_sharing")
    with pytest.raises(ValueError, match=r"rename the feature.*Received: \['k'\]"):
        export_saved_model(model, encoder, tmp_path, Catalogue(tables["item"]["ad"], tables["item"]))
    assert "recommend" not in ServingModule(model, encoder).signatures()


def test_vectors_of_damaged_weights_are_refused(encoder):
    model = build(encoder, "single_task", TASKS[:1])
    model.get_layer("embedding_ad").set_weights([np.full((5, 4), np.nan)])
    with pytest.raises(MvkeError, match=r"finite outputs of task 'click' .*; the weights are damaged"):
        ServingModule(model, encoder, CATALOGUE)


@pytest.mark.parametrize(
    ("ids", "names", "message"),
    [
        ([1, 2, 3, 4, 1], None, r"Received twice: \[1\]"),
        (["a", "b", "c", "d", ""], None, "'' is reserved"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], None, r"integers or of strings\. Received: float64"),
        ([1, 2, 3, 4], None, r"one row for each of the 4 ids .*'ad': 5, 'price': 5"),
        ([1, 2, 3, 4, 5], ["one"], r"one row for each of the 5 ids .*\{'names': 1\}"),
    ],
)
def test_a_catalogue_that_cannot_be_used(ids, names, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(ids, TABLES["item"], names)


def test_names_are_the_ids_where_there_are_none():
    assert Catalogue([5, 3, 4, 2, 1], TABLES["item"]).names.tolist() == ["5", "3", "4", "2", "1"]


def test_the_padding_is_no_id():
    assert Catalogue([5, 3, 4, 2, 1], TABLES["item"]).padding == -1
    assert Catalogue([-1, -2, 0, -4, -(2**63)], TABLES["item"]).padding == -3


def test_encoded_items_need_no_raw_ones(encoder):
    model = build(encoder, "mmoe")
    encoded = Catalogue(CATALOGUE.ids, encoded=encoder.encode_numpy(TABLES["item"], "item"))
    one, other = (ServingModule(model, encoder, catalogue).catalogue for catalogue in (CATALOGUE, encoded))
    for task, vectors in one.vectors.items():
        np.testing.assert_array_equal(vectors, other.vectors[task])
        assert vectors.shape[0] == 6
    assert other.names.numpy()[:2].tolist() == [b"a", b"b"]


def test_ids_may_be_integers(encoder, elsewhere, tmp_path):
    model = build(encoder, "mmoe")
    catalogue = Catalogue([-1, 7, 2**40, 0, 5], TABLES["item"], CATALOGUE.names)
    path = export_saved_model(model, encoder, tmp_path, catalogue)
    predictions = wanted(model, encoder)
    ids = np.tile(catalogue.ids, (4, 1))
    assert_close(elsewhere.ask(path, "score_ids", {**TABLES["user"], "item_ids": ids}), predictions)
    exclude = np.array([[7], [-2], [-2], [2**40]])
    answer = elsewhere.ask(path, "recommend", {**TABLES["user"], "k": 5, "task": "click", "exclude": exclude})
    for row, left_out in enumerate(exclude[:, 0]):
        order = [n for n in np.argsort(-predictions["click"][row], kind="stable") if catalogue.ids[n] != left_out]
        assert answer["item_ids"][row].tolist() == [*catalogue.ids[order], *[-2] * (5 - len(order))]


CONSTANT = (EncodedFeature("country", "user", "vocabulary", "string"), EncodedFeature.constant_item())


@pytest.mark.parametrize("name", ["mvke", "mmoe", "hard_sharing"])
def test_data_without_items(name, elsewhere, tmp_path, caplog):
    caplog.set_level("INFO", logger="mvke_tf.serving.export")
    users = {"country": TABLES["user"]["country"]}
    encoder = Encoder.fit(CONSTANT, {"user": users, "item": {}}, {"user": np.arange(3), "item": np.arange(1)})
    model = build(encoder, name)
    path = export_saved_model(model, encoder, tmp_path)
    described = json.loads((path / "signatures.json").read_text(encoding="utf-8"))
    gates = ["gate_weights"] if name == "mmoe" else []
    assert sorted(described["signatures"]) == [*gates, "serving_default", "user_vectors"]
    assert set(described["signatures"]["serving_default"]["inputs"]) == {"country"}
    encoded = encoder.encode_numpy(users, "user") | encoder.encode_numpy({}, "item", rows=4)
    outputs = model.predictions(model(encoded, training=False))
    answer = elsewhere.ask(path, "serving_default", users)
    assert_close(answer, {task: values.numpy()[:, 0] for task, values in outputs.items()})
    assert np.ptp(answer["click"]) > 0.001
    reasons = {
        "mvke": "Without the signature gate_weights: its gates read the item, which has no features.",
        "hard_sharing": "Without the signature gate_weights: hard_sharing has no gates.",
    }
    assert caplog.messages == [
        "Without the signature item_vectors: the data have no features of items.",
        *([reasons[name]] if name in reasons else []),
        "Without the signatures score_ids and recommend: [keys] names no item, or no item is known.",
    ]


def test_all_signatures_of_a_half_precision_model_agree(encoder):
    """Heads are float32 under every policy."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = with_uncertainty(build(encoder, "mmoe"))
    finally:
        keras.config.set_dtype_policy(before)
    served = ServingModule(model, encoder, CATALOGUE)
    users = {name: tf.convert_to_tensor(column) for name, column in TABLES["user"].items()}
    scores = served.score_ids(item_ids=tf.constant([list(TABLES["item"]["ad"])] * 4), **users)
    for task, values in wanted(model, encoder).items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(scores[task], values, rtol=0, atol=1e-5)
        # Half precision would leave a handful of values.
        assert len(np.unique(values)) > 0.7 * values.size
