import runpy
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from mvke_tf.data.entities import Catalogue, Users
from mvke_tf.profiles import Profiler, profile_run
from mvke_tf.profiles import files as profile_files
from mvke_tf.profiles.files import kept_index, write_profiles
from mvke_tf.run import Run, RunError
from mvke_tf.vector_index import IndexConfig, VectorIndex
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "profile_users.py"


@pytest.fixture(scope="module")
def run(tiny_run_template) -> Run:
    """Only read here; what is written goes elsewhere."""
    run = Run(tiny_run_template)
    model = run.load_model()
    # Loading is tested elsewhere.
    run.load_model = lambda: model
    return run


@pytest.fixture(scope="module")
def profiler(run) -> Profiler:
    return Profiler(run.load_model(), Catalogue.of(run.prepared))


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs scripts/profile_users.py: its status, output and error output."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


def silent(line):
    pass


@pytest.mark.parametrize("by", ["item", "genre"])
def test_the_files_hold_the_profiles(run, profiler, tmp_path, by):
    files = profile_run(run, top=4, by=by, exclude_seen=True, folder=tmp_path, report=silent)
    assert files == {task: [tmp_path / f"{task}_{by}.{end}" for end in ("parquet", "csv")] for task in ("ctr", "cvr")}
    assert sorted(tmp_path.iterdir()) == sorted(path for paths in files.values() for path in paths)
    for task, expected in profiler.profiles(Users.of(run.prepared, None, True), top=4, by=by).items():
        assert len(expected) == 12 * 4
        parquet, csv = files[task]
        pd.testing.assert_frame_equal(pd.read_parquet(parquet), expected)
        pd.testing.assert_frame_equal(
            pd.read_csv(csv, dtype={name: expected[name].dtype for name in expected}), expected, check_categorical=False
        )


def test_no_rated_item_is_recommended_when_seen_ones_are_left_out(run, tmp_path):
    rated = set(map(tuple, ratings_of(run)))
    (path,) = profile_run(run, ["cvr"], 30, exclude_seen=True, formats=["csv"], folder=tmp_path, report=silent)["cvr"]
    frame = pd.read_csv(path)
    own = set(zip(frame["user"], frame["item"], strict=True))
    assert not own & rated
    # 12 users rated 20 of 30 items each.
    assert len(own) == len(frame) == 12 * 10 and len(rated) == 12 * 20


def ratings_of(run: Run) -> np.ndarray:
    pairs = run.prepared.pairs[run.prepared.pairs["rating"] > 0]
    raw = run.prepared.raw
    return np.stack([raw["user"]["user_id"][pairs["user_row"]], raw["item"]["item_id"][pairs["item_row"]]], axis=1)


def test_blocks_become_one_file_with_one_schema(profiler, run, tmp_path):
    users = Users.of(run.prepared)
    halves = [
        profiler.profiles(Users({n: c[rows] for n, c in users.table.items()}, users.ids[rows]), top=3)
        for rows in (slice(0, 5), slice(5, 12))
    ]
    files = write_profiles(iter(halves), ["ctr"], tmp_path, "item")
    expected = pd.concat([half["ctr"] for half in halves], ignore_index=True)
    parquet, csv = files["ctr"]
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), expected)
    assert pq.ParquetFile(parquet).num_row_groups == 2
    assert csv.read_text().count("user,rank") == 1 and len(pd.read_csv(csv)) == 36


def test_files_appear_whole_or_not_at_all(profiler, run, tmp_path):
    def interrupted():
        yield profiler.profiles(Users.of(run.prepared), top=3)
        raise KeyboardInterrupt

    (tmp_path / "ctr_item.csv").write_text("as it was")
    with pytest.raises(KeyboardInterrupt):
        write_profiles(interrupted(), ["ctr", "cvr"], tmp_path, "item")
    assert [path.name for path in tmp_path.iterdir()] == ["ctr_item.csv"]
    assert (tmp_path / "ctr_item.csv").read_text() == "as it was"


def test_an_index_is_kept_and_its_recall_told(run, tmp_path, monkeypatch):
    lines = []
    options = {"tasks": ["cvr"], "top": 5, "formats": ["parquet"], "report": lines.append}
    exact = profile_run(run, folder=tmp_path / "exact", **options)["cvr"][0]
    monkeypatch.setattr(profile_files, "RECALL_USERS", 4)
    found = profile_run(run, folder=tmp_path, index=IndexConfig("flat"), **options)["cvr"][0]
    pd.testing.assert_frame_equal(pd.read_parquet(found), pd.read_parquet(exact), atol=1e-6)
    path = tmp_path / "cvr_flat_index.npz"
    assert len(VectorIndex.load(path)) == 30
    assert lines == [
        f"Index: {path}, built from 30 items",
        "recall@5 of cvr: 1.0000 against exact scoring (4 users)",
    ]


