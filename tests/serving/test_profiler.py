# SPDX-License-Identifier: Apache-2.0
import dataclasses
import runpy

import numpy as np
import pandas as pd
import pytest
from keras import ops

from mvke_tf.data.buckets import prepare_in_buckets
from mvke_tf.data.declaration import Dataset
from mvke_tf.data.groups import Grouping
from mvke_tf.data.preparation import prepare
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError
from mvke_tf.inference.index import IndexConfig, VectorIndex
from mvke_tf.inference.topk import TILE_USERS
from mvke_tf.inference.vectors import run_model
from mvke_tf.models import TwoTowerModel, build_model
from mvke_tf.schema import CONSTANT_ITEM, Feature, Schema, Task
from mvke_tf.serving.profiles.entities import Candidates, Users
from mvke_tf.serving.profiles.profiler import Profiler
from tests.conftest import REPOSITORY
from tests.models.problems import CONFIG, SCHEMA, entities, numpy_outputs, randomize
from tests.small import SMALL, small_dataset, small_log, small_prepared

pytestmark = pytest.mark.slow

TASKS = (Task("click"), Task("buy", given="click"), Task("stars", kind="regression", offset=3.5))
NAMES = [task.name for task in TASKS]
TAGS = ("Drama", "Action", "Western")


def some_items(count: int) -> Candidates:
    """Items of one or two tags; the last has none. Names repeat."""
    members = np.zeros((count, 3), bool)
    for item in range(count - 1):
        members[item, [item % 3, item % 2]] = True
    names = np.array([f"Item {item // 2}" for item in range(count)], object)
    tags = Grouping("tag", "item", TAGS, members)
    return Candidates(entities("item", count, seed=3), 100 + np.arange(count), names, (tags,), ("tag",))


def some_users(count: int, seen=()) -> Users:
    return Users(entities("user", count, seed=4), 10 * np.arange(count), np.array(seen, int).reshape(-1, 2))


ITEMS = some_items(40)
USERS = some_users(TILE_USERS + 44)


def tags_of(item: int) -> list[str]:
    return [tag for tag, inside in zip(TAGS, ITEMS.groupings[0].members[item], strict=True) if inside]


def built(name: str, schema: Schema = SCHEMA) -> TwoTowerModel:
    config = dataclasses.replace(CONFIG, name=name, hidden_dims=(16, 16))
    model = randomize(build_model(name, schema.with_tasks(TASKS), config))
    # Otherwise most probabilities are 0 or 1.
    for variable in model.trainable_variables:
        variable.assign(0.6 * ops.convert_to_tensor(variable))
    return model


@pytest.fixture(scope="module")
def model() -> TwoTowerModel:
    return built("mvke")


@pytest.fixture(scope="module")
def profiler(model) -> Profiler:
    return Profiler(model, ITEMS)


def predicted(model: TwoTowerModel, users: Users = USERS, items: Candidates = ITEMS) -> dict[str, np.ndarray]:
    """Probabilities and values of all pairs, `{task: (N, M)}`, from the model itself."""
    count = len(next(iter(items.table.values())))
    user, item = np.indices((len(users), count)).reshape(2, -1)
    pairs = {name: column[user] for name, column in users.table.items()}
    pairs |= {name: column[item] for name, column in items.table.items()}
    outputs = {task: out.reshape(len(users), -1).astype(float) for task, out in numpy_outputs(model, pairs).items()}
    return {task: out if task == "stars" else 1 / (1 + np.exp(-out)) for task, out in outputs.items()}


