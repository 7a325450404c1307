# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
import time

import pytest

from mvke_tf import cli
from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
from mvke_tf.run_folder import RunFolder, best_epoch, is_finished, list_runs
from tests.conftest import REPOSITORY


def make_run(folder, epochs, most=3, patience=0, model="mvke"):
    """A run with a log of so many epochs, its other files empty."""
    config = RunConfig(ModelConfig(model, embedding_dim=8), TrainingConfig(epochs=most, patience=patience))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    data = {"name": "ads", "digest": "d", "fingerprint": "f", "folder": "../data", "source": ".."}
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "dataset.json").write_text('{"tasks": {"click": {}, "buy": {}, "stars": {"default": false}}}')
    if epochs:
        rows = "".join(f"{epoch},0.{60 + epoch},12.5\n" for epoch in range(1, epochs + 1))
        (folder / "log.csv").write_text(f"epoch,val_score,examples_per_second\n{rows}")
        (folder / "best.keras").touch()
    return RunFolder(folder)


def mvke(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    return ended.value.code, *capsys.readouterr()


def test_the_state_of_a_run(tmp_path):
    assert make_run(tmp_path / "new", 0).state() == "interrupted"
    assert make_run(tmp_path / "interrupted", 2).state() == "interrupted"
    assert make_run(tmp_path / "done", 3).state() == "finished"
    assert make_run(tmp_path / "enough", 2, most=2).state() == "finished"
    lost = make_run(tmp_path / "lost", 2)
    lost.checkpoint.unlink()
    assert lost.state() == "damaged"
    torn = make_run(tmp_path / "torn", 2)
    torn.state_file.write_text("no archive")
    assert torn.state() == "damaged"
    for name, text in {"log.csv": "epoch,val_score\n1,x\n", "config.json": "{"}.items():
        broken = make_run(tmp_path / f"broken_{name}", 2)
        (broken.folder / name).write_text(text)
        assert broken.state() == "damaged"


def test_a_run_in_training_names_its_process(tmp_path):
    run = make_run(tmp_path / "a", 1)
    assert run.owner() == ""
    with run.lock():
        assert run.state() == f"running (process {os.getpid()})"
    assert run.state() == "interrupted"
    # A killed process leaves its number, which may be another process's by now.
    (run.folder / ".lock").write_text(f"process {os.getppid()} on {os.uname().nodename}")
    assert run.state() == "interrupted"
    (run.folder / ".lock").write_text("process 12 on elsewhere")
    assert run.state() == "running (process 12 on elsewhere)"


def test_an_undefined_score_and_patience():
    history = [{"val_score": score} for score in (0.5, 0.7, 0.7, 0.6)]
    assert best_epoch(history) == 1
    assert best_epoch([*history, {"val_score": float("nan")}]) == 4
    assert is_finished(history, TrainingConfig(epochs=9, patience=2))


def test_runs_are_listed_latest_first(tmp_path, capsys):
    for name, epochs, age in (("old", 3, 8_000), ("new", 1, 100)):
        run = make_run(tmp_path / name, epochs)
        for path in (run.config_file, run.log_file):
            os.utime(path, (time.time() - age,) * 2)
    (tmp_path / "no_run").mkdir()
    assert [run.folder.name for run in list_runs(tmp_path)] == ["new", "old"]
    code, output, error = mvke(capsys, "runs", tmp_path)
    assert (code, error) == (0, "")
    assert [line.split() for line in output.splitlines()[:3]] == [
        ["run", "dataset", "model", "score", "epochs", "age", "state"],
        ["new", "ads", "mvke", "0.6100", "1/3", "1", "min", "interrupted"],
        ["old", "ads", "mvke", "0.6300", "3/3", "2", "h", "finished"],
    ]
    assert output.endswith(f"\nNext:  mvke show {tmp_path / 'new'}\n")
    code, output, _ = mvke(capsys, "runs", tmp_path / "no_run")
    assert code == 0 and output.startswith(f"There is no run in {tmp_path / 'no_run'}.")


def test_show_says_what_a_run_is_and_what_is_next(tmp_path, capsys):
    run = make_run(tmp_path / "a", 2)
    _, output, _ = mvke(capsys, "show", run.folder)
    facts = dict(line.split(":", 1) for line in output.split("\n\n")[0].splitlines())
    assert {name: value.strip() for name, value in facts.items()} == {
        "run": f"{run.folder}   (interrupted)",
        "dataset": "ads",
        "model": "mvke",
        "tasks": "click, buy",
        "settings": "model.embedding_dim 8, training.epochs 3, training.patience 0",
        "epochs": "2 of at most 3",
        "best epoch": "2, validation score 0.6200",
    }
    assert output.endswith(f"Next:  mvke train --resume {run.folder}\n")
    run.report_file.write_text('{"test": {"click": {"rows": 9, "auc": 0.75}}}')
    make_run(tmp_path / "b", 3).report_file.write_text(run.report_file.read_text())
    _, output, _ = mvke(capsys, "show", tmp_path / "b")
    assert "Metrics of the test part" in output and "0.7500" in output
    assert f"mvke analyze {tmp_path / 'b'}" in output.splitlines()[-2]


def test_runs_and_show_import_nothing_heavy(tmp_path):
    make_run(tmp_path / "a", 2)
    code = (
        "import sys\nfrom mvke_tf import cli\n"
        "for argv in (['runs', sys.argv[1]], ['show', sys.argv[1] + '/a']):\n"
        "    try:\n        cli.main(argv)\n    except SystemExit as ended:\n        print('status', ended.code)\n"
        "print('heavy', sorted({'tensorflow', 'keras', 'numpy', 'pandas', 'polars', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.count("status 0") == 2 and done.stdout.endswith("heavy []\n"), done.stderr
