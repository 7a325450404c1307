import json

import pytest

from mvke_tf.files import write_json, written_whole


def test_written_whole_replaces_a_file(tmp_path):
    target = tmp_path / "folder" / "a.txt"
    for text in ("first", "second"):
        with written_whole(target) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
        assert target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_written_whole_makes_a_folder(tmp_path):
    with written_whole(tmp_path / "made") as temporary:
        temporary.mkdir()
        (temporary / "inside").write_text("x")
    assert (tmp_path / "made" / "inside").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_written_whole_leaves_the_target_alone_after_an_error(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("kept")
    with pytest.raises(error), written_whole(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, None]}