@pytest.mark.parametrize("name", ["mvke", "mmoe", "hard_sharing"])
def test_items_are_the_best_of_the_model_itself(name, model):
    if name != "mvke":
        model = built(name)
    frames = Profiler(model, ITEMS).profiles(USERS, top=7)
    assert list(frames) == NAMES
    for task, expected in predicted(model).items():
        frame = frames[task]
        score = "value" if task == "stars" else "probability"
        assert list(frame) == ["user", "rank", "item", "item_name", "tag", score, "kernel"]
        assert frame["user"].tolist() == USERS.ids.repeat(7).tolist()
        assert frame["rank"].tolist() == list(range(1, 8)) * len(USERS)
        row = frame["item"].to_numpy() - 100
        assert frame["item_name"].tolist() == ITEMS.names[row].tolist()
        assert frame["tag"].tolist() == ["|".join(tags_of(item)) for item in row]
        assert np.ptp(frame[score]) > 0.01
        own = expected[np.arange(len(USERS)).repeat(7), row]
        np.testing.assert_allclose(frame[score], own, atol=1e-5)
        np.testing.assert_allclose(own.reshape(-1, 7), -np.sort(-expected, axis=1)[:, :7], atol=1e-5)
        assert frame["kernel"].isna().all() == (name != "mvke")


def test_the_kernel_has_the_largest_part_of_the_logit(model, profiler):
    users, items = some_users(30), some_items(20)
    experts, gates = run_model(model.expert_outputs, users.table), run_model(model.gates, items.table)
    tags = run_model(model.tags, items.table)
    frames = Profiler(model, items).profiles(users, top=20)
    chosen = set()
    for task in NAMES:
        kernels = model.kernels_of(task)
        parts = np.einsum("ukd,id,ik->uik", experts[:, list(kernels)], tags[task], gates[task])
        frame = frames[task]
        own = parts[np.arange(30).repeat(20), frame["item"].to_numpy() - 100]
        kernel = [kernels.index(kernel) for kernel in frame["kernel"]]
        np.testing.assert_allclose(own[np.arange(len(own)), kernel], own.max(axis=1), atol=1e-5)
        if task != "buy":
            logit = own.sum(axis=1)
            score = frame["value"] - 3.5 if task == "stars" else frame["probability"]
            np.testing.assert_allclose(score, logit if task == "stars" else 1 / (1 + np.exp(-logit)), atol=1e-5)
        chosen |= set(frame["kernel"])
    assert len(chosen) > 2


def test_a_kernel_that_the_gate_leaves_out_has_no_part(model):
    profiler = Profiler(model, ITEMS, ["click"])
    kernels = model.kernels_of("click")
    vectors = profiler.item_vectors["click"].reshape(40, len(kernels), -1)
    vectors[:, 1:] = 0
    vectors[20:] = 0
    vectors[20:, -1] = 1
    frame = profiler.profiles(some_users(10), top=40)["click"]
    # Also where the only part is negative.
    assert (frame["probability"] < 0.5).any()
    assert (frame["kernel"] == np.where(frame["item"] < 120, kernels[0], kernels[-1])).all()


