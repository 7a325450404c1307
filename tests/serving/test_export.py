# SPDX-License-Identifier: Apache-2.0
"""Versions on disk, what lies in them, and the command that writes them."""

import json
import os
import shlex
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from mvke_tf.cli import main
from mvke_tf.errors import ConfigError, RunError
from mvke_tf.models import build_model
from mvke_tf.run import Run
from mvke_tf.serving import export_run, export_saved_model
from tests.serving.helpers import ITEMS

pytestmark = pytest.mark.slow


def test_signatures_json_describes_the_signatures(run, exported, signatures):
    described = json.loads((exported / "signatures.json").read_text(encoding="utf-8"))
    names = ["gate_weights", "item_vectors", "recommend", "score_ids", "serving_default", "user_vectors"]
    assert sorted(described["signatures"]) == sorted(signatures) == names
    for name, signature in signatures.items():
        actual = {"inputs": signature.structured_input_signature[1], "outputs": signature.structured_outputs}
        for side, specs in actual.items():
            fields = described["signatures"][name][side]
            assert set(specs) == set(fields)
            for field, spec in specs.items():
                shape = [-1 if size is None else size for size in spec.shape]
                assert (fields[field]["dtype"], fields[field]["shape"]) == (spec.dtype.name, shape), (name, field)
    assert (described["format"], described["model"]) == (3, "mvke")
    assert sorted(described["files"]) == [
        *("client.py", "saved_model.pb", "variables/variables.data-00000-of-00001", "variables/variables.index")
    ]
    assert described["catalogue"] == {"items": ITEMS, "id_dtype": "string", "padding_id": ""}
    assert described["tasks"]["buy"] == {"kind": "binary", "given": None, "prediction": "probability of buy"}
    assert described["signatures"]["recommend"]["cost"] == {
        **{"per_row": ITEMS, "answer_per_row": {"input": "k", "most": ITEMS}}
    }
    assert described["signatures"]["score_ids"]["cost"] == {"per_value": {"item_ids": 24 + 32}}
    assert "cost" not in described["signatures"]["serving_default"]


def test_signatures_json_says_what_the_features_are(run, exported):
    described = json.loads((exported / "signatures.json").read_text(encoding="utf-8"))["signatures"]
    inputs = {name: set(signature["inputs"]) for name, signature in described.items()}
    user, item = set(run.prepared.users.raw), set(run.prepared.items.raw)
    assert inputs["serving_default"] == user | item
    assert inputs["user_vectors"] == user
    assert inputs["item_vectors"] == inputs["gate_weights"] == item
    assert inputs["score_ids"] == user | {"item_ids"}
    assert inputs["recommend"] == user | {"k", "task", "exclude"}
    fields = described["serving_default"]["inputs"]
    dtypes = {name: (field["dtype"], field["shape"]) for name, field in fields.items()}
    assert dtypes["user"] == ("int64", [-1])
    assert dtypes["age"] == ("float32", [-1])
    assert dtypes["country"] == ("string", [-1])
    assert dtypes["recent_items"] == ("string", [-1, -1])
    assert dtypes["tags_weights"] == ("float32", [-1, -1])
    assert "list of any length, values of item; the first 5 count" in fields["recent_items"]["description"]
    assert "weight of each slot of tags" in fields["tags_weights"]["description"]
    ones = {name: field["ones_like"] for name, field in fields.items() if "ones_like" in field}
    # Those of liked_tags count how often.
    assert ones == {"recent_items_weights": "recent_items", "tags_weights": "tags"}
    assert "logit of click" in described["item_vectors"]["outputs"]["item_vector_click"]["description"]
    assert "experts (1, 2, 3, 4) in buy" in described["gate_weights"]["outputs"]["gate_buy"]["description"]


