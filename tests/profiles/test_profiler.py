import dataclasses
import runpy

import keras
import numpy as np
import pandas as pd
import pytest
from keras import ops

from mvke_tf.data.entities import Catalogue, Users
from mvke_tf.exact import TILE_USERS, vectors_of
from mvke_tf.models import build_model
from mvke_tf.models.two_tower import cut, gate_model, tower
from mvke_tf.profiles.profiler import Profiler
from mvke_tf.schema import Task
from mvke_tf.vector_index import IndexConfig, VectorIndex
from tests.conftest import REPOSITORY
from tests.models.problems import CONFIG, SCHEMA, entities, numpy_outputs, randomize

TASKS = (Task("ctr"), Task("cvr", given="ctr"), Task("rating", kind="regression", offset=3.5))
NAMES = [task.name for task in TASKS]
GENRES = ("Drama", "Action", "Western")


def some_catalogue(count: int) -> Catalogue:
    """Items of one or two genres; the last has none. Titles repeat."""
    genres = [tuple(dict.fromkeys((GENRES[i % 3], GENRES[i % 2]))) for i in range(count - 1)] + [()]
    titles = np.array([f"Title {i // 2}" for i in range(count)], object)
    return Catalogue(entities("item", count, seed=3), 100 + np.arange(count), titles, genres)


def some_users(count: int, seen=()) -> Users:
    return Users(entities("user", count, seed=4), 10 * np.arange(count), np.array(seen, int).reshape(-1, 2))


CATALOGUE = some_catalogue(40)
USERS = some_users(TILE_USERS + 44)


def built(name: str) -> keras.Model:
    config = dataclasses.replace(CONFIG, name=name, hidden_dims=(16, 16))
    model = randomize(build_model(name, SCHEMA.with_tasks(TASKS), config))
    # Otherwise most probabilities are 0 or 1.
    for variable in model.trainable_variables:
        variable.assign(0.6 * ops.convert_to_tensor(variable))
    return model


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return built("mvke")


@pytest.fixture(scope="module")
def profiler(model) -> Profiler:
    return Profiler(model, CATALOGUE)


def predicted(model: keras.Model, users: Users = USERS, catalogue: Catalogue = CATALOGUE) -> dict[str, np.ndarray]:
    """Probabilities and values of all pairs, `{task: (N, M)}`, from the model itself."""
    user, item = np.indices((len(users), len(catalogue.ids))).reshape(2, -1)
    pairs = {name: column[user] for name, column in users.table.items()}
    pairs |= {name: column[item] for name, column in catalogue.table.items()}
    outputs = {task: out.reshape(len(users), -1).astype(float) for task, out in numpy_outputs(model, pairs).items()}
    return {task: out if task == "rating" else 1 / (1 + np.exp(-out)) for task, out in outputs.items()}


@pytest.mark.parametrize("name", ["mvke", "mmoe", "hard_sharing"])
def test_items_are_the_best_of_the_model_itself(name, model):
    if name != "mvke":
        model = built(name)
    frames = Profiler(model, CATALOGUE).profiles(USERS, top=7)
    assert list(frames) == NAMES
    for task, expected in predicted(model).items():
        frame = frames[task]
        score = "value" if task == "rating" else "probability"
        assert list(frame) == ["user", "rank", "item", "title", "genres", score, "kernel"]
        assert frame["user"].tolist() == USERS.ids.repeat(7).tolist()
        assert frame["rank"].tolist() == list(range(1, 8)) * len(USERS)
        row = frame["item"].to_numpy() - 100
        assert frame["title"].tolist() == CATALOGUE.titles[row].tolist()
        assert frame["genres"].tolist() == ["|".join(CATALOGUE.genres[item]) for item in row]
        assert np.ptp(frame[score]) > 0.01
        own = expected[np.arange(len(USERS)).repeat(7), row]
        np.testing.assert_allclose(frame[score], own, atol=1e-5)
        np.testing.assert_allclose(own.reshape(-1, 7), -np.sort(-expected, axis=1)[:, :7], atol=1e-5)
        assert frame["kernel"].isna().all() == (name != "mvke")


