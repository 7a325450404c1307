"""The SavedModel, called from a process that has TensorFlow but nothing of ours."""

import json
import os
import pickle
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from mvke_tf.config import DataConfig, ModelConfig, RunConfig
from mvke_tf.data.movielens import GENRES, MovieLens
from mvke_tf.data.prepared import prepare
from mvke_tf.models.mvke import build_mvke
from mvke_tf.run import Run, RunError
from mvke_tf.schema import WEIGHTS_SUFFIX
from mvke_tf.serving import export_run, export_saved_model

REPOSITORY = Path(__file__).resolve().parents[1]
LENGTH = 4  # slots of the lists of items
UNKNOWN = {
    "user_id": -5,
    "age": np.nan,
    "gender": "X",
    "occupation": "",
    "rating_count": np.inf,
    "mean_rating": np.nan,
    "item_id": 10**12,
    "release_year": np.nan,
    "popularity": np.nan,
    "item_mean_rating": -np.inf,
}

# A process that only knows the path of the SavedModel: pickled features in, pickled answers or error messages out.
CLIENT = """
import pickle, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mvke_tf", "keras_rs"):
            raise ImportError(f"{name} is not for this process")

sys.meta_path.insert(0, Blocked())
import tensorflow as tf

serve = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
while True:
    try:
        features = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        answer = {k: v.numpy() for k, v in serve(**features).items()}
    except (TypeError, ValueError, tf.errors.OpError) as error:
        answer = str(error)
    sys.stdout.buffer.write(pickle.dumps(answer))
    sys.stdout.buffer.flush()
assert not {"mvke_tf", "keras_rs"} & set(sys.modules)
"""