@pytest.fixture
def quick(monkeypatch):
    """Writes a small file in place of the SavedModel: for tests of names and versions."""

    def save(serving, path, signatures):
        Path(path).mkdir()
        (Path(path) / "saved_model.pb").write_text(" ".join(signatures))

    monkeypatch.setattr(tf.saved_model, "save", save)
    monkeypatch.setattr("mvke_tf.serving.signatures.Signature.concrete", lambda self: None)


def contents(version: Path) -> list[str]:
    return sorted(entry.name for entry in version.iterdir())


WHOLE = ["client.py", "saved_model.pb", "signatures.json"]


def test_versions_count_up_and_stay(run, model, tmp_path, quick):
    (tmp_path / "export" / "9").mkdir(parents=True)
    (tmp_path / "export" / "notes").mkdir()
    (tmp_path / "export" / "9" / "kept").touch()
    for version in ("10", "11"):
        path = export_saved_model(model, run.prepared.encoder, tmp_path / "export")
        assert path == tmp_path / "export" / version
    assert contents(tmp_path / "export") == ["10", "11", "9", "notes"]
    assert contents(tmp_path / "export" / "9") == ["kept"]


def test_a_version_can_be_chosen_once(run, tmp_path, quick):
    assert export_run(run, tmp_path / "export", version=20261121) == tmp_path / "export" / "20261121"
    before = (tmp_path / "export" / "20261121" / "saved_model.pb").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"never overwritten.* \(20261122\)\. Received: 20261121"):
        export_run(run, tmp_path / "export", version=20261121)
    assert (tmp_path / "export" / "20261121" / "saved_model.pb").stat().st_mtime_ns == before
    (tmp_path / "export" / "007").mkdir()
    with pytest.raises(ConfigError, match="has version 7 already"):
        export_run(run, tmp_path / "export", version=7)
    assert export_run(run, tmp_path / "export", version=6) == tmp_path / "export" / "6"
    assert contents(tmp_path / "export") == ["007", "20261121", "6"]
    with pytest.raises(ConfigError, match=r"at least 1\. Received: 0"):
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
    with pytest.raises(ConfigError, match="has version 3 already"):
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
    with pytest.raises(ConfigError, match="KERAS_BACKEND=tensorflow"):
        export_run(run, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_model_of_other_data_is_refused(run, tmp_path):
    schema = run.prepared.schema()
    fewer = [feature for feature in schema.features if feature.name != "age"]
    other = build_model("hard_sharing", type(schema)(fewer, schema.tasks))
    with pytest.raises(ValueError, match="do not belong together"):
        export_saved_model(other, run.prepared.encoder, tmp_path / "export")


def test_a_file_is_no_export_folder(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Received a file"):
        export_run(run, tmp_path / "file")


def test_a_run_without_checkpoint_is_refused(run, tmp_path):
    empty = Run.create(tmp_path / "empty", run.config, run.prepared)
    with pytest.raises(RunError, match="no checkpoint"):
        export_run(empty)


def command(*arguments: object) -> int:
    """Runs `mvke export` in this process; its exit status."""
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, arguments)])
    return ended.value.code


def test_the_command_exports_and_says_how_to_load(run, exported, tmp_path, capsys, quick):
    arguments = (run.checkpoint, "--output_dir", tmp_path / "export", "--model", "mvke", "--version", 5)
    assert command(*arguments) == 0
    assert contents(tmp_path / "export" / "5") == WHOLE
    lines = capsys.readouterr().out.splitlines()
    load = shlex.split(next(line for line in lines if line.startswith("Load it: ")).removeprefix("Load it: "))
    assert load[:2] == ["python", "-c"] and str(tmp_path / "export" / "5") in load[2]
    exec(load[2].replace(str(tmp_path / "export" / "5"), str(exported)), {})
    loaded = capsys.readouterr().out
    assert "recent_items_weights" in loaded and "buy" in loaded
    assert command(*arguments) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_the_command_refuses_another_model(run, tmp_path, capsys):
    assert command("--checkpoint_path", run.folder, "--output_dir", tmp_path / "export", "--model", "mmoe") == 2
    assert "Expected: mvke. Received: mmoe" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()