def test_the_kernel_has_the_largest_part_of_the_logit(model, profiler):
    users, catalogue = some_users(30), some_catalogue(20)
    experts = numpy_outputs(cut(model, model.get_layer("virtual_kernel_experts").output, "experts"), users.table)
    gates = numpy_outputs(gate_model(model), catalogue.table)
    frames = Profiler(model, catalogue).profiles(users, top=20)
    chosen = set()
    for task in NAMES:
        tags = numpy_outputs(cut(model, model.get_layer(f"tag_{task}").output, "tag"), catalogue.table)
        kernels = model.get_layer(f"gate_{task}").kernels
        parts = np.einsum("ukd,id,ik->uik", experts[:, list(kernels)], tags, gates[task])
        frame = frames[task]
        own = parts[np.arange(30).repeat(20), frame["item"].to_numpy() - 100]
        kernel = [kernels.index(kernel) for kernel in frame["kernel"]]
        np.testing.assert_allclose(own[np.arange(len(own)), kernel], own.max(axis=1), atol=1e-5)
        if task != "cvr":
            logit = own.sum(axis=1)
            score = frame["value"] - 3.5 if task == "rating" else frame["probability"]
            np.testing.assert_allclose(score, logit if task == "rating" else 1 / (1 + np.exp(-logit)), atol=1e-5)
        chosen |= set(frame["kernel"])
    assert len(chosen) > 2


def test_a_kernel_that_the_gate_leaves_out_has_no_part(model):
    profiler = Profiler(model, CATALOGUE, ["ctr"])
    kernels = model.get_layer("gate_ctr").kernels
    vectors = profiler.item_vectors["ctr"].reshape(40, len(kernels), -1)
    vectors[:, 1:] = 0
    vectors[20:] = 0
    vectors[20:, -1] = 1
    frame = profiler.profiles(some_users(10), top=40)["ctr"]
    # Also where the only part is negative.
    assert (frame["probability"] < 0.5).any()
    assert (frame["kernel"] == np.where(frame["item"] < 120, kernels[0], kernels[-1])).all()


