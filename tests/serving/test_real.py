"""An MVKE of the default size on the real data: 1,000 rows of the test part, from a process with TensorFlow only."""

import keras
import numpy as np
import pytest

from mvke_tf.config import DataConfig, ModelConfig
from mvke_tf.data.dataset import PairData
from mvke_tf.data.prepared import Prepared, prepare_movielens
from mvke_tf.evaluation import predict
from mvke_tf.models.mvke import build_mvke
from mvke_tf.serving import Catalogue, export_saved_model
from tests.conftest import REPOSITORY
from tests.serving.helpers import assert_close, rows_of

ROWS = 1000


@pytest.fixture(scope="module")
def prepared(movielens_folder) -> Prepared:
    return Prepared.load(prepare_movielens(REPOSITORY / "data", DataConfig(), report=list))


@pytest.fixture(scope="module")
def pairs(prepared):
    """User rows and item rows of 1,000 pairs of the test part."""
    chosen = np.random.default_rng(0).choice(prepared.part_rows("test"), ROWS, replace=False)
    pairs = prepared.pairs.iloc[chosen]
    return pairs["user_row"].to_numpy(), pairs["item_row"].to_numpy()


@pytest.fixture(scope="module")
def model(prepared) -> keras.Model:
    keras.utils.set_random_seed(0)
    return build_mvke(prepared.schema, ModelConfig(kernel_stddev=1.0, embedding_stddev=1.0))


@pytest.fixture(scope="module")
def wanted(prepared, model, pairs) -> dict[str, np.ndarray]:
    """What the evaluation predicts of these pairs."""
    wanted = predict(model, PairData(prepared.encoded["user"], prepared.encoded["item"], *pairs, {}))
    assert min(np.ptp(values) for values in wanted.values()) > 0.5
    return wanted


@pytest.fixture(scope="module")
def ask(prepared, model, elsewhere, tmp_path_factory):
    catalogue = Catalogue.from_prepared(prepared)
    path = export_saved_model(model, prepared.encoder, tmp_path_factory.mktemp("real"), catalogue)
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 20e6
    return lambda signature, **inputs: elsewhere.ask(path, signature, inputs)


def test_raw_rows_give_the_predictions_of_the_evaluation(prepared, pairs, wanted, ask):
    raw = rows_of(prepared.raw["user"], pairs[0]) | rows_of(prepared.raw["item"], pairs[1])
    assert_close(ask("serving_default", **raw), wanted)


def test_scores_by_id(prepared, pairs, wanted, ask):
    ids = prepared.raw["item"]["item_id"][pairs[1]]
    answer = ask("score_ids", **rows_of(prepared.raw["user"], pairs[0]), item_ids=ids[:, None])
    assert_close(answer, {task: values[:, None] for task, values in wanted.items()})


def test_products_of_vectors(prepared, pairs, wanted, ask):
    users = ask("user_vectors", **rows_of(prepared.raw["user"], pairs[0]))
    items = ask("item_vectors", **rows_of(prepared.raw["item"], pairs[1]))
    for task, probabilities in wanted.items():
        logits = np.sum(users[f"user_vector_{task}"] * items[f"item_vector_{task}"], axis=1)
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), probabilities, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("task", "start"), [("ctr", 0), ("cvr", ROWS // 2)])
def test_recommendations(prepared, pairs, wanted, ask, task, start):
    ids = prepared.raw["item"]["item_id"]
    half = slice(start, start + ROWS // 2)
    users = rows_of(prepared.raw["user"], pairs[0][half])
    answer = ask("recommend", **users, k=len(ids), task=task, exclude=np.zeros((ROWS // 2, 0), np.int64))
    assert (np.sort(answer["item_ids"], axis=1) == np.sort(ids)).all()
    assert (np.diff(answer["predictions"], axis=1) <= 0).all()
    mine = answer["item_ids"] == ids[pairs[1][half]][:, None]
    np.testing.assert_allclose(answer["predictions"][mine], wanted[task][half], rtol=0, atol=1e-6)
    titles = {n: title.encode() for n, title in zip(ids.tolist(), prepared.titles, strict=True)}
    assert [titles[n] for n in answer["item_ids"][0].tolist()] == answer["titles"][0].tolist()
