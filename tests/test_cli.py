# SPDX-License-Identifier: Apache-2.0
import argparse
import dataclasses
import inspect
import json
import logging
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mvke_tf import cli
from mvke_tf.cli import add_settings, given_settings, positive_int, read_settings, run_main
from mvke_tf.config import SECTIONS
from mvke_tf.errors import ConfigError, DataError, MvkeError
from tests.conftest import REPOSITORY

COMMANDS = (
    *("init", "check", "prepare", "train", "evaluate", "analyze", "export", "onnx", "serve", "profile", "compare"),
    *("tune", "schema", "runs", "show", "explore"),
)


def raises(error: BaseException):
    def body() -> None:
        raise error

    return body


def status(body) -> int:
    with pytest.raises(SystemExit) as ended:
        run_main(body)
    return ended.value.code


def test_a_body_that_returns_ends_with_0():
    called = []
    assert status(lambda: called.append(True)) == 0
    assert called == [True]


@pytest.mark.parametrize("kind", [MvkeError, DataError])
def test_what_a_user_can_mend_is_one_line(kind, capsys, monkeypatch):
    monkeypatch.delenv("MVKE_DEBUG", raising=False)
    assert status(raises(kind("log.csv:3 has no price"))) == 2
    assert capsys.readouterr() == ("", "error: log.csv:3 has no price\n")


@pytest.mark.parametrize("kind", [ValueError, ZeroDivisionError])
def test_a_defect_keeps_its_traceback(kind):
    with pytest.raises(kind):
        run_main(raises(kind("a bug")))


def test_debugging_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("MVKE_DEBUG", "1")
    assert status(raises(DataError("bad"))) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("error: bad\n")


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(capsys):
    assert status(raises(KeyboardInterrupt("Continue: mvke train --resume runs/a"))) == 130
    assert capsys.readouterr().err == "\nInterrupted. Continue: mvke train --resume runs/a\n"


def test_errors_of_the_file_system_are_one_line(capsys):
    assert status(raises(PermissionError(13, "Permission denied", "runs"))) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'runs'\n"


def test_a_status_of_the_body_passes_through():
    assert status(lambda: sys.exit(7)) == 7


def test_the_log_is_shown_once(capsys):
    cli.show_log()
    cli.show_log()
    logger = logging.getLogger("mvke_tf.anything")
    logger.info("read 3 rows")
    logger.warning("2 of them twice")
    assert capsys.readouterr() == ("read 3 rows\n", "Warning: 2 of them twice\n")