def test_a_genre_scores_the_mean_of_its_best_items(model, profiler):
    users = some_users(50, [(3, item) for item in range(0, 40, 2)] + [(8, item) for item in range(40)])
    frames = profiler.profiles(users, top=5, by="genre", genre_items=4)
    members = {genre: [i for i, names in enumerate(CATALOGUE.genres) if genre in names] for genre in GENRES}
    blocked = np.zeros((50, 40), bool)
    blocked[tuple(users.seen.T)] = True
    for task, scores in predicted(model, users).items():
        frame = frames[task]
        score = "value" if task == "rating" else "probability"
        assert list(frame) == ["user", "rank", "genre", "items", score]
        # User 80 has seen everything.
        assert sorted(set(frame["user"])) == [user for user in users.ids if user != 80]
        for (user, genre), row in frame.set_index(["user", "genre"]).iterrows():
            own = np.where(blocked, np.nan, scores)[user // 10, members[genre]]
            best = np.sort(own[~np.isnan(own)])[::-1][:4]
            assert row["items"] == len(best)
            assert row[score] == pytest.approx(best.mean(), abs=1e-5)
        for _, own in frame.groupby("user"):
            assert own["rank"].tolist() == list(range(1, len(own) + 1))
            assert own[score].is_monotonic_decreasing
    # User 30 has seen every even item: of "Western" (every third) odd ones are left, of all genres some.
    assert len(frames["ctr"]) == 49 * 3


def test_fewer_items_than_a_genres_score_is_the_mean_of(model):
    catalogue = dataclasses.replace(CATALOGUE, genres=[("Film-Noir",)] * 2 + [("Drama",)] * 38)
    frame = Profiler(model, catalogue, ["ctr"]).profiles(some_users(3), by="genre")["ctr"]
    assert frame.groupby("genre", observed=True)["items"].unique().map(list).to_dict() == {
        "Film-Noir": [2],
        "Drama": [10],
    }


def test_what_was_seen_is_no_candidate(model, profiler):
    all_but_two = [(5, item) for item in range(40) if item not in (7, 30)]
    everything = [(TILE_USERS, item) for item in range(40)]
    users = dataclasses.replace(USERS, seen=np.array([*everything, (0, 3), *all_but_two, (0, 39)]))
    frames = profiler.profiles(users, top=40)
    for task, expected in predicted(model).items():
        counts = frames[task].groupby("user").size()
        assert counts[0] == 38 and counts[50] == 2 and 10 * TILE_USERS not in counts
        assert (counts.drop([0, 50]) == 40).all() and len(counts) == len(USERS) - 1
        own = frames[task][frames[task]["user"] == 0]
        assert set(own["item"]) == set(CATALOGUE.ids) - {103, 139}
        assert set(frames[task][frames[task]["user"] == 50]["item"]) == {107, 130}
        left = np.delete(expected[0], [3, 39])
        np.testing.assert_allclose(own.iloc[:, 5], -np.sort(-left), atol=1e-5)


@pytest.mark.parametrize("by", ["item", "genre"])
def test_the_size_of_blocks_changes_nothing(profiler, by):
    users = some_users(3 * TILE_USERS + 5, [(user, user % 40) for user in range(3 * TILE_USERS)])
    sizes = {profiler.users_per_block(20, by, memory): memory for memory in (*range(85, 100), 512)}
    assert len(sizes) > 2
    frames = {}
    for size, memory in sizes.items():
        blocks = list(profiler.blocks(users, by=by, memory_mb=memory))
        assert len(blocks) == -(-len(users) // size)
        frames[memory] = {task: pd.concat([block[task] for block in blocks], ignore_index=True) for task in NAMES}
    for other in frames.values():
        for task in NAMES:
            pd.testing.assert_frame_equal(other[task], frames[512][task], check_exact=True)


def test_a_user_alone_has_the_profile_that_he_has_among_others(profiler):
    alone = Users({name: column[77:78] for name, column in USERS.table.items()}, USERS.ids[77:78])
    together = profiler.profiles(USERS, top=5)
    for task, frame in profiler.profiles(alone, top=5).items():
        expected = together[task][together[task]["user"] == 770].reset_index(drop=True)
        pd.testing.assert_frame_equal(frame, expected, atol=1e-6)


def test_some_tasks_are_those_of_all(model, profiler):
    everything = profiler.profiles(USERS, top=3)
    frames = Profiler(model, CATALOGUE, ["rating", "cvr"]).profiles(USERS, top=3)
    assert list(frames) == ["rating", "cvr"]
    for task, frame in frames.items():
        pd.testing.assert_frame_equal(frame, everything[task], atol=1e-6)


def test_new_weights_need_a_refresh():
    model = built("hard_sharing")
    profiler = Profiler(model, CATALOGUE, ["ctr"])
    for variable in model.trainable_variables:
        variable.assign(0.7 * ops.convert_to_tensor(variable))
    profiler.refresh()
    frame = profiler.profiles(USERS, top=1)["ctr"]
    np.testing.assert_allclose(frame["probability"], predicted(model)["ctr"].max(axis=1), atol=1e-5)


def test_memory_stays_within_the_bound():
    growth = runpy.run_path(str(REPOSITORY / "benchmarks" / "profile_users.py"))["growth"]
    model = built("hard_sharing")
    catalogue, users, bound = some_catalogue(4096), some_users(24_000), 160
    profiler = Profiler(model, catalogue, ["ctr"])
    profiler.profiles(some_users(1))
    all_at_once = len(users) * len(catalogue.ids) * 4 / 2**20
    assert all_at_once > 2 * bound
    rows = 0
    with growth() as grown:
        for block in profiler.blocks(users, memory_mb=bound):
            rows += len(block["ctr"])
    assert rows == 20 * len(users)
    assert grown[0] < bound


def test_too_little_memory_says_how_much_is_needed(profiler):
    with pytest.raises(ValueError, match=r"^(\d+) MiB of memory are needed for the top 20 .* Received: 10$") as error:
        profiler.blocks(USERS, memory_mb=10)
    needed = int(str(error.value).split()[0])
    assert profiler.users_per_block(20, "item", needed) == TILE_USERS
    with pytest.raises(ValueError, match="are needed"):
        profiler.users_per_block(20, "item", needed - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "title"}, r"`by` must be one of \('item', 'genre'\). Received: 'title'"),
        ({"top": 0}, "`top` must be at least 1. Received: 0"),
        ({"genre_items": 0}, "`genre_items` must be at least 1"),
        ({"effort": 0}, "`effort` must be at least 1"),
    ],
)
def test_bad_arguments(profiler, options, message):
    with pytest.raises(ValueError, match=message):
        profiler.blocks(USERS, **options)