def test_a_group_scores_the_mean_of_its_best_items(model, profiler):
    users = some_users(50, [(3, item) for item in range(0, 40, 2)] + [(8, item) for item in range(40)])
    frames = profiler.profiles(users, top=5, by="tag", group_items=4)
    members = {tag: [item for item in range(40) if tag in tags_of(item)] for tag in TAGS}
    blocked = np.zeros((50, 40), bool)
    blocked[tuple(users.seen.T)] = True
    for task, scores in predicted(model, users).items():
        frame = frames[task]
        score = "value" if task == "stars" else "probability"
        assert list(frame) == ["user", "rank", "tag", "items", score]
        # User 80 has seen everything.
        assert sorted(set(frame["user"])) == [user for user in users.ids if user != 80]
        for (user, tag), row in frame.set_index(["user", "tag"]).iterrows():
            own = np.where(blocked, np.nan, scores)[user // 10, members[tag]]
            best = np.sort(own[~np.isnan(own)])[::-1][:4]
            assert row["items"] == len(best)
            assert row[score] == pytest.approx(best.mean(), abs=1e-5)
        for _, own in frame.groupby("user"):
            assert own["rank"].tolist() == list(range(1, len(own) + 1))
            assert own[score].is_monotonic_decreasing
    # User 30 has seen every even item: of "Western" (every third) odd ones are left, of all tags some.
    assert len(frames["click"]) == 49 * 3


def test_fewer_items_than_a_groups_score_is_the_mean_of(model):
    members = np.arange(40)[:, None] < np.array([2, 0, 99])
    groups = Grouping("user", "item", ("small", "empty", "all"), members)
    frame = Profiler(model, dataclasses.replace(ITEMS, groupings=(groups,), shown=()), ["click"])
    frame = frame.profiles(some_users(3), by="user")["click"]
    # A grouping never takes the name of a column.
    assert list(frame) == ["user", "rank", "user_group", "items", "probability"]
    assert frame.groupby("user_group", observed=True)["items"].unique().map(list).to_dict() == {
        "small": [2],
        "all": [10],
    }


def test_data_without_items_give_one_prediction_per_user():
    users = [dataclasses.replace(feature, embedding=None) for feature in SCHEMA.of_tower("user")]
    model = built("mmoe", Schema((*users, Feature(CONSTANT_ITEM, "item", 1)), TASKS))
    candidates = Candidates({CONSTANT_ITEM: np.zeros(1, np.int32)}, None)
    frames = Profiler(model, candidates).profiles(USERS, top=20)
    for task, values in predicted(model, USERS, candidates).items():
        score = "value" if task == "stars" else "probability"
        assert list(frames[task]) == ["user", "rank", score, "kernel"]
        assert frames[task]["user"].tolist() == USERS.ids.tolist() and (frames[task]["rank"] == 1).all()
        np.testing.assert_allclose(frames[task][score], values[:, 0], atol=1e-5)
    with pytest.raises(ConfigError, match=r"must be one of \['item'\]"):
        Profiler(model, candidates).blocks(USERS, by="tag")


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
        assert set(own["item"]) == set(ITEMS.ids) - {103, 139}
        assert set(frames[task][frames[task]["user"] == 50]["item"]) == {107, 130}
        left = np.delete(expected[0], [3, 39])
        np.testing.assert_allclose(own.iloc[:, 5], -np.sort(-left), atol=1e-5)


@pytest.mark.parametrize("by", ["item", "tag"])
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


def test_a_user_alone_has_the_same_profile_as_among_others(profiler):
    alone = Users({name: column[77:78] for name, column in USERS.table.items()}, USERS.ids[77:78])
    together = profiler.profiles(USERS, top=5)
    for task, frame in profiler.profiles(alone, top=5).items():
        expected = together[task][together[task]["user"] == 770].reset_index(drop=True)
        pd.testing.assert_frame_equal(frame, expected, atol=1e-6)


def test_some_tasks_are_those_of_all(model, profiler):
    everything = profiler.profiles(USERS, top=3)
    frames = Profiler(model, ITEMS, ["stars", "buy"]).profiles(USERS, top=3)
    assert list(frames) == ["stars", "buy"]
    for task, frame in frames.items():
        pd.testing.assert_frame_equal(frame, everything[task], atol=1e-6)


def test_new_weights_need_a_refresh():
    model = built("hard_sharing")
    profiler = Profiler(model, ITEMS, ["click"])
    for variable in model.trainable_variables:
        variable.assign(0.7 * ops.convert_to_tensor(variable))
    profiler.refresh()
    frame = profiler.profiles(USERS, top=1)["click"]
    np.testing.assert_allclose(frame["probability"], predicted(model)["click"].max(axis=1), atol=1e-5)


def test_memory_stays_within_the_bound():
    growth = runpy.run_path(str(REPOSITORY / "benchmarks" / "profile_users.py"))["growth"]
    model = built("hard_sharing")
    items, users, bound = some_items(4096), some_users(24_000), 160
    profiler = Profiler(model, items, ["click"])
    profiler.profiles(some_users(1))
    all_at_once = len(users) * len(items.ids) * 4 / 2**20
    assert all_at_once > 2 * bound
    rows = 0
    with growth() as grown:
        for block in profiler.blocks(users, memory_mb=bound):
            rows += len(block["click"])
    assert rows == 20 * len(users)
    assert grown[0] < bound


def test_too_little_memory_says_how_much_is_needed(profiler):
    with pytest.raises(ConfigError, match=r"^(\d+) MiB of memory are needed for the top 20 .* Received: 10$") as error:
        profiler.blocks(USERS, memory_mb=10)
    needed = int(str(error.value).split()[0])
    assert profiler.users_per_block(20, "item", needed) == TILE_USERS
    with pytest.raises(ConfigError, match="are needed"):
        profiler.users_per_block(20, "item", needed - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "tags"}, r"`by` must be one of \['item', 'tag'\]\. Received: 'tags'.*tag"),
        ({"top": 0}, "`top` must be at least 1. Received: 0"),
        ({"group_items": 0}, "`group_items` must be at least 1"),
        ({"effort": 0}, "`effort` must be at least 1"),
    ],
)
def test_bad_arguments(profiler, options, message):
    with pytest.raises(ConfigError, match=message):
        profiler.blocks(USERS, **options)