def small_frames(random: np.random.Generator) -> MovieLens:
    users, items, ratings = 12, 15, 120
    chosen = random.choice(users * items, ratings, replace=False)
    return MovieLens(
        ratings=pd.DataFrame(
            {
                "user_id": chosen // items + 1,
                "item_id": chosen % items + 1,
                "rating": random.integers(1, 6, ratings),
                "timestamp": 880_000_000 + random.integers(0, 100, ratings),
            }
        ),
        users=pd.DataFrame(
            {
                "user_id": np.arange(users) + 1,
                "age": random.integers(10, 70, users),
                "gender": random.choice(["F", "M"], users),
                "occupation": random.choice(["artist", "student", "writer"], users),
                "zip_code": "12345",
            }
        ),
        items=pd.DataFrame(
            {
                "item_id": np.arange(items) + 1,
                "title": [f"Film {n}" for n in range(items)],
                "release_year": pd.array([*range(1980, 1980 + items - 1), None], dtype="Int64"),
                "genres": [tuple(random.choice(GENRES, 2, replace=False)) for _ in range(items)],
            }
        ),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """An untrained run whose probabilities spread."""
    folder = tmp_path_factory.mktemp("serving")
    config = RunConfig(DataConfig(history_length=LENGTH), ModelConfig(embedding_dim=8, hidden_dims=(8,)))
    prepared = prepare(small_frames(np.random.default_rng(0)), config.data)
    prepared.save(folder / "prepared.npz")
    run = Run.create(folder / "run", config, folder / "prepared.npz")
    keras.utils.set_random_seed(0)
    model = build_mvke(prepared.schema, config.model)
    for layer in model.layers:
        if layer.name.startswith("embedding_"):
            layer.set_weights([100 * weight for weight in layer.get_weights()])
    run.save_checkpoint(model)
    return run


@pytest.fixture(scope="module")
def exported(run) -> Path:
    return export_run(run)


@pytest.fixture(scope="module")
def serve(exported, tmp_path_factory):
    """Calls `serving_default` in the other process; probabilities, or the message of its error."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", CLIENT, str(exported)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )

    def call(features: dict) -> dict[str, np.ndarray] | str:
        process.stdin.write(pickle.dumps({name: np.asarray(values) for name, values in features.items()}))
        process.stdin.flush()
        return pickle.load(process.stdout)

    yield call
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture
def raw(run) -> dict[str, np.ndarray]:
    """The raw features of every pair of the test part."""
    prepared = run.prepared
    pairs = prepared.pairs.iloc[prepared.part_rows("test")]
    return {
        name: np.asarray(column)[pairs[f"{tower}_row"]]
        for tower in ("user", "item")
        for name, column in prepared.raw[tower].items()
    }


def expected(run: Run, encoded: dict) -> dict[str, np.ndarray]:
    """Probabilities of the Keras model on encoded rows."""
    logits = run.load_model()(encoded, training=False)
    return {task: 1 / (1 + np.exp(-logit.numpy()[:, 0].astype(np.float64))) for task, logit in logits.items()}


def assert_close(answer: dict[str, np.ndarray] | str, wanted: dict[str, np.ndarray]) -> None:
    assert isinstance(answer, dict), answer
    assert sorted(answer) == ["ctr", "cvr"]
    for task, probabilities in answer.items():
        assert probabilities.dtype == np.float32
        assert probabilities.shape == wanted[task].shape
        np.testing.assert_allclose(probabilities, wanted[task], rtol=0, atol=1e-6)


def test_raw_rows_give_the_probabilities_of_the_keras_model(run, raw, serve):
    part = run.prepared.part("test")
    encoded = {name: column[part.user_rows] for name, column in part.users.items()}
    encoded |= {name: column[part.item_rows] for name, column in part.items.items()}
    wanted = expected(run, encoded)
    assert len(wanted["ctr"]) > 30
    assert all(np.ptp(probabilities) > 0.01 for probabilities in wanted.values())
    assert_close(serve(raw), wanted)


def test_batch_of_one(raw, serve):
    many = serve(raw)
    for row in (0, 7):
        one = serve({name: column[row : row + 1] for name, column in raw.items()})
        assert_close(one, {task: probabilities[row : row + 1] for task, probabilities in many.items()})


def test_unknown_values_are_index_0(run, raw, serve):
    unknown = dict(raw)
    for name, value in UNKNOWN.items():
        unknown[name] = np.full_like(raw[name], value, dtype=raw[name].dtype if raw[name].dtype.kind != "U" else "U9")
    for name, value in {"recent_items": -1, "liked_items": 10**12, "liked_genres": "Noise", "genres": ""}.items():
        unknown[name] = np.full((len(raw[name]), 2), value)
        unknown[name + WEIGHTS_SUFFIX] = np.array([[2, 0]] * len(raw[name]), np.float32)
    rows = len(raw["user_id"])
    encoded = {}
    for feature in run.prepared.schema.features:
        shape = (rows,) if feature.length == 1 else (rows, feature.length)
        encoded[feature.name] = np.zeros(shape, np.int32)
        if feature.length > 1:
            encoded[feature.name + WEIGHTS_SUFFIX] = np.eye(1, feature.length, dtype=np.float32).repeat(rows, 0)
    assert_close(serve(unknown), expected(run, encoded))


def lists(raw: dict, values: list[int], weights: list[float]) -> dict:
    """`raw` with one list of recent items for all rows."""
    rows = len(raw["user_id"])
    return {
        **raw,
        "recent_items": np.array([values] * rows, np.int64).reshape(rows, -1),
        "recent_items_weights": np.array([weights] * rows, np.float32).reshape(rows, -1),
    }


def test_a_short_list_equals_the_same_list_filled_up(raw, serve):
    short = serve(lists(raw, [3, 5], [4, 2]))
    assert_close(serve(lists(raw, [3, 5, 9, 9], [4, 2, 0, 0])), short)
    assert np.abs(serve(lists(raw, [3, 5], [4, 1]))["ctr"] - short["ctr"]).max() > 1e-5


def test_a_long_list_is_cut_to_the_most_recent(raw, serve):
    cut = serve(lists(raw, [1, 2, 3, 4], [5, 4, 3, 2]))
    assert_close(serve(lists(raw, [1, 2, 3, 4, 5, 6, 7], [5, 4, 3, 2, 5, 5, 5])), cut)
    assert np.abs(serve(lists(raw, [2, 3, 4, 5], [4, 3, 2, 5]))["ctr"] - cut["ctr"]).max() > 1e-5


def test_an_empty_list_equals_empty_slots(raw, serve):
    assert_close(serve(lists(raw, [], [])), serve(lists(raw, [1, 2, 3, 4], [0, 0, 0, 0])))


@pytest.mark.parametrize("name", ["user_id", "genres_weights"])
def test_a_missing_feature_is_named(raw, serve, name):
    raw.pop(name)
    assert f"missing a required argument: '{name}'" in serve(raw)


def test_a_misnamed_feature_is_named(raw, serve):
    assert "unexpected keyword argument 'user'" in serve({**raw, "user": raw["user_id"]})
    raw["user"] = raw.pop("user_id")
    assert "missing a required argument: 'user_id'" in serve(raw)


@pytest.mark.parametrize(("name", "other"), [("gender", "user_id"), ("age", "gender"), ("recent_items", "genres")])
def test_a_wrong_dtype_is_refused(raw, serve, name, other):
    assert "Binding inputs to tf.function failed" in serve({**raw, name: raw[other]})


def test_a_flat_list_is_named(raw, serve, exported):
    raw["recent_items"] = raw["item_id"]
    assert f"Can not cast TensorSpec(shape=({len(raw['item_id'])},), dtype=tf.int64, name='recent_items')" in serve(raw)
    serve_tensors = tf.saved_model.load(exported).signatures["serving_default"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="Shape of tensor recent_items"):
        serve_tensors(**{name: tf.constant(column) for name, column in raw.items()})


@pytest.mark.parametrize("name", ["item_id", "genres"])
def test_another_number_of_rows_is_named(raw, serve, name):
    message = serve({**raw, name: raw[name][:1]})
    assert "must have as many rows as the others" in message
    assert f"[{name}] [Expected:] [{len(raw[name])}] [Received:] [1]" in " ".join(message.split())


def test_another_number_of_weights_is_named(raw, serve):
    message = serve({**raw, "genres_weights": raw["genres_weights"][:, :3]})
    assert "must have as many slots as its list" in message
    assert f"[genres_weights] [Expected:] [{len(GENRES)}] [Received:] [3]" in " ".join(message.split())


def test_signatures_json_describes_the_signature(run, exported):
    described = json.loads((exported / "signatures.json").read_text(encoding="utf-8"))
    signatures = tf.saved_model.load(exported).signatures
    assert sorted(described) == sorted(signatures) == ["serving_default"]
    serving_default = described["serving_default"]
    assert set(serving_default["inputs"]) == set(run.prepared.raw["user"]) | set(run.prepared.raw["item"])
    assert list(serving_default["outputs"]) == ["ctr", "cvr"]
    actual = {
        "inputs": signatures["serving_default"].structured_input_signature[1],
        "outputs": signatures["serving_default"].structured_outputs,
    }
    for side, specs in actual.items():
        for name, spec in specs.items():
            shape = [-1 if size is None else size for size in spec.shape]
            port = serving_default[side][name]
            assert (port["dtype"], port["shape"]) == (spec.dtype.name, shape)
        assert set(specs) == set(serving_default[side])
    dtypes = {name: (port["dtype"], port["shape"]) for name, port in serving_default["inputs"].items()}
    assert dtypes["user_id"] == ("int64", [-1])
    assert dtypes["age"] == ("float32", [-1])
    assert dtypes["gender"] == ("string", [-1])
    assert dtypes["recent_items"] == ("int64", [-1, -1])
    assert dtypes["genres_weights"] == ("float32", [-1, -1])
    assert "list of any length" in serving_default["inputs"]["recent_items"]["description"]
    assert "weight of each slot of genres" in serving_default["inputs"]["genres_weights"]["description"]


def test_versions_count_up_and_stay(run, tmp_path):
    (tmp_path / "export" / "9").mkdir(parents=True)
    (tmp_path / "export" / "notes").mkdir()
    (tmp_path / "export" / "9" / "kept").touch()
    model = run.load_model()
    assert export_saved_model(model, run.prepared.encoder, tmp_path / "export") == tmp_path / "export" / "10"
    assert export_saved_model(model, run.prepared.encoder, tmp_path / "export") == tmp_path / "export" / "11"
    assert sorted(entry.name for entry in (tmp_path / "export").iterdir()) == ["10", "11", "9", "notes"]
    assert [entry.name for entry in (tmp_path / "export" / "9").iterdir()] == ["kept"]


def test_the_first_version_is_1_in_the_run(run, exported):
    assert exported == run.folder / "export" / "1"


def test_a_failed_export_leaves_nothing(run, tmp_path, monkeypatch):
    def full_disk(path, values):
        assert (path.parent / "saved_model.pb").is_file()
        raise OSError("No space left on device")

    monkeypatch.setattr("mvke_tf.serving.write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_run(run, tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_another_backend_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="KERAS_BACKEND=tensorflow"):
        export_run(run, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_model_of_other_data_is_refused(run, tmp_path):
    age = keras.Input((), name="age")
    other = keras.Model({"age": age}, {"ctr": keras.layers.Reshape((1,))(age)})
    with pytest.raises(ValueError, match="do not belong together"):
        export_saved_model(other, run.prepared.encoder, tmp_path / "export")


def test_a_file_is_no_export_folder(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="Received a file"):
        export_run(run, tmp_path / "file")


def test_a_run_without_checkpoint_is_refused(run, tmp_path):
    empty = Run.create(tmp_path / "empty", run.config, run.folder / "prepared.npz")
    with pytest.raises(RunError, match="no checkpoint"):
        export_run(empty)


SCRIPT = REPOSITORY / "scripts" / "export.py"


def script(monkeypatch, *args: object) -> int:
    """Runs scripts/export.py in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return exit_info.value.code


def script_without_tensorflow(*args: str) -> subprocess.CompletedProcess:
    """Runs scripts/export.py where importing TensorFlow or Keras is an error."""
    code = "import runpy, sys; sys.modules['tensorflow'] = sys.modules['keras'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code, SCRIPT, *args], capture_output=True, text=True, timeout=300)


def test_script_help_needs_no_tensorflow():
    done = script_without_tensorflow("--help")
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in ("--checkpoint_path", "--export_path", "--model"))


@pytest.mark.parametrize("args", [[], ["--checkpoint_path", "nowhere/at/all"], ["--unknown"]])
def test_script_refuses_bad_arguments_without_tensorflow(args):
    done = script_without_tensorflow(*args)
    assert done.returncode == 2
    assert "error:" in done.stderr and "Traceback" not in done.stderr


def test_script_exports_and_says_how_to_load(run, tmp_path, monkeypatch, capsys):
    args = ("--checkpoint_path", run.checkpoint, "--export_path", tmp_path / "export", "--model", "mvke")
    assert script(monkeypatch, *args) == 0
    assert (tmp_path / "export" / "1" / "signatures.json").is_file()
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("Load it: python ")
    loaded = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr
    assert "recent_items_weights" in loaded.stdout and "cvr" in loaded.stdout


def test_script_refuses_another_model(run, tmp_path, monkeypatch, capsys):
    args = ("--checkpoint_path", run.folder, "--export_path", tmp_path / "export", "--model", "mmoe")
    assert script(monkeypatch, *args) == 2
    assert "Expected: mvke. Received: mmoe" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()
