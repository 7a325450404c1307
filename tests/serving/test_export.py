"""Versions on disk, what lies in them, and the command that writes them."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from mvke_tf.run import Run, RunError
from mvke_tf.serving import export_run, export_saved_model
from tests.conftest import REPOSITORY


def test_signatures_json_describes_the_signatures(run, exported, signatures):
    described = json.loads((exported / "signatures.json").read_text(encoding="utf-8"))
    names = ["gate_weights", "item_vectors", "recommend", "score_ids", "serving_default", "user_vectors"]
    assert sorted(described["signatures"]) == sorted(signatures) == names
    for name, signature in signatures.items():
        actual = {"inputs": signature.structured_input_signature[1], "outputs": signature.structured_outputs}
        for side, specs in actual.items():
            ports = described["signatures"][name][side]
            assert set(specs) == set(ports)
            for port, spec in specs.items():
                shape = [-1 if size is None else size for size in spec.shape]
                assert (ports[port]["dtype"], ports[port]["shape"]) == (spec.dtype.name, shape), (name, port)
    assert described["model"] == "mvke"
    assert described["catalogue"] == {"items": 15, "id_dtype": "int64", "padding_id": -1}
    assert described["tasks"]["cvr"] == {"kind": "binary", "given": None, "prediction": "probability of cvr"}


def test_signatures_json_says_what_the_features_are(run, exported):
    described = json.loads((exported / "signatures.json").read_text(encoding="utf-8"))["signatures"]
    inputs = {name: set(signature["inputs"]) for name, signature in described.items()}
    user, item = set(run.prepared.raw["user"]), set(run.prepared.raw["item"])
    assert inputs["serving_default"] == user | item
    assert inputs["user_vectors"] == user
    assert inputs["item_vectors"] == inputs["gate_weights"] == item
    assert inputs["score_ids"] == user | {"item_ids"}
    assert inputs["recommend"] == user | {"k", "task", "exclude"}
    ports = described["serving_default"]["inputs"]
    dtypes = {name: (port["dtype"], port["shape"]) for name, port in ports.items()}
    assert dtypes["user_id"] == ("int64", [-1])
    assert dtypes["age"] == ("float32", [-1])
    assert dtypes["gender"] == ("string", [-1])
    assert dtypes["recent_items"] == ("int64", [-1, -1])
    assert dtypes["genres_weights"] == ("float32", [-1, -1])
    assert "list of any length" in ports["recent_items"]["description"]
    assert "weight of each slot of genres" in ports["genres_weights"]["description"]
    assert "logit of ctr" in described["item_vectors"]["outputs"]["item_vector_ctr"]["description"]
    assert "experts (1, 2, 3, 4) in cvr" in described["gate_weights"]["outputs"]["gate_cvr"]["description"]


@pytest.fixture
def quick(monkeypatch):
    """Writes a small file in place of the SavedModel: for tests of names and versions."""

    def save(serving, path, signatures):
        Path(path).mkdir()
        (Path(path) / "saved_model.pb").write_text(" ".join(signatures))

    monkeypatch.setattr(tf.saved_model, "save", save)
    monkeypatch.setattr("mvke_tf.serving.ports.Signature.concrete", lambda self: None)


def contents(version: Path) -> list[str]:
    return sorted(entry.name for entry in version.iterdir())


WHOLE = ["client.py", "saved_model.pb", "signatures.json"]


def test_versions_count_up_and_stay(run, model, tmp_path, quick):
    (tmp_path / "export" / "9").mkdir(parents=True)
    (tmp_path / "export" / "notes").mkdir()
    (tmp_path / "export" / "9" / "kept").touch()
    for version in ("10", "11"):
        path = export_saved_model(model, run.prepared.encoder, tmp_path / "export", report=list)
        assert path == tmp_path / "export" / version
    assert contents(tmp_path / "export") == ["10", "11", "9", "notes"]
    assert contents(tmp_path / "export" / "9") == ["kept"]


def test_a_version_can_be_chosen_once(run, tmp_path, quick):
    assert export_run(run, tmp_path / "export", version=20261121) == tmp_path / "export" / "20261121"
    before = (tmp_path / "export" / "20261121" / "saved_model.pb").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"never overwritten.* \(20261122\)\. Received: 20261121"):
        export_run(run, tmp_path / "export", version=20261121)
    assert (tmp_path / "export" / "20261121" / "saved_model.pb").stat().st_mtime_ns == before
    (tmp_path / "export" / "007").mkdir()
    with pytest.raises(ValueError, match="has version 7 already"):
        export_run(run, tmp_path / "export", version=7)
    assert export_run(run, tmp_path / "export", version=6) == tmp_path / "export" / "6"
    assert contents(tmp_path / "export") == ["007", "20261121", "6"]
    with pytest.raises(ValueError, match=r"at least 1\. Received: 0"):
        export_run(run, tmp_path / "export", version=0)


@pytest.fixture
def overtaken(run, quick, tmp_path, monkeypatch):
    """The first export is overtaken by another one just before its folder is renamed."""
    rename, started = os.replace, []

    def replace(source, target):
        if Path(target).parent == tmp_path / "export" and not started:
            started.append(target)
            export_run(run, tmp_path / "export", version=int(Path(target).name))
            (Path(target) / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_the_later_of_two_exports_gets_the_next_version(run, tmp_path, overtaken):
    assert export_run(run, tmp_path / "export") == tmp_path / "export" / "2"
    assert contents(tmp_path / "export") == ["1", "2"]
    assert contents(tmp_path / "export" / "1") == sorted([*WHOLE, "theirs"])
    assert contents(tmp_path / "export" / "2") == WHOLE


def test_the_later_of_two_exports_of_a_version_is_refused(run, tmp_path, overtaken):
    with pytest.raises(ValueError, match="has version 3 already"):
        export_run(run, tmp_path / "export", version=3)
    assert contents(tmp_path / "export") == ["3"]
    assert contents(tmp_path / "export" / "3") == sorted([*WHOLE, "theirs"])


def test_a_whole_version_holds_the_model_and_its_description(exported):
    assert set(WHOLE) < set(contents(exported))


def test_the_first_version_is_1_in_the_run(run, exported):
    assert exported == run.folder / "export" / "1"


def test_a_failed_export_leaves_nothing(run, tmp_path, monkeypatch, quick):
    def full_disk(path, values):
        assert (path.parent / "saved_model.pb").is_file()
        raise OSError("No space left on device")

    monkeypatch.setattr("mvke_tf.serving.export.write_json", full_disk)
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
    assert all(option in done.stdout for option in ("--checkpoint_path", "--export_path", "--model", "--version"))


@pytest.mark.parametrize("args", [[], ["--checkpoint_path", "nowhere/at/all"], ["--unknown"], ["--version", "0"]])
def test_script_refuses_bad_arguments_without_tensorflow(args):
    done = script_without_tensorflow(*args)
    assert done.returncode == 2
    assert "error:" in done.stderr and "Traceback" not in done.stderr


def test_script_exports_and_says_how_to_load(run, exported, tmp_path, monkeypatch, capsys, quick):
    args = ("--checkpoint_path", run.checkpoint, "--export_path", tmp_path / "export", "--model", "mvke")
    assert script(monkeypatch, *args, "--version", 5) == 0
    assert contents(tmp_path / "export" / "5") == WHOLE
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("Load it: "))
    assert command[:2] == ["python", "-c"] and str(tmp_path / "export" / "5") in command[2]
    exec(command[2].replace(str(tmp_path / "export" / "5"), str(exported)), {})
    loaded = capsys.readouterr().out
    assert "recent_items_weights" in loaded and "cvr" in loaded
    assert script(monkeypatch, *args, "--version", 5) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_script_refuses_another_model(run, tmp_path, monkeypatch, capsys):
    args = ("--checkpoint_path", run.folder, "--export_path", tmp_path / "export", "--model", "mmoe")
    assert script(monkeypatch, *args) == 2
    assert "Expected: mvke. Received: mmoe" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()