@pytest.mark.parametrize(("before", "after"), [(None, "2"), ("0", "0")])
def test_tensorflow_logs_little_unless_told_otherwise(before, after, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", before or "")
    if before is None:
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    seen = []
    assert status(lambda: seen.append(os.environ["TF_CPP_MIN_LOG_LEVEL"])) == 0
    assert seen == [after]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is that of x86")
@pytest.mark.parametrize(("said", "is_on"), [(None, True), ("0", False)])
def test_tensorflow_computes_with_onednn_on_every_cpu(said, is_on):
    name = "TF_ENABLE_ONEDNN_OPTS"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: said} if said else {})
    code = (
        "from mvke_tf.cli import import_tensorflow; import_tensorflow()\n"
        "from tensorflow.python.framework.test_util import IsMklEnabled; print(IsMklEnabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert (done.stdout, done.stderr) == (f"{is_on}\n", "")


@pytest.mark.slow
def test_tensorflow_starts_silently():
    code = (
        "from mvke_tf.cli import import_tensorflow; import_tensorflow(); import tensorflow; print(tensorflow.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert (done.stdout, done.stderr) == ("tensorflow\n", "")


def test_what_an_import_that_fails_wrote_is_shown(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os\nos.write(2, b'no such library\\n')\nraise ImportError('broken')\n"
    )
    code = "from mvke_tf.cli import import_tensorflow; import_tensorflow()"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stderr.startswith("no such library\n") and done.stderr.endswith("ImportError: broken\n")


def test_positive_int():
    assert positive_int("12") == 12
    for text in ("0", "-3", "1.5", "many", "", "9" * 30):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            positive_int(text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, mvke):
    code, output, _ = mvke(command, "--help")
    assert code == 0
    assert output.startswith(f"usage: mvke {command}")


def test_help_is_short_and_everything_is_in_help_all(mvke):
    _, short, _ = mvke("train", "--help")
    _, everything, _ = mvke("train", "--help-all")
    assert "--learning_rate" in short and "--steps_per_execution" not in short
    assert len(short.splitlines()) < 60 and "more options: mvke train --help-all" in short
    assert "--steps_per_execution" in everything and "more options" not in everything
    settings = everything[everything.index("settings of the training") :]
    assert settings.index("--seed") < settings.index("--optimizer")
    # What is hidden is understood all the same.
    assert cli.parse(["train", "--steps_per_execution", "2"]).steps_per_execution == 2


@pytest.mark.parametrize(
    ("argv", "interrupt", "said"),
    [
        (["compare", "--output_dir", "my cmp"], "Continue with: mvke train --resume x", "Continue with: {}"),
        (["tune", "--output_dir", "t"], None, "Continue with: {}"),
        (["train", "--run_name", "a"], None, "Continue with: {}"),
        (["train"], "Continue with: mvke train --resume runs/x", "Continue with: mvke train --resume runs/x"),
        (["prepare"], None, "Start again with: {}"),
        (["profile", "."], None, "Start again with: {}"),
    ],
)
def test_ctrl_c_prints_the_command_that_continues(argv, interrupt, said, mvke, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt(*([interrupt] if interrupt else []))

    command = dataclasses.replace(cli.COMMANDS[argv[0]], run=interrupted)
    monkeypatch.setitem(cli.COMMANDS, argv[0], command)
    code, _, error = mvke(*argv)
    assert (code, error) == (130, f"\nInterrupted. {said.format(shlex.join(['mvke', *argv]))}\n")


def test_all_commands_are_named(mvke):
    code, output, _ = mvke("--help")
    assert code == 0
    assert [name for name in COMMANDS if f"\n    {name} " not in output] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "--help"], 0),
        (["train", "--help"], 0),
        (["evaluate", "nowhere"], 2),
        (["evaluate", ".", "--split", "tset"], 2),
        (["evaluate", ".", "--batch_size", "0"], 2),
        (["train", "--epochs", "many"], 2),
    ],
)
def test_help_and_bad_arguments_import_nothing_heavy(arguments, expected):
    code = (
        "import sys\nfrom mvke_tf import cli\n"
        f"try:\n    cli.main({arguments!r})\nexcept SystemExit as ended:\n    print('status', ended.code)\n"
        "heavy = {'tensorflow', 'keras', 'pandas', 'polars', 'sklearn', 'matplotlib', 'pyarrow'}\n"
        "print('heavy', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.stdout.splitlines()[-2:] == [f"status {expected}", "heavy []"], done.stderr


@pytest.mark.parametrize(
    ("script", "command", "arguments", "understood"),
    [
        ("analyze.py", "analyze", ["--checkpoint_path", "RUN"], {}),
        (
            "compare_models.py",
            "compare",
            ["--models", "mvke", "mmoe", "--output_dir", "out"],
            {"models": ["mvke", "mmoe"]},
        ),
        ("evaluate.py", "evaluate", ["--checkpoint_path", "RUN", "--model", "mvke"], {"model": "mvke"}),
        ("export.py", "export", ["--checkpoint_path", "RUN", "--export_path", "out"], {"output_dir": Path("out")}),
        ("export_onnx.py", "onnx", ["--checkpoint_path", "RUN", "--onnx_path", "out"], {"output_dir": Path("out")}),
        ("preprocess_data.py", "prepare", ["--data_dir", "raw"], {"data_dir": Path("raw")}),
        ("profile_users.py", "profile", ["--checkpoint_path", "RUN", "--genre_items", "3"], {"group_items": 3}),
        ("serve.py", "serve", ["--export_path", "RUN"], {}),
        ("train.py", "train", ["--model", "mmoe", "--epochs", "3"], {"model": "mmoe", "epochs": 3}),
        ("tune.py", "tune", ["--model", "mmoe", "--output_dir", "out"], {"model": "mmoe"}),
    ],
)
def test_a_script_is_the_command(script, command, arguments, understood, tmp_path, monkeypatch):
    handed = []
    monkeypatch.setitem(cli.COMMANDS, command, dataclasses.replace(cli.COMMANDS[command], run=handed.append))
    path = REPOSITORY / "scripts" / script
    monkeypatch.setattr(sys, "argv", [str(path), *(text.replace("RUN", str(tmp_path)) for text in arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    (args,) = handed
    assert ended.value.code == 0 and args.command == command
    assert {name: getattr(args, name) for name in understood} == understood


@pytest.mark.parametrize("program", [["-m", "mvke_tf"], [REPOSITORY / "scripts" / "evaluate.py"]])
def test_what_runs_the_command_from_elsewhere(program, tmp_path):
    command = ["evaluate"] if program[0] == "-m" else []
    done = subprocess.run(
        [sys.executable, *program, *command, "--checkpoint_path", tmp_path / "missing"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
    )
    missing = tmp_path / "missing"
    assert done.returncode == 2
    assert done.stderr == f"error: There is no run at {missing}. `mvke runs` lists those that are there.\n"


def test_a_run_is_needed_once(mvke, tmp_path):
    for arguments in ([], [tmp_path, "--checkpoint_path", tmp_path]):
        code, _, error = mvke("evaluate", *arguments)
        assert code == 2 and error.endswith("error: give one run, such as runs/mine\n")


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["train", "--task", "click"], "unrecognized arguments: --task click Did you mean '--tasks'?"),
        (["train", "log.toml"], "unrecognized arguments: log.toml Did you mean --data log.toml?"),
        (["evaluate", "mine", "--part=test", "--bach_size=3"], "--bach_size=3 Did you mean '--batch_size'?"),
        (["runs", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_slips_of_a_command_line_get_a_hint(argv, hint, mvke):
    code, _, error = mvke(*argv)
    assert code == 2 and error.startswith(f"usage: mvke {argv[0]}") and error.endswith(f"{hint}\n")


def test_a_run_is_found_by_its_name(mvke, tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    code, _, error = mvke("evaluate", "mine")
    expected = "error: There is no run at mine. Did you mean runs/mine? `mvke runs` lists those that are there.\n"
    assert (code, error) == (2, expected)


def test_evaluate_needs_a_run(mvke, tmp_path):
    code, _, error = mvke("evaluate", tmp_path)
    assert code == 2
    assert error.startswith(f"error: There is no run at {tmp_path}. Expected a folder such as")


def test_evaluate_refuses_another_model_than_the_run_holds(mvke, tiny_run):
    code, _, error = mvke("evaluate", tiny_run.folder, "--model", "mmoe")
    assert code == 2
    assert error == f"error: --model does not fit the run {tiny_run.folder}. Expected: mvke. Received: mmoe\n"
    assert not tiny_run.report_file.exists()


@pytest.mark.slow
def test_evaluate_prints_the_table_the_paths_and_what_is_next(mvke, tiny_run):
    code, output, error = mvke("evaluate", tiny_run.checkpoint, "--model", "mvke", "--split", "validation")
    assert (code, error) == (0, "")
    table, contents, following = output.split("\n\n")[-3:]
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["click"] * 3 + ["buy"] * 3
    made = dict(line.split(":", 1) for line in contents.splitlines())
    assert Path(made["report"].strip()) == tiny_run.report_file
    assert f"mvke analyze {tiny_run.folder}" in following and f"mvke export {tiny_run.folder}" in following


def test_init_writes_a_declaration_and_never_over_one(mvke, tmp_path):
    table = tmp_path / "log.csv"
    rows = [f"u{row % 7},i{row % 5},{row},{row % 2}" for row in range(60)]
    table.write_text("\n".join(["user_id,item_id,ts,click", *rows]) + "\n")
    code, output, error = mvke("init", table)
    assert (code, error) == (0, "")
    assert f"mvke check {tmp_path / 'log.toml'}" in output
    before = (tmp_path / "log.toml").read_text()
    assert "[tasks.click]" in before
    code, _, error = mvke("init", table)
    assert code == 2 and error.startswith(f"error: {tmp_path / 'log.toml'} exists.")
    assert (tmp_path / "log.toml").read_text() == before
    code, output, _ = mvke("check", tmp_path / "log.toml")
    assert code == 0 and "user_id" in output


def test_built_in_data_are_not_taken_where_a_declaration_lies(mvke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "log.toml").write_text("format = 1\n[source]\n[features]\n[tasks]\n")
    for command in ("train", "prepare"):
        code, _, error = mvke(command)
        assert (
            code == 2 and error.startswith("error: Which data?") and "Add --data log.toml, or --data movielens" in error
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.toml", "pyproject.toml"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["trian"], "Did you mean 'train'?"), (["train", "--model", "mvkee"], "Did you mean 'mvke'?"), (["zzz"], "")],
)
def test_a_choice_that_is_nearly_right(mvke, arguments, hint):
    code, _, error = mvke(*arguments)
    assert code == 2 and "invalid choice" in error and error.rstrip().endswith(hint)


@pytest.mark.parametrize("out", ["log.csv", "log.txt"])
def test_a_draft_never_replaces_a_table(mvke, tmp_path, out):
    table = tmp_path / "log.csv"
    table.write_text("user_id,click\nu1,1\nu2,0\n")
    before = table.read_bytes()
    code, _, error = mvke("init", table, "--out", tmp_path / out, "--overwrite")
    assert code == 2 and "must end in .toml" in error
    assert table.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_init_of_the_working_directory(mvke, tmp_path, monkeypatch):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "a.csv").write_text("user_id,click\nu1,1\nu2,0\n")
    monkeypatch.chdir(tmp_path / "shop")
    assert mvke("init", ".")[0] == 0
    assert (tmp_path / "shop.toml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export runs/tiny --output_dir out", "train --resume runs/tiny"])
def test_a_file_that_may_not_grow_is_one_line(tiny_run, command):
    """TensorFlow writes files of its own, whose errors are no `OSError`."""
    line = f"ulimit -f 8; exec {shlex.quote(sys.executable)} -m mvke_tf {command}"
    folder = tiny_run.folder.parents[1]
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    # TensorFlow logs the failed operation, too.
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: .*File too large.*", last) and "Traceback" not in done.stderr, done.stderr
    assert not list((folder / "out").rglob("*"))


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-c", "from mvke_tf.cli import main; main(['schema'])"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(timeout=120), error) == (141, "")


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        (">&-", (0, "")),
        ("2>&-", (2, "")),
        ("> /dev/full", (2, "error: [Errno 28] No space left on device\n")),
        ("| true", (141, "")),
    ],
)
def test_streams_that_lead_nowhere(streams, expected):
    """The log too: no traceback of `logging`."""
    body = (
        "import logging, time; from mvke_tf.cli import run_main, import_tensorflow\n"
        "def body():\n"
        "    time.sleep(0.5)\n"
        "    for _ in range(3): logging.getLogger('mvke_tf.x').info('read 3 rows')\n"
        "    print('done')\n"
    )
    body += "    import sys; sys.stderr.write('x'); sys.exit(2)\n" if streams == "2>&-" else ""
    command = (
        f"{shlex.quote(sys.executable)} -c {shlex.quote(body + 'run_main(body)')} {streams}; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize(
    ("environment", "received"), [({"KERAS_BACKEND": "torch"}, "'torch'"), ({"KERAS_BACKEND": "no"}, "'no'")]
)
def test_a_backend_that_is_none_of_ours(environment, received, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert status(cli.import_backend) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Keras must run on 'tensorflow' or 'jax'") and f"Received: {received}" in error


def test_the_backend_is_that_of_keras(tmp_path, monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert cli.check_backend() == "tensorflow"
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    assert cli.check_backend() == "jax"
    (tmp_path / "keras.json").write_text('{"backend": 5}')
    with pytest.raises(ConfigError, match="Received: 5"):
        cli.check_backend()
    (tmp_path / "keras.json").write_text('{"floatx": "float16"}')
    with pytest.raises(ConfigError, match=r"--precision chooses.*'float16'"):
        cli.check_backend()
    (tmp_path / "keras.json").write_text("{")
    assert cli.check_backend() == "tensorflow"
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert cli.check_backend() == "jax"


def test_too_little_memory_is_one_line(capsys):
    import numpy as np
    import tensorflow as tf
    from jax.errors import JaxRuntimeError

    def fails(body):
        assert status(body) == 2
        said = capsys.readouterr().err
        start = "error: There is not enough memory for this: take a smaller --memory_mb where data are prepared, else"
        assert said.startswith(start) and said.count("\n") == 1
        return said

    assert "Received: {{function_node" in fails(lambda: tf.zeros((2**21, 2**21)) * 2.0)
    assert "Unable to allocate 8.00 PiB" in fails(lambda: np.empty(2**50, np.int64))
    said = fails(raises(JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers: ...")))
    assert said.endswith("Received: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n")
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        status(raises(JaxRuntimeError("INTERNAL: a defect")))


def test_a_full_disk_is_one_line_where_tensorflow_writes(capsys):
    from tensorflow import errors

    full = errors.ResourceExhaustedError(None, None, "runs/a/events; No space left on device")
    assert status(raises(full)) == 2
    assert capsys.readouterr().err == (
        "error: No space left on device, says TensorFlow. What was there before is untouched; make room and run it "
        "again.\n"
    )
    with pytest.raises(errors.ResourceExhaustedError, match="queue"):
        run_main(raises(errors.ResourceExhaustedError(None, None, "The queue is full")))


def test_another_broken_pipe_is_an_error(capsys):
    assert status(raises(BrokenPipeError(32, "Broken pipe"))) == 2
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_a_token_that_is_no_text(mvke, tmp_path):
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    code, _, error = mvke("serve", tmp_path, "--token_file", tmp_path / "token")
    assert (code, error) == (
        2,
        f"error: --token_file needs a file of text in UTF-8. Received: {tmp_path / 'token'}, which is none\n",
    )


def test_the_published_schema_is_that_of_the_code(mvke):
    code, output, _ = mvke("schema")
    assert code == 0
    published = REPOSITORY / "docs" / "dataset.schema.json"
    assert json.loads(output) == json.loads(published.read_text(encoding="utf-8"))


def parsed(*options: str, sections=("model", "training")) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append")
    add_settings(parser, *sections)
    return parser.parse_args(options)


def test_settings_have_the_help_of_their_docstrings(capsys):
    with pytest.raises(SystemExit):
        parsed("--help", sections=("training",))
    assert "(default: 256)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("text", [inspect.cleandoc, lambda text: None])
def test_dedented_and_missing_docstrings_are_survived(text, monkeypatch):
    """As Python 3.13 and `python -OO` make them."""
    for cls in SECTIONS.values():
        monkeypatch.setattr(cls, "__doc__", text(cls.__doc__))
    assert parsed("--epochs", "3").epochs == 3


def test_given_settings_are_those_on_the_command_line():
    args = parsed("--epochs", "50", "--hidden_dims", "8", "4", "--no-deduplicate", "--tasks", "click")
    assert given_settings(args) == {
        "model": {"hidden_dims": [8, 4], "tasks": ["click"]},
        "training": {"epochs": 50, "deduplicate": False},
    }


def test_former_names_of_settings_are_understood():
    args = parsed("--no-distinct", "--clipnorm", "1", "--conversion", "esmm", "--kernel_stddev", "1.0")
    assert given_settings(args) == {
        "model": {"objective": "joint", "virtual_kernel_stddev": 1.0},
        "training": {"deduplicate": False, "global_clipnorm": 1.0},
    }


def test_set_states_any_setting():
    args = parsed("--set", "training.learning_rate=1e-3", "--set", "model.name=mmoe", "--set", "data.split.by=hash")
    assert given_settings(args) == {"training": {"learning_rate": 1e-3}, "model": {"name": "mmoe"}}
    assert list(cli.assignments(args))[-1] == ("data.split.by", "hash")
    for text in ("epochs=3", "training.epochs", "house.size=3"):
        with pytest.raises(ConfigError, match="--set takes"):
            list(cli.assignments(parsed("--set", text)))


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"training": {"epochs": 7, "batch_size": 9}, "model": {"hidden_dims": [3]}}')
    config = read_settings(parsed("--epochs", "8", "--model", "mmoe"), path)
    assert (config.training.epochs, config.training.batch_size, config.training.patience) == (8, 9, 3)
    assert (config.model.name, config.model.hidden_dims) == ("mmoe", (3,))
    toml = tmp_path / "config.toml"
    toml.write_text("[training]\nepochs = 7\nbatch_size = 9\n[model]\nhidden_dims = [3]\n")
    assert read_settings(parsed("--epochs", "8", "--model", "mmoe"), toml) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--config needs a JSON or TOML file"),
        ("[1]", "must hold sections"),
        ('{"training": 3}', "must hold sections"),
        ('{"training": {"batch_size": "256"}}', "batch_size must be of the type of 256. Received: '256'"),
        ('{"training": {"epochs": 2.5}}', "epochs must be of the type of 50"),
        ('{"training": {"deduplicate": 1}}', "deduplicate must be of the type of True"),
        ('{"training": {"epochs": true}}', "epochs must be of the type of 50"),
        ('{"model": {"embeding_dim": 3}}', "embedding_dim"),
        ('{"optimizer": {}}', "'optimizer'"),
        ("[" * 100_000, "--config needs a JSON or TOML file"),
    ],
)
def test_a_bad_config_file_is_explained(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(parsed(), path)


def test_what_is_next_has_the_same_data(tmp_path, mvke):
    options = ("--rows", "2000", "--users", "100", "--data_dir", str(tmp_path), "--set", "data.split.test=0.1")
    code, output, error = mvke("prepare", "--data", "ads", *options, "--set", "data.split.validation=0.2")
    assert code == 0, error
    given = shlex.split(output.rpartition("Next:  mvke train ")[2])
    assert given == ["--data", "ads", *options, "--set", "data.split.validation=0.2"]