def test_bad_users_and_items(profiler):
    with pytest.raises(ValueError, match=r"which are 40 items\. Received: rows 2 to 40"):
        profiler.blocks(some_users(2, [(0, 2), (1, 40)]))
    with pytest.raises(ValueError, match=r"of 2 users. Received: shape \(1, 2\)"):
        some_users(2, [(2, 0)])
    with pytest.raises(ValueError, match=r"columns, ids and the like of the users need as many rows"):
        Users(entities("user", 3), np.arange(2))
    with pytest.raises(ValueError, match=r"of the items need as many rows. Received: .*'names': 1"):
        dataclasses.replace(ITEMS, names=["Item"])
    with pytest.raises(ConfigError, match=r"Received: \['cick'\]"):
        Profiler(built("hard_sharing"), ITEMS, ["cick"])


def index_of(profiler: Profiler, task: str, kind: str = "flat") -> VectorIndex:
    return VectorIndex.build(profiler.item_vectors[task], IndexConfig(kind))


def test_a_flat_index_gives_the_exact_profiles(model):
    profiler = Profiler(model, ITEMS, ["click", "stars"])
    indexes = {task: index_of(profiler, task) for task in profiler.tasks}
    all_but_two = [(5, item) for item in range(40) if item not in (7, 30)]
    for users in (USERS, dataclasses.replace(USERS, seen=np.array([(9, 1), (290, 2), *all_but_two]))):
        exact = profiler.profiles(users, top=6)
        for task, frame in profiler.profiles(users, top=6, indexes=indexes).items():
            pd.testing.assert_frame_equal(frame, exact[task], atol=1e-5)


def test_what_an_index_cannot_answer(model, profiler):
    with pytest.raises(ConfigError, match=r"multiply two probabilities.*Received: \{'buy': 'click'\}"):
        profiler.blocks(USERS, indexes={task: index_of(profiler, task) for task in NAMES})
    click = Profiler(model, ITEMS, ["click"])
    with pytest.raises(ConfigError, match=r"exactly, without one\. Received: by='tag'"):
        click.blocks(USERS, by="tag", indexes={"click": index_of(click, "click")})
    with pytest.raises(ValueError, match=r"index of each of the tasks \('click',\). Received: \['stars'\]"):
        click.blocks(USERS, indexes={"stars": index_of(profiler, "stars")})
    with pytest.raises(ValueError, match=r"hold the 40 items\. Received: 39"):
        click.blocks(USERS, indexes={"click": VectorIndex.build(click.item_vectors["click"][:39])})


# --- users and items of prepared data


def test_items_of_prepared_data():
    prepared = small_prepared()
    items = Candidates.of(prepared)
    assert items.ids.tolist() == [f"i{number:02d}" for number in range(1, 31)]
    assert items.names[6] == "Item 7" and items.shown == ("tags",)
    (tags,) = items.groupings
    assert tags.members.shape == (30, len(tags.groups))
    assert [name for name, inside in zip(tags.groups, tags.members[2], strict=True) if inside] == ["film", "news"]
    assert Candidates.of(prepared, "tags").shown == ()
    with pytest.raises(ConfigError, match=r"a group of items: tags\. Received: 'tag'.*tags"):
        Candidates.of(prepared, "tag")
    with pytest.raises(ConfigError, match=r"a group of items: tags\. Received: 'age'"):
        Candidates.of(prepared, "age")


