import argparse
import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mvke_tf.cli import add_settings, given_settings, positive_int, read_settings, run_main
from mvke_tf.config import SECTIONS
from mvke_tf.data.movielens import DataError

EVALUATE = Path(__file__).resolve().parents[1] / "scripts" / "evaluate.py"


def raises(error: BaseException):
    def main() -> None:
        raise error

    return main


def status(main) -> int:
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs scripts/evaluate.py: its status, output and error output."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(EVALUATE), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EVALUATE), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return call


def test_a_main_that_returns_ends_with_0():
    called = []
    assert status(lambda: called.append(True)) == 0
    assert called == [True]


@pytest.mark.parametrize("kind", [ValueError, DataError])
def test_errors_of_the_user_are_told_without_traceback(kind, capsys, monkeypatch):
    monkeypatch.delenv("MVKE_DEBUG", raising=False)
    assert status(raises(kind("u.data:3 has no rating"))) == 2
    output, error = capsys.readouterr()
    assert error.splitlines()[0] == "error: u.data:3 has no rating"
    assert "Traceback" not in error and output == ""


def test_debugging_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("MVKE_DEBUG", "1")
    assert status(raises(DataError("bad"))) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("error: bad\n")


def test_ctrl_c_ends_with_130(capsys):
    assert status(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)


def test_a_status_of_main_passes_through():
    assert status(lambda: sys.exit(7)) == 7


@pytest.mark.parametrize(("before", "after"), [(None, "2"), ("0", "0")])
def test_tensorflow_logs_little_unless_told_otherwise(before, after, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", before or "")
    if before is None:
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    seen = []
    assert status(lambda: seen.append(os.environ["TF_CPP_MIN_LOG_LEVEL"])) == 0
    assert seen == [after]


def test_positive_int():
    assert positive_int("12") == 12
    for text in ("0", "-3", "1.5", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            positive_int(text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "0"),
        (["--checkpoint_path", "nowhere"], "2"),
        (["--checkpoint_path", ".", "--split", "tset"], "2"),
        (["--checkpoint_path", ".", "--batch_size", "0"], "2"),
    ],
)
def test_help_and_bad_arguments_import_nothing_heavy(arguments, expected):
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as ended:\n    print('status', ended.code)\n"
        "print('heavy', sorted({'tensorflow', 'keras', 'pandas', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    prefix = f"import sys; sys.argv = {[str(EVALUATE), *arguments]!r}\n"
    done = subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-2:] == [f"status {expected}", "heavy []"], done.stderr


def test_evaluate_without_a_run_says_what_to_give(evaluate, tmp_path):
    status, _, error = evaluate("--checkpoint_path", tmp_path / "missing")
    assert status == 2
    assert error.endswith(f"error: argument --checkpoint_path: there is nothing at {tmp_path / 'missing'}\n")
    status, _, error = evaluate("--checkpoint_path", tmp_path)
    assert status == 2
    assert error.startswith(f"error: There is no run at {tmp_path}. Expected a folder such as")


def test_evaluate_refuses_another_model_than_the_run_holds(evaluate, tiny_run):
    status, _, error = evaluate("--checkpoint_path", tiny_run.folder, "--model", "mmoe")
    assert status == 2
    assert error.startswith(f"error: --model does not fit the run {tiny_run.folder}. Expected: mvke. Received: mmoe\n")
    assert not tiny_run.report_file.exists()


def test_evaluate_prints_the_table_and_the_paths(evaluate, tiny_run):
    status, output, _ = evaluate("--model", "mvke", "--checkpoint_path", tiny_run.checkpoint, "--split", "validation")
    assert status == 0
    lines = output.splitlines()
    assert lines[0].startswith("Evaluating ") and lines[2].split()[:2] == ["task", "users"]
    assert [line.split()[0] for line in lines[4:10]] == ["ctr"] * 3 + ["cvr"] * 3
    made = dict(line.split(":", 1) for line in lines[11:])
    assert {what: Path(path.strip()) for what, path in made.items()} == {
        "settings": tiny_run.folder / "config.json",
        "best checkpoint": tiny_run.checkpoint,
        "report": tiny_run.report_file,
        "figures": tiny_run.figures,
    }
    assert sorted(path.name for path in tiny_run.figures.iterdir()) == [
        "validation_calibration.png",
        "validation_roc.png",
    ]


def parsed(*options: str, sections=("data", "model", "training")) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_settings(parser, *sections)
    return parser.parse_args(options)


def test_settings_have_the_help_of_their_docstrings(capsys):
    with pytest.raises(SystemExit):
        parsed("--help", sections=("training",))
    output = " ".join(capsys.readouterr().out.split())
    assert "--batch_size BATCH_SIZE Pairs per step. (default: 256)" in output


def test_dedented_docstrings_have_help_too(monkeypatch):
    """As Python 3.13 makes them."""
    for cls in SECTIONS.values():
        monkeypatch.setattr(cls, "__doc__", inspect.cleandoc(cls.__doc__))
    assert parsed("--epochs", "3").epochs == 3


def test_given_settings_are_those_on_the_command_line():
    args = parsed("--epochs", "50", "--data_seed", "1", "--hidden_dims", "8", "4", "--no-distinct", "--tasks", "ctr")
    assert given_settings(args) == {
        "data": {"seed": 1},
        "model": {"hidden_dims": [8, 4], "tasks": ["ctr"]},
        "training": {"epochs": 50, "distinct": False},
    }


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"training": {"epochs": 7, "batch_size": 9}, "model": {"hidden_dims": [3]}}')
    config = read_settings(parsed("--epochs", "8", "--model", "mmoe"), path)
    assert (config.training.epochs, config.training.batch_size, config.training.patience) == (8, 9, 3)
    assert (config.model.name, config.model.hidden_dims) == ("mmoe", (3,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--config needs a JSON file"),
        ("[1]", "RunConfig is read from an object"),
        ('{"training": 3}', "TrainingConfig is read from an object"),
        (
            '{"training": {"batch_size": "256"}}',
            "TrainingConfig.batch_size must be of the type of 256. Received: '256'",
        ),
        ('{"training": {"epochs": 2.5}}', "TrainingConfig.epochs must be of the type of 50"),
        ('{"training": {"distinct": 1}}', "TrainingConfig.distinct must be of the type of False"),
        ('{"training": {"epochs": true}}', "TrainingConfig.epochs must be of the type of 50"),
        ('{"data": {"seed": null}}', "DataConfig.seed must be of the type of 0. Received: None"),
        ('{"optimizer": {}}', r"RunConfig has no setting \['optimizer'\]"),
    ],
)
def test_a_bad_config_file_is_explained(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(parsed(), path)


def test_errors_of_the_file_system_are_one_line(capsys):
    assert status(raises(PermissionError(13, "Permission denied", "runs"))) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'runs'\n"
