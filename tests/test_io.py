# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvke_tf import io
from mvke_tf.errors import ConfigError, DataError
from mvke_tf.io import atomic_write, csv_safe, read_json, remove_temporary, write_json


def test_atomic_write_replaces_a_file(tmp_path):
    target = tmp_path / "folder" / "a.txt"
    for text in ("first", "second"):
        with atomic_write(target) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_atomic_write_replaces_a_folder(tmp_path):
    for number in range(2):
        with atomic_write(tmp_path / "made") as temporary:
            temporary.mkdir()
            (temporary / f"inside{number}").write_text("x")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["inside1"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_atomic_write_leaves_the_target_alone_after_an_error(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("kept")
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_stays_if_the_last_rename_fails(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "inside").write_text("kept")
    replace = os.replace

    def fail(source, target):
        if target == tmp_path / "made" and source.name == "made":
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"), atomic_write(tmp_path / "made") as temporary:
        temporary.mkdir()
    assert (tmp_path / "made" / "inside").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, None]}
    assert read_json(tmp_path / "a.json") == {"b": [1, None]}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"{", "is no valid JSON: Expecting property name"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 10_000, "is no valid JSON: Exceeds the limit"),
        (b'"\xff"', "is no text in UTF-8"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, contents, message):
    path = tmp_path / "a.json"
    path.write_bytes(contents)
    with pytest.raises(DataError, match=rf"a\.json {message}|a\.json is no JSON.*{message}"):
        read_json(path)
    with pytest.raises(ConfigError):
        read_json(path, ConfigError)


def test_json_that_is_missing_or_far_too_large(tmp_path):
    with pytest.raises(DataError, match=r"a\.json cannot be read: No such file"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1, 2]")
    with pytest.raises(DataError, match=r"a\.json is too large: 6 bytes. Expected: at most 3"):
        read_json(tmp_path / "a.json", most_bytes=3)
    assert read_json(tmp_path / "a.json", most_bytes=None) == [1, 2]


KILLED = """
import os, signal, sys
from pathlib import Path
from mvke_tf.io import atomic_write

replace, renames = os.replace, []

def counted(source, target):
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    renames.append(target)
    replace(source, target)

os.replace = counted
with atomic_write(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "inside").write_text("new")
"""


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a", "0"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "b.txt") as temporary:
        temporary.write_text("in the making")
        remove_temporary(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [temporary.parent.name]
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


@pytest.mark.parametrize(("renames", "contents"), [(0, "old"), (1, "new")])
def test_a_folder_is_the_old_or_the_new_one_whenever_the_process_is_killed(tmp_path, renames, contents):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "inside").write_text("old")
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a", str(renames)], check=False)
    assert (tmp_path / "a").exists() == (renames == 0)
    remove_temporary(tmp_path)
    assert (tmp_path / "a" / "inside").read_text() == contents
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_another_host_writes_is_left_alone(tmp_path):
    (tmp_path / ".writing-999999999-elsewhere-abc").mkdir()
    write_json(tmp_path / "a.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-999999999-elsewhere-abc", "a.json"]


def test_no_cell_of_a_csv_is_a_formula_or_ends_its_row():
    cells = {"=1": "'=1", "\r=1": "'\n=1", "a\r=1": "a\n=1", "a\r\nb": "a\nb", "a=1": "a=1", "": "", "-x": "'-x"}
    assert {cell: csv_safe(cell) for cell in cells} == cells
    assert csv_safe(-1.5) == -1.5 and csv_safe(None) is None


def test_a_folder_is_discarded_at_once(tmp_path, monkeypatch):
    (tmp_path / "old" / "inner").mkdir(parents=True)
    (tmp_path / "old" / "inner" / "file").write_text("x")
    seen = []
    monkeypatch.setattr(io.shutil, "rmtree", lambda path, **_: seen.append((Path(path), (tmp_path / "old").exists())))
    io.discard(tmp_path / "old")
    ((aside, was_there),) = seen
    assert not was_there and (aside / "old" / "inner" / "file").is_file()
    # As a killed process leaves it: the next write beside it clears it away, once that process is gone.
    monkeypatch.undo()
    monkeypatch.setattr(io, "process_exists", lambda pid: False)
    io.remove_temporary(tmp_path)
    assert not list(tmp_path.iterdir())