def test_bad_users_and_catalogues(profiler):
    with pytest.raises(ValueError, match=r"which has 40 items\. Received: rows 2 to 40"):
        profiler.blocks(some_users(2, [(0, 2), (1, 40)]))
    with pytest.raises(ValueError, match=r"of 2 users. Received: shape \(1, 2\)"):
        some_users(2, [(2, 0)])
    with pytest.raises(ValueError, match=r"columns, ids and the like of the users need as many rows"):
        Users(entities("user", 3), np.arange(2))
    with pytest.raises(ValueError, match=r"of the items need as many rows. Received: .*'genres': 1"):
        dataclasses.replace(CATALOGUE, genres=[("Drama",)])
    with pytest.raises(ValueError, match=r"Received: \['click'\]"):
        Profiler(built("hard_sharing"), CATALOGUE, ["click"])


def index_of(profiler: Profiler, task: str, kind: str = "flat") -> VectorIndex:
    return VectorIndex.build(profiler.item_vectors[task], IndexConfig(kind))


def test_a_flat_index_gives_the_exact_profiles(model):
    profiler = Profiler(model, CATALOGUE, ["ctr", "rating"])
    indexes = {task: index_of(profiler, task) for task in profiler.tasks}
    all_but_two = [(5, item) for item in range(40) if item not in (7, 30)]
    for users in (USERS, dataclasses.replace(USERS, seen=np.array([(9, 1), (290, 2), *all_but_two]))):
        exact = profiler.profiles(users, top=6)
        for task, frame in profiler.profiles(users, top=6, indexes=indexes).items():
            pd.testing.assert_frame_equal(frame, exact[task], atol=1e-5)


def test_what_an_index_cannot_answer(model, profiler):
    with pytest.raises(ValueError, match=r"multiply two probabilities.*Received: \{'cvr': 'ctr'\}"):
        profiler.blocks(USERS, indexes={task: index_of(profiler, task) for task in NAMES})
    ctr = Profiler(model, CATALOGUE, ["ctr"])
    with pytest.raises(ValueError, match=r"exactly, without one\. Received: by='genre'"):
        ctr.blocks(USERS, by="genre", indexes={"ctr": index_of(ctr, "ctr")})
    with pytest.raises(ValueError, match=r"index of each of the tasks \('ctr',\). Received: \['rating'\]"):
        ctr.blocks(USERS, indexes={"rating": index_of(profiler, "rating")})
    with pytest.raises(ValueError, match=r"the catalogue's 40 items\. Received: 39"):
        ctr.blocks(USERS, indexes={"ctr": VectorIndex.build(ctr.item_vectors["ctr"][:39])})


def test_vectors_are_those_of_the_towers(model, profiler):
    for side, vectors in (("user", profiler.user_vectors(USERS.table)), ("item", profiler.item_vectors)):
        expected = vectors_of(tower(model, side), USERS.table if side == "user" else CATALOGUE.table)
        for task in NAMES:
            np.testing.assert_allclose(vectors[task], expected[task], atol=1e-5)
