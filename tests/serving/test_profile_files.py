# SPDX-License-Identifier: Apache-2.0
import logging

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mvke_tf.cli import main
from mvke_tf.engine import Engine
from mvke_tf.errors import ConfigError, MvkeError, RunError
from mvke_tf.inference.index import IndexConfig, VectorIndex
from mvke_tf.io import checksums
from mvke_tf.run import Run
from mvke_tf.serving.profiles import Candidates, Profiler, Users, profile_run
from mvke_tf.serving.profiles import files as profile_files
from mvke_tf.serving.profiles.files import kept_index, write_profiles

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_run_template) -> Run:
    """Only read here; what is written goes elsewhere."""
    run = Run(tiny_run_template)
    model = run.load_model()
    # Loading is tested elsewhere.
    run.load_model = lambda calibrated=False: model
    return run


@pytest.fixture(scope="module")
def profiler(run) -> Profiler:
    return Profiler(run.load_model(), Candidates.of(run.prepared))


@pytest.fixture
def command(capsys):
    """Runs `mvke profile`: its status, output and error output."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["profile", *map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("by", ["item", "tags"])
def test_the_files_hold_the_profiles(run, profiler, tmp_path, by):
    files = profile_run(run, top=4, by=by, exclude_seen=True, folder=tmp_path)
    assert files == {task: [tmp_path / f"{task}_{by}.{end}" for end in ("parquet", "csv")] for task in ("click", "buy")}
    assert sorted(tmp_path.iterdir()) == sorted(path for paths in files.values() for path in paths)
    if by == "tags":
        profiler = Profiler(run.load_model(), Candidates.of(run.prepared, by))
    for task, expected in profiler.profiles(Users.of(run.prepared, None, True), top=4, by=by).items():
        assert len(expected) == 12 * 4
        parquet, csv = files[task]
        pd.testing.assert_frame_equal(pd.read_parquet(parquet), expected)
        pd.testing.assert_frame_equal(
            pd.read_csv(csv, dtype={name: expected[name].dtype for name in expected}), expected, check_categorical=False
        )


def test_no_item_of_the_log_is_recommended_when_seen_ones_are_left_out(run, tmp_path):
    prepared = run.prepared
    own = ~np.asarray(prepared.sampled)
    users = np.asarray(prepared.users.key)[prepared.user_row[own]]
    had = set(zip(users.tolist(), np.asarray(prepared.items.key)[prepared.item_row[own]].tolist(), strict=True))
    (path,) = profile_run(run, ["buy"], 30, exclude_seen=True, formats=["csv"], folder=tmp_path)["buy"]
    frame = pd.read_csv(path)
    profiles = set(zip(frame["user"], frame["item"], strict=True))
    assert not profiles & had
    # 12 users had 20 of 30 items each.
    assert len(profiles) == len(frame) == 12 * 10 and len(had) == 12 * 20


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_workers_write_the_bytes_of_one_process(run, tmp_path, monkeypatch, kind):
    # Three blocks of the 12 users.
    monkeypatch.setattr(Profiler, "users_per_block", lambda *arguments: 5)
    with Engine(kind, 2) as engine:
        for name, options in {
            "all": {"exclude_seen": True},
            "some": {"users": [7, 1, 12, 3, 9, 2, 4], "tasks": ["buy"], "top": 3},
            "groups": {"by": "tags"},
            "index": {"tasks": ["click"], "index": IndexConfig("flat"), "effort": 30},
        }.items():
            made = [
                profile_run(run, folder=tmp_path / name / str(number), engine=of, **options)
                for number, of in enumerate((None, engine))
            ]
            alone, together = (checksums(tmp_path / name / str(number)) for number in range(2))
            assert alone == together and len(alone) == sum(map(len, made[0].values())) + (name == "index")


def test_the_command_with_workers(command, run, tmp_path):
    for workers in (1, 2):
        status, _, _ = command(run.folder, "--tasks", "buy", "--workers", workers, "--out", tmp_path / str(workers))
        assert status == 0
    assert checksums(tmp_path / "1") == checksums(tmp_path / "2") and len(checksums(tmp_path / "1")) == 2


def test_blocks_become_one_file_with_one_schema(profiler, run, tmp_path):
    users = Users.of(run.prepared)
    halves = [
        profiler.profiles(Users({n: c[rows] for n, c in users.table.items()}, users.ids[rows]), top=3)
        for rows in (slice(0, 5), slice(5, 12))
    ]
    files = write_profiles(iter(halves), ["click"], tmp_path, "item")
    expected = pd.concat([half["click"] for half in halves], ignore_index=True)
    parquet, csv = files["click"]
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), expected)
    assert pq.ParquetFile(parquet).num_row_groups == 2
    assert csv.read_text().count("user,rank") == 1 and len(pd.read_csv(csv)) == 36


def test_files_appear_together_or_not(profiler, run, tmp_path):
    def interrupted():
        yield profiler.profiles(Users.of(run.prepared), top=3)
        raise KeyboardInterrupt

    (tmp_path / "click_item.csv").write_text("as it was")
    with pytest.raises(KeyboardInterrupt):
        write_profiles(interrupted(), ["click", "buy"], tmp_path, "item")
    assert [path.name for path in tmp_path.iterdir()] == ["click_item.csv"]
    assert (tmp_path / "click_item.csv").read_text() == "as it was"


def test_no_spreadsheet_runs_a_cell(tmp_path):
    """A name such as =HYPERLINK("http://evil") once went into the CSV as it was."""
    frame = pd.DataFrame(
        {
            "user": ["@SUM(A1)", "u2", "-3"],
            "rank": np.array([1, 2, -3], np.int32),
            "item": [-1, 2, 3],
            "item_name": pd.Categorical(['=HYPERLINK("http://evil")', "\tx", None]),
            "tags": pd.Categorical(["+1|a", "a|+1", "'+1|a"]),
            "probability": np.float32([-0.5, 0.5, 0.25]),
        }
    )
    (csv, parquet) = write_profiles(iter([{"click": frame}]), ["click"], tmp_path, "item", ["csv", "parquet"])["click"]
    assert csv.read_text() == (
        "user,rank,item,item_name,tags,probability\n"
        '\'@SUM(A1),1,-1,"\'=HYPERLINK(""http://evil"")",\'+1|a,-0.5\n'
        "u2,2,2,'\tx,a|+1,0.5\n"
        "'-3,-3,3,,'+1|a,0.25\n"
    )
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), frame)


def test_an_index_is_kept_and_its_recall_told(run, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=profile_files.__name__)
    options = {"tasks": ["buy"], "top": 5, "formats": ["parquet"]}
    exact = profile_run(run, folder=tmp_path / "exact", **options)["buy"][0]
    monkeypatch.setattr(profile_files, "RECALL_USERS", 4)
    found = profile_run(run, folder=tmp_path, index=IndexConfig("flat"), **options)["buy"][0]
    pd.testing.assert_frame_equal(pd.read_parquet(found), pd.read_parquet(exact), atol=1e-6)
    path = tmp_path / "buy_flat_index.npz"
    assert len(VectorIndex.load(path)) == 30
    assert caplog.messages == [
        f"Index: {path}, built from 30 items",
        "recall@5 of buy: 1.0000 against exact scoring (4 users)",
    ]


def test_an_index_is_used_again_unless_vectors_or_settings_have_changed(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=profile_files.__name__)
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    first, other = IndexConfig("hnsw", links=4), IndexConfig("hnsw", links=5)
    path = tmp_path / "index.npz"
    for values, config in ((vectors, first), (vectors, first), (vectors + 1, first), (vectors + 1, other)):
        index = kept_index(values, config, path)
        assert index.fits(values) and index.config == config
    assert [line.removeprefix(f"Index: {path}, ") for line in caplog.messages] == [
        *("built from 30 items", "as it was", "built from 30 items", "built from 30 items")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["cick"]}, r"which are \['click', 'buy'\]. Received: \['cick'\]"),
        ({"users": [1, 99]}, "unknown or twice: 99"),
        ({"by": "tag"}, r"a group of items: tags\. Received: 'tag'"),
        ({"formats": ["xlsx"]}, r"some of \('parquet', 'csv'\). Received: \('xlsx',\)"),
        ({"formats": []}, r"Received: \(\)"),
        ({"memory_mb": 1}, "MiB of memory are needed"),
        ({"by": "tags", "index": IndexConfig("flat")}, "groups are scored exactly"),
    ],
)
def test_bad_arguments_write_nothing(run, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        profile_run(run, folder=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_index_is_an_error_of_ours(tmp_path):
    (tmp_path / "index.npz").write_bytes(b"PK")
    with pytest.raises(MvkeError, match="Delete it"):
        kept_index(np.eye(3), IndexConfig("flat"), tmp_path / "index.npz")


def test_a_run_without_checkpoint(tiny_run):
    tiny_run.checkpoint.unlink()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        profile_run(tiny_run)


def test_the_command(command, tiny_run):
    status, output, error = command(tiny_run.folder, "--task", "buy", "--top", 2, "--users", 7, 3)
    folder = tiny_run.folder / "profiles"
    assert (status, output) == (
        0,
        f"buy: {folder / 'buy_item.parquet'}, {folder / 'buy_item.csv'}\n\nNext:  mvke export {tiny_run.folder}\n",
    )
    assert "Profiles: 100%" in error and "2/2" in error
    assert pd.read_csv(folder / "buy_item.csv")[["user", "rank"]].to_numpy().tolist() == [
        *([7, 1], [7, 2], [3, 1], [3, 2])
    ]


def test_the_command_by_group_into_another_folder(command, run, tmp_path):
    arguments = ["--by", "tags", "--group_items", 2, "--out", tmp_path / "new", "--format", "csv", "--exclude_seen"]
    status, output, _ = command("--checkpoint_path", run.checkpoint, *arguments)
    assert status == 0 and output.splitlines()[0] == f"click: {tmp_path / 'new' / 'click_tags.csv'}"
    assert pd.read_csv(tmp_path / "new" / "buy_tags.csv")["items"].max() == 2


def test_the_command_with_an_index(command, run, tmp_path):
    arguments = ["--task", "click", "--index", "faiss", "--index_kind", "ivf", "--cells", 3, "--effort", 3]
    status, output, _ = command(run.folder, "--out", tmp_path, *arguments)
    assert status == 0
    assert "recall@20 of click: 1.0000" in output and (tmp_path / "click_ivf_index.npz").is_file()


def test_the_command_names_what_is_wrong(command, run, tmp_path):
    options = [run.folder, "--out", tmp_path]
    for arguments, message in (
        (["--users", 1, 99], "unknown or twice: 99"),
        (["--task", "cick"], "Received: ['cick']"),
        (["--users", "4x"], "which are whole numbers. Received: 4x"),
    ):
        status, _, error = command(*options, *arguments)
        assert status == 2 and message in error
    assert list(tmp_path.iterdir()) == []