def test_items_without_declared_groups():
    values = {name: value for name, value in SMALL.items() if name != "groups"}
    values["keys"] = {"user": "user", "item": "item"}
    log, table = small_log()
    items = Candidates.of(prepare(Dataset.from_frame(log, values, items=table)), "year")
    assert items.names is None
    assert [grouping.variable for grouping in items.groupings] == ["year"]


def test_users_of_prepared_data():
    prepared = small_prepared()
    everyone = Users.of(prepared)
    assert everyone.ids.tolist() == list(range(1, 13)) and not len(everyone.seen)
    chosen = Users.of(prepared, ["7", 3, np.int64(12)])
    assert chosen.ids.tolist() == [7, 3, 12]
    for name, column in chosen.table.items():
        np.testing.assert_array_equal(column, everyone.table[name][[6, 2, 11]])
    for wrong in ([7, 7], [13], ["7", 7]):
        with pytest.raises(ConfigError, match=r"it has 12, from 1 to 12\. Received, unknown or twice: (7|13)"):
            Users.of(prepared, wrong)
    for wrong in (["4x"], ["3.0"], [""], ["9" * 30]):
        with pytest.raises(ConfigError, match="which are whole numbers"):
            Users.of(prepared, wrong)


@pytest.mark.parametrize("ids", [None, [7, 3, 12, 1]])
def test_users_of_data_in_buckets_put_in_order_on_disk_are_those_in_memory(ids, tmp_path):
    prepare_in_buckets(small_dataset(), tmp_path / "small", "contents", 4)
    prepared, folder = PreparedDataset.load(tmp_path / "small"), tmp_path / "made" / "profiles"
    users, expected = Users.of(prepared, ids, True, folder), Users.of(prepared, ids, True)
    np.testing.assert_array_equal(users.ids, expected.ids)
    np.testing.assert_array_equal(users.seen, expected.seen)
    assert users.table.keys() == expected.table.keys() and len(expected.table) == 10
    for name, column in users.table.items():
        assert isinstance(column.base.base, np.memmap) and column.dtype == expected.table[name].dtype
        np.testing.assert_array_equal(column, expected.table[name])
    assert not list(folder.iterdir())


def test_what_users_have_seen_is_in_the_log_and_not_sampled():
    prepared = small_prepared()
    users = Users.of(prepared, [5, 1], exclude_seen=True)
    for row, user in enumerate((5, 1)):
        own = (np.asarray(prepared.users.key)[prepared.user_row] == user) & ~prepared.sampled
        items = set(np.asarray(prepared.items.key)[prepared.item_row[own]])
        assert len(items) == 20
        seen = users.seen[users.seen[:, 0] == row, 1]
        assert len(seen) == 20 and {Candidates.of(prepared).ids[item] for item in seen} == items


def test_data_without_ids():
    values = dict(SMALL, keys={}, negatives={}, split={"by": "random"})
    values["features"] = {name: SMALL["features"][name] for name in ("age", "country", "price")}
    values["features"]["price"] = {"tower": "item", "encode": "buckets", "bins": 4}
    del values["tables"], values["groups"]
    log, table = small_log()
    prepared = prepare(Dataset.from_frame(log.join(table, on="item"), values))
    users, items = Users.of(prepared, ["239", "0"]), Candidates.of(prepared)
    assert users.ids.tolist() == [239, 0]
    assert items.ids.tolist() == list(range(len(items.ids))) and items.names is None
    with pytest.raises(ConfigError, match="needs ids of items: declare"):
        Users.of(prepared, None, exclude_seen=True)

    values["features"]["price"] = {"tower": "user", "encode": "buckets", "bins": 4}
    prepared = prepare(Dataset.from_frame(log.join(table, on="item"), values))
    items = Candidates.of(prepared)
    assert items.ids is None and {name: len(column) for name, column in items.table.items()} == {CONSTANT_ITEM: 1}
    with pytest.raises(ConfigError, match=r"no features of items: there are no groups of them\. Received: 'tags'"):
        Candidates.of(prepared, "tags")