def test_an_index_is_used_again_unless_vectors_or_settings_have_changed(tmp_path):
    vectors, lines = np.random.default_rng(0).normal(size=(30, 4)), []
    first, other = IndexConfig("hnsw", links=4), IndexConfig("hnsw", links=5)
    path = tmp_path / "index.npz"
    for values, config in ((vectors, first), (vectors, first), (vectors + 1, first), (vectors + 1, other)):
        index = kept_index(values, config, path, lines.append)
        assert index.fits(values) and index.config == config
    assert [line.removeprefix(f"Index: {path}, ") for line in lines] == [
        *("built from 30 items", "as it was", "built from 30 items", "built from 30 items")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["click"]}, r"which are \['ctr', 'cvr'\]. Received: \['click'\]"),
        ({"users": [1, 99]}, "unknown or twice: 99"),
        ({"formats": ["xlsx"]}, r"some of \('parquet', 'csv'\). Received: \('xlsx',\)"),
        ({"formats": []}, r"Received: \(\)"),
        ({"memory_mb": 1}, "MiB of memory are needed"),
        ({"by": "genre", "index": IndexConfig("flat")}, "genres are scored exactly"),
    ],
)
def test_bad_arguments_write_nothing(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        profile_run(run, folder=tmp_path, report=silent, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoint(tiny_run):
    tiny_run.checkpoint.unlink()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        profile_run(tiny_run)


def test_the_script(script, tiny_run):
    status, output, error = script("--checkpoint_path", tiny_run.folder, "--task", "cvr", "--top", 2, "--users", 7, 3)
    folder = tiny_run.folder / "profiles"
    assert (status, output) == (0, f"cvr: {folder / 'cvr_item.parquet'}, {folder / 'cvr_item.csv'}\n")
    assert "Profiles: 100%" in error and "2/2" in error
    assert pd.read_csv(folder / "cvr_item.csv")[["user", "rank"]].to_numpy().tolist() == [
        [7, 1],
        [7, 2],
        [3, 1],
        [3, 2],
    ]


def test_the_script_by_genre_into_another_folder(script, run, tmp_path):
    arguments = ["--by", "genre", "--genre_items", 2, "--out", tmp_path / "new", "--format", "csv", "--exclude_seen"]
    status, output, _ = script("--checkpoint_path", run.checkpoint, *arguments)
    assert status == 0 and output.splitlines()[0] == f"ctr: {tmp_path / 'new' / 'ctr_genre.csv'}"
    assert pd.read_csv(tmp_path / "new" / "cvr_genre.csv")["items"].max() == 2


def test_the_script_with_an_index(script, run, tmp_path):
    arguments = ["--task", "ctr", "--index", "faiss", "--index_kind", "ivf", "--cells", 3, "--effort", 3]
    status, output, _ = script("--checkpoint_path", run.folder, "--out", tmp_path, *arguments)
    assert status == 0
    assert "recall@20 of ctr: 1.0000" in output and (tmp_path / "ctr_ivf_index.npz").is_file()


def test_the_script_names_what_is_wrong(script, run, tmp_path):
    options = ["--checkpoint_path", run.folder, "--out", tmp_path]
    for arguments, message in (
        (["--users", 1, 99], "unknown or twice: 99"),
        (["--task", "click"], "Received: ['click']"),
        (["--users", "all", 3], "argument --users: expected ids or all, received ['all', 3]"),
        (["--users", "4x"], "expected ids of users, or all; received '4x'"),
        (
            ["--index_kind", "ivf"],
            "--index_kind: belongs to --index with --index_kind flat|hnsw|ivf, received no",
        ),
        (["--index", "faiss", "--cells", 3], "--cells: belongs to --index with --index_kind ivf, received an index of"),
    ):
        status, _, error = script(*options, *arguments)
        assert status == 2 and message in error
    assert list(tmp_path.iterdir()) == []


def test_help_and_bad_arguments_import_nothing_heavy():
    code = (
        "import runpy, sys\n"
        "for arguments in (['--help'], ['--checkpoint_path', '.', '--top', '0'],"
        " ['--checkpoint_path', '.', '--users', '3', 'all']):\n"
        "    sys.argv = [sys.argv[0], *arguments]\n"
        "    try:\n        runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as ended:\n        print('status', ended.code)\n"
        "print('heavy', sorted({'tensorflow', 'keras', 'pandas', 'pyarrow', 'faiss'} & set(sys.modules)))"
    )
    prefix = f"import sys; sys.argv = [{str(SCRIPT)!r}]\n"
    done = subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("status", "heavy"))]
    assert lines == ["status 0", "status 2", "status 2", "heavy []"], done.stderr
