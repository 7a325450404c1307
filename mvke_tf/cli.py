# SPDX-License-Identifier: Apache-2.0
"""The `mvke` command: one subcommand per step from a table to a served model.

Imports nothing heavy before a command line has proved right: `--help` and bad arguments answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import inspect
import io
import json
import logging
import os
import platform
import re
import select
import shlex
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mvke_tf.config import CHOICES, MOST_BATCH, OLD_NAMES, SECTIONS, RunConfig, entry_type, nearest, renamed
from mvke_tf.engine import ENGINES, Engine, lean
from mvke_tf.errors import ConfigError, MvkeError, RunError, require_extra

LOGGER = logging.getLogger(__name__)
DEBUG = "MVKE_DEBUG"
PARTS = ("train", "validation", "test")
# Settings whose own name would be ambiguous on a command line.
_FLAGS = {("model", "name"): "model"}
# Settings that the short help shows.
COMMON_SETTINGS = (
    *("name", "tasks", "embedding_dim", "hidden_dims", "num_virtual_kernels"),
    *("epochs", "batch_size", "learning_rate", "patience", "seed"),
)
Command = Callable[[argparse.Namespace], object]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one command line, without the program's name, and ends the process.

    Raises:
        SystemExit: Always. 0 when the command is done, 2 after a `MvkeError`, an `OSError`, bad arguments or where
            memory is refused, which are one line on stderr (with a traceback before it if the environment has
            `MVKE_DEBUG=1`), 130 after Ctrl-C, 141, silently, if nobody reads the output any more (`mvke schema |
            head`). Any other error is a defect and keeps its traceback.
    """
    run_main(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def run_main(body: Callable[[], object]) -> NoReturn:
    """Runs the body of a command and ends the process as `main` says."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _open_streams()
    show_log()
    try:
        body()
        sys.stdout.flush()
    except (MvkeError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            # As a shell reports SIGPIPE.
            sys.exit(141)
        _fail(error, str(error))
    except Exception as error:
        if fault := _fault_of_files(error):
            _fail(error, f"{fault}, says TensorFlow. What was there before is untouched; make room and run it again.")
        if not _is_of_memory(error):
            raise
        received = str(error).partition("\n")[0] or type(error).__name__
        _fail(
            error,
            "There is not enough memory for this: take a smaller --memory_mb where data are prepared, else a smaller "
            f"--batch_size or model (--embedding_dim, --hidden_dims), or another machine. Received: {received}",
        )
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(error: Exception, message: str) -> NoReturn:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _fault_of_files(error: Exception) -> str:
    """What would be an `OSError` of Python in words, if it is TensorFlow's, which writes files of its own."""
    if type(error).__module__ != "tensorflow.python.framework.errors_impl":
        return ""
    faults = map(os.strerror, (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS))
    return next((fault for fault in faults if fault in str(error)), "")


def _is_of_memory(error: Exception) -> bool:
    """Whether Python, TensorFlow or JAX were refused memory."""
    name = type(error).__name__
    return isinstance(error, MemoryError) or (
        name in ("ResourceExhaustedError", "JaxRuntimeError", "XlaRuntimeError")
        and any(word in str(error) for word in ("OOM when allocating", "RESOURCE_EXHAUSTED", "Out of memory"))
    )


def _open_streams() -> None:
    """Lets streams that were closed before the start lead nowhere, so that no file of ours takes their place."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free, which is this one.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _is_output_closed() -> bool:
    """Whether nobody reads stdout any more; it then leads nowhere, so that its end is silent too."""
    try:
        output = sys.stdout.fileno()
    except io.UnsupportedOperation:
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: {line}"


class _CurrentStream(logging.StreamHandler):
    """Writes to what `sys.stdout` or `sys.stderr` is at the moment of a line, not to what it was at the start."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.stream_name = name
        self.setFormatter(_LineFormatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = getattr(sys, self.stream_name)
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        # A reader that has gone, or a full disk, ends a command as it does where it prints.
        raise


def show_log() -> None:
    """Shows what the package logs: information on stdout, warnings on stderr."""
    logger = logging.getLogger("mvke_tf")
    if any(isinstance(handler, _CurrentStream) for handler in logger.handlers):
        return
    information, warnings = _CurrentStream("stdout"), _CurrentStream("stderr")
    information.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings.setLevel(logging.WARNING)
    logger.addHandler(information)
    logger.addHandler(warnings)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def check_backend() -> str:
    """The backend that Keras will choose.

    Raises:
        ConfigError: If models of this package do not run on it, or do not run in float32.
    """
    file = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "keras.json"
    settings: Any = {}
    with contextlib.suppress(OSError, ValueError):
        settings = json.loads(file.read_text(encoding="utf-8"))
    settings = settings if isinstance(settings, dict) else {}
    name = os.environ.get("KERAS_BACKEND") or settings.get("backend", "tensorflow")
    if name not in ("tensorflow", "jax"):
        raise ConfigError(
            "Keras must run on 'tensorflow' or 'jax': the environment variable KERAS_BACKEND, or `backend` in "
            f"{file}. Received: {name!r}"
        )
    if (floatx := settings.get("floatx", "float32")) != "float32":
        raise ConfigError(
            f"`floatx` in {file} must be 'float32'; --precision chooses what a model computes in. Received: {floatx!r}"
        )
    return name


def import_tensorflow(onednn: bool = True) -> None:
    """Imports TensorFlow and Keras without start-up messages, which no environment variable silences.

    What is written to file descriptor 2 meanwhile is shown only if the import fails.

    Args:
        onednn: Whether TensorFlow computes with oneDNN on every x86 CPU, unless the environment variable
            TF_ENABLE_ONEDNN_OPTS is set; else on those that it chooses, which have AVX-512 for neural networks. On
            others training is faster with it, and recommending to a single user slower.
    """
    if "tensorflow" in sys.modules:
        return
    backend = check_backend()
    if onednn and platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as hidden:
        kept = os.dup(2)
        try:
            os.dup2(hidden.fileno(), 2)
            with lean(backend):
                import tensorflow as tf

            # The first look at the devices writes too.
            tf.config.list_physical_devices()
        except BaseException:
            hidden.seek(0)
            os.write(kept, hidden.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def import_backend() -> None:
    """Imports Keras with its backend, and TensorFlow only if it is that."""
    if (backend := check_backend()) == "tensorflow":
        import_tensorflow()
    else:
        with lean(backend):
            import keras  # noqa: F401


def positive_int(text: str) -> int:
    """Type of an argument that counts something: a whole number of at least 1."""
    value = int(text) if text.isdecimal() and len(text) < 19 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text!r}")
    return value


def _devices(text: str) -> int | str:
    return text if text == "all" else positive_int(text)


def _batch_size(text: str) -> int:
    value = positive_int(text)
    if value > MOST_BATCH:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_BATCH}, received {text!r}")
    return value


class _Parser(argparse.ArgumentParser):
    """Shows the options named in `common` only, and all of them to `--help-all`."""

    common: Collection[str] | None = None

    def error(self, message: str) -> NoReturn:
        given = message.partition("unrecognized arguments: ")[2].split()
        options = [name for action in self._actions for name in action.option_strings]
        hints = [nearest(text.partition("=")[0], options) for text in given if text.startswith("--")]
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hints.append(nearest(wrong[1], re.findall(r"[\w.-]+", wrong[2])))
        if given and given[0].endswith(".toml") and "--data" in options:
            hints.append(f" Did you mean --data {given[0]}?")
        super().error(message + "".join(hint for hint in hints if hint))

    def format_help(self) -> str:
        if self.common is None:
            return super().format_help()
        rest = [action for action in self._actions if action.option_strings and action.dest not in self.common]
        rest = [action for action in rest if action.help is not argparse.SUPPRESS]
        helps = [action.help for action in rest]
        for action in rest:
            action.help = argparse.SUPPRESS
        self.epilog = f"{len(rest)} more options: {self.prog} --help-all" if rest else None
        try:
            return super().format_help()
        finally:
            for action, text in zip(rest, helps, strict=True):
                action.help = text


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        vars(parser)["common"] = None
        parser.print_help()
        parser.exit()


# --- settings -------------------------------------------------------------------------------------------------------


def add_settings(parser: argparse.ArgumentParser, *sections: str, without: Collection[str] = ()) -> None:
    """Adds one option per setting of the named sections of `RunConfig`; the help is the docstring's.

    An option that is not given leaves the setting to `read_settings`. Former names of settings are options too, without
    help.

    Args:
        parser: Gets the options.
        sections: Names of sections.
        without: Options to leave out, such as `"model"`.
    """
    former = {new: old for old, new in OLD_NAMES.items()}
    for section in sections:
        cls = SECTIONS[section]
        # Python 3.13 strips the indentation of docstrings, earlier ones do not; -OO leaves none.
        text = inspect.cleandoc(cls.__doc__ or "")
        described = dict(re.findall(r"^ {4}(\w+): (.+?)(?=\n {4}\w|\Z)", text, re.M | re.S))
        group = parser.add_argument_group(f"settings of the {section}")
        for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in COMMON_SETTINGS):
            option = _FLAGS.get((section, field.name), field.name)
            if option in without:
                continue
            words = " ".join(described.get(field.name, "").split()).replace("`", "").replace("%", "%%")
            options: dict[str, Any] = {"default": None, "dest": option}
            if isinstance(field.default, bool):
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(field.default, tuple):
                options |= {"nargs": "+", "type": entry_type(field)}
            else:
                options["type"] = type(field.default)
            if (section, field.name) in CHOICES:
                options["choices"] = CHOICES[section, field.name]
            group.add_argument(f"--{option}", help=f"{words} (default: {field.default})", **options)
            if field.name in former:
                old = former[field.name]
                if options.pop("choices", None):
                    options["type"] = lambda text, old=old: renamed(old, text)[1]
                group.add_argument(f"--{old}", help=argparse.SUPPRESS, **options)


def given_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings that a command line states, `{section: {setting: value}}`."""
    given: dict[str, dict[str, Any]] = {}
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            value = getattr(args, _FLAGS.get((section, field.name), field.name), None)
            if value is not None:
                given.setdefault(section, {})[field.name] = value
    for key, value in assignments(args):
        section, _, name = key.partition(".")
        if section in SECTIONS:
            given.setdefault(section, {})[name] = value
    return given


def assignments(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The `KEY=VALUE` of `--set`; a value is written as in TOML, or is a bare word.

    Raises:
        ConfigError: If one has no `=`, or its key no section.
    """
    for text in getattr(args, "set", None) or ():
        key, separator, value = text.partition("=")
        section = key.partition(".")[0]
        if not separator or "." not in key or section not in (*SECTIONS, "data"):
            raise ConfigError(
                "--set takes SECTION.SETTING=VALUE with a section model, training or data, such as "
                f"training.learning_rate=1e-3 or data.split.by=hash. Received: {text!r}"
            )
        try:
            yield key, tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            yield key, value


def read_settings(args: argparse.Namespace, config_file: Path | None = None) -> RunConfig:
    """The settings of a command line: those given, over those of a file, over the defaults.

    Args:
        args: Parsed options of `add_settings`.
        config_file: JSON, such as the `config.json` of a run, or TOML; sections and settings may be absent.

    Raises:
        ConfigError: If the file cannot be read, or a setting is unknown or invalid.
    """
    values: Any = {}
    if config_file is not None:
        try:
            text = config_file.read_text(encoding="utf-8")
            values = tomllib.loads(text) if config_file.suffix == ".toml" else json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"--config needs a JSON or TOML file, such as a run's config.json. Received: {config_file}: {error}"
            ) from error
    given = given_settings(args)
    if not isinstance(values, dict) or not all(isinstance(values.get(section, {}), dict) for section in SECTIONS):
        raise ConfigError(f"{config_file} must hold sections {sorted(SECTIONS)} of settings. Received: {values!r:.200}")
    merged = {**values, **{section: {**values.get(section, {}), **given[section]} for section in given}}
    return RunConfig.from_dict(merged)


# --- data and runs --------------------------------------------------------------------------------------------------


class _Default(str):
    """The value of an option that has not been given."""


def add_data(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Adds `--data` with the options of the built-in dataset that it names."""
    from mvke_tf import datasets

    parser.add_argument(
        "--data",
        default=_Default(datasets.DEFAULT),
        help=f"declaration of a dataset (data.toml), or one of {', '.join(datasets.names())} (default: %(default)s)",
    )
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="tables made and prepared (default: data)")
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="one setting, such as data.split.seed=1; may be repeated"
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default=datasets.DEFAULT)
    named = first.parse_known_args([text for text in argv if not text.startswith("--help")])[0].data
    options = datasets.options(named)
    if options:
        group = parser.add_argument_group(f"settings of the dataset {named}")
        for option in options:
            group.add_argument(f"--{option.name}", help=option.help, **option.argument())


def _dataset(args: argparse.Namespace) -> Any:
    """The dataset of a command line, its tables on disk."""
    from mvke_tf import datasets

    here = [path for path in sorted(Path().glob("*.toml")) if _declares(path)]
    if isinstance(args.data, _Default) and here:
        raise ConfigError(
            f"Which data? Without --data it would be {args.data}, and here lies {here[0]}. Add --data {here[0]}, or "
            f"--data {args.data}."
        )
    given = {option.name: getattr(args, option.name) for option in datasets.options(args.data)}
    given = {name: value for name, value in given.items() if value is not None}
    dataset = datasets.load(args.data, args.data_dir, **given)
    overrides = {key.partition(".")[2]: value for key, value in assignments(args) if key.startswith("data.")}
    return dataset.replace(overrides) if overrides else dataset


def _same_data(args: argparse.Namespace) -> list[object]:
    """The arguments with which another command has the data of this one."""
    from mvke_tf import datasets

    given = [(f"--{option.name}", getattr(args, option.name)) for option in datasets.options(args.data)]
    given += [("--data_dir", args.data_dir)] if args.data_dir != Path("data") else []
    given += [("--set", one) for one in args.set or () if one.startswith("data.")]
    return ["--data", args.data, *(text for name, value in given if value is not None for text in (name, value))]


def _declares(path: Path) -> bool:
    """Whether a TOML file is the declaration of a dataset."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return {"source", "features", "tasks"} <= values.keys()


def prepared_of(
    args: argparse.Namespace, overwrite: bool = False, memory_mb: int | None = None, engine: Engine | None = None
) -> Any:
    """The prepared dataset of a command line with the options of `add_data`."""
    from mvke_tf.data.preparation import prepared_dataset
    from mvke_tf.run_folder import RunFolder

    prepared = prepared_dataset(_dataset(args), args.data_dir, overwrite, memory_mb, engine)
    run = RunFolder(Path(args.data))
    if run.has_data and prepared.fingerprint != run.data["fingerprint"]:
        LOGGER.warning(
            "The tables of %s have changed since it was made. These are the data of now, not those that it was trained "
            "on, which need the tables as they were.",
            run.folder,
        )
    return prepared


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run, such as runs/mine")
    parser.add_argument("--checkpoint_path", dest="run_option", type=Path, metavar="RUN", help="the same as an option")
    parser.add_argument("--model", help="name of the model, to make sure that the run holds it")


def _check_run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.run is None) == (args.run_option is None):
        parser.error("give one run, such as runs/mine")
    args.run = args.run or args.run_option
    if not args.run.exists():
        inside = Path("runs") / args.run
        hint = f" Did you mean {inside}?" if inside.is_dir() else ""
        raise RunError(f"There is no run at {args.run}.{hint} `mvke runs` lists those that are there.")


def _open(args: argparse.Namespace) -> Any:
    from mvke_tf.run import Run

    return Run.open(args.run, args.model)


def _say_next(*commands: Sequence[object]) -> None:
    lines = (shlex.join(["mvke", *map(str, command)]) for command in commands)
    print("\nNext:  " + "\n       ".join(lines))


def _export_or_serve(folder: Path) -> tuple[object, ...]:
    exported = folder / "export"
    return ("serve", exported) if exported.is_dir() else ("export", folder)


# --- commands -------------------------------------------------------------------------------------------------------


def _init_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, help="a CSV or Parquet file")
    parser.add_argument("--out", type=Path, help="the declaration to write (default: the table's name with .toml)")
    parser.add_argument("--overwrite", action="store_true", help="replace a declaration that exists")


def _init(args: argparse.Namespace) -> None:
    """Looks at a table and writes a commented draft of its declaration."""
    from mvke_tf.data.draft import draft
    from mvke_tf.io import atomic_write

    # A folder may be named "." or "..".
    table = args.table if args.table.name not in ("", "..") else args.table.resolve()
    name = table.name.removesuffix(".gz")
    out = args.out or table.with_name(f"{Path(name).stem or 'data'}.toml")
    if out.suffix != ".toml":
        raise ConfigError(f"The name of a declaration must end in .toml. Received: --out {out}")
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists. Choose another --out, or --overwrite it.")
    text = draft(args.table, out.parent)
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    guesses = text.count("# guess")
    print(f"{out}: a draft with {guesses} guesses, each marked `# guess`. Read it, correct it.")
    _say_next(("check", out))


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="declaration of a dataset (data.toml)")
    parser.add_argument("--rows", type=positive_int, default=10_000, help="rows to look at (default: 10000)")


def _check(args: argparse.Namespace) -> None:
    """Reads the first rows and says what would become of every column."""
    import_tensorflow()
    from mvke_tf.data.check import check
    from mvke_tf.data.declaration import Dataset

    print(check(Dataset.from_toml(Path(args.data)), args.rows).table())
    _say_next(("train", "--data", args.data))


def _schema(args: argparse.Namespace) -> None:
    """Prints the JSON Schema of declarations, for editors."""
    from mvke_tf.data.declaration import json_schema

    print(json.dumps(json_schema(), indent=2))


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="prepare again what is prepared already")
    parser.add_argument(
        "--memory_mb",
        type=positive_int,
        help="memory that it may take, in MiB, each worker as much; a log that takes more is prepared, and then read, "
        "in buckets of its users (default: half of the machine's)",
    )
    _add_engine(parser, "prepare buckets")


# Of workers that train.
_DEVICES = "several of this machine compute on its CPU, those of a Ray cluster with GPUs on one GPU each"


def _add_engine(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--workers", type=positive_int, default=1, help=f"processes that {what} (default: 1, this process)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="where they run: local, on this machine, or ray, in the cluster that RAY_ADDRESS names, else on this one; "
        "all machines must see the same files (extra ray; default: local)",
    )


def _prepare(args: argparse.Namespace) -> None:
    """Reads, splits and encodes a dataset once, for all models."""
    import_tensorflow()
    with Engine(args.engine, args.workers) as engine:
        prepared = prepared_of(args, args.overwrite, args.memory_mb, engine)
    print(f"Prepared: {prepared.folder}")
    _say_next(("train", *_same_data(args)))


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run_name", help="name of the folder under --runs_dir (default: the model and the time)")
    parser.add_argument("--resume", type=Path, help="run folder to continue; its own settings hold")
    parser.add_argument("--config", type=Path, help="JSON or TOML file of settings, such as a run's config.json")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    parser.add_argument("--log", nargs="+", choices=("mlflow",), default=(), help="log to MLflow, too (extra mlflow)")
    parser.add_argument(
        "--devices",
        type=_devices,
        default=1,
        help="how many devices compute each batch together, or all of them; several under JAX only (default: 1)",
    )
    _add_engine(parser, "train together, with all devices that they have; several need --engine ray")
    add_settings(parser, "model", "training")


def _check_train(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.resume and (args.run_name or args.config or given_settings(args)):
        parser.error("--resume continues a run with the settings in its config.json; leave the other settings out.")
    if args.engine == "local" and args.workers > 1:
        parser.error("--workers needs --engine ray; on this machine --devices says how many devices train together.")
    if args.engine == "ray" and args.devices != 1:
        parser.error("--devices is of this process; with --engine ray all devices of --workers processes are used.")


def _train(args: argparse.Namespace) -> None:
    """Trains a model, or continues an interrupted training."""
    config = None if args.resume else read_settings(args, args.config)
    if args.engine == "ray":
        require_extra("ray", "ray", "jax")
        # This process computes nothing.
        os.environ |= {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    import_backend()
    from mvke_tf.run import Run
    from mvke_tf.training import new_run, train, train_run

    if args.engine == "ray":
        from mvke_tf.training.launch import ray_cluster, train_on_ray

        # Nothing is made where there is no room.
        with ray_cluster(args.workers, args.log):
            if args.resume:
                run = Run.open(args.resume)
            else:
                run = new_run(prepared_of(args), config, args.run_name, args.runs_dir, args.data_dir)
            result = train_on_ray(run, args.workers, args.log)
    elif args.resume:
        result = train_run(Run.open(args.resume), log=args.log, devices=args.devices)
    else:
        result = train(prepared_of(args), config, args.run_name, args.runs_dir, log=args.log, devices=args.devices)
    print(f"Best epoch {result.best_epoch} of {len(result.history)}: {result.run.checkpoint}")
    if result.examples_per_second:
        print(f"{result.examples_per_second:,.0f} training examples per second (median of the epochs)")
    if result.peak_memory is not None:
        print(f"Peak memory {result.peak_memory / 2**30:.2f} GiB")
    if result.gpu_peak_memory is not None:
        print(f"Peak GPU memory {result.gpu_peak_memory / 2**30:.2f} GiB")
    folder = result.run.folder
    _say_next(("evaluate", folder), ("analyze", folder), ("export", folder))


def _runs_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help="where runs are (default: runs)")


def _runs(args: argparse.Namespace) -> None:
    """Lists the runs of a folder, the latest first."""
    from mvke_tf.run_folder import list_runs

    runs = list_runs(args.folder)
    if not runs:
        print(f"There is no run in {args.folder}.")
        _say_next(("train", "--runs_dir", args.folder))
        return
    print(
        _table([("run", "dataset", "model", "score", "epochs", "age", "state"), *map(_summary, runs)], right=(3, 4, 5))
    )
    print("\nscore: the best validation score, the mean AUC of its tasks where there is one; age: since the last epoch")
    _say_next(("show", runs[0].folder))


def _summary(run: Any) -> tuple[str, ...]:
    """One row of the list of runs; what cannot be read is `-`."""
    from mvke_tf.run_folder import best_epoch

    name, age = run.folder.name, _age(time.time() - run.changed())
    try:
        config, history = run.config, run.log()
        dataset = run.data["name"] if run.has_data else "-"
    except MvkeError:
        return name, "-", "-", "-", "-", age, "damaged"
    score = f"{history[best_epoch(history)]['val_score']:.4f}" if history else "-"
    epochs = f"{len(history)}/{config.training.epochs}" if history or run.has_data else "-"
    return name, dataset, config.model.name, score, epochs, age, run.state()


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size or (unit != "d" and seconds >= size):
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def _table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _show_options(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)


def _show(args: argparse.Namespace) -> None:
    """Says what a run is: its settings, tasks, best epoch, metrics, files, and what to do next."""
    from mvke_tf.run_folder import RunFolder, best_epoch, results_table

    run = RunFolder.open(args.run, args.model)
    history, report, state = run.log(), run.report(), run.state()
    changed = run.config.changed()
    facts = {
        "run": f"{run.folder}   ({state})",
        "dataset": run.data["name"] if run.has_data else "-",
        "model": run.config.model.name,
        "tasks": ", ".join(run.tasks()),
        "settings": ", ".join(f"{name} {value}" for name, value in changed.items()) or "the defaults",
    }
    if history:
        best = best_epoch(history)
        facts["epochs"] = f"{len(history)} of at most {run.config.training.epochs}"
        facts["best epoch"] = f"{best + 1}, validation score {history[best]['val_score']:.4f}"
    print("\n".join(f"{name + ':':<17}{value}" for name, value in facts.items()))
    for part in PARTS:
        if part in report:
            print(f"\nMetrics of the {part} part\n{results_table(report, part)}")
    print(f"\n{run.contents()}")
    _say_next(*_after(run, state, report))


def _after(run: Any, state: str, report: Any) -> list[Sequence[object]]:
    """What to do next with a run in this state."""
    if state.startswith("running"):
        return [("show", run.folder)]
    if state == "interrupted":
        return [("train", "--resume", run.folder)]
    if state == "damaged" or not run.checkpoint.is_file():
        return [("train", "--data", run.folder, "--config", run.config_file)]
    if not report:
        return [("evaluate", run.folder), ("export", run.folder)]
    if not run.export.exists():
        return [("analyze", run.folder), ("export", run.folder)]
    return [("serve", run.export), ("profile", run.folder)]


def _part_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", "--part", choices=PARTS, default="test", help="part of the data (default: test)")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _part_option(parser)
    parser.add_argument("--batch_size", type=_batch_size, default=4096, help="rows per step (default: 4096)")
    parser.add_argument("--calibrated", action="store_true", help="with the calibration of `mvke calibrate`")


def _evaluate(args: argparse.Namespace) -> None:
    """Measures the best checkpoint of a run: a table, a report and pictures."""
    import_backend()
    from mvke_tf.evaluation import evaluate_run, results_table

    run = _open(args)

    def show(report: Any) -> None:
        print(f"\n{results_table(report, args.split)}\n", flush=True)

    evaluate_run(run, args.split, args.batch_size, args.calibrated, show)
    print(run.contents())
    _say_next(("analyze", run.folder), _export_or_serve(run.folder))


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=("temperature", "platt", "isotonic"),
        default="platt",
        help="kind of the rising function from logits to calibrated logits (default: platt)",
    )


def _calibrate(args: argparse.Namespace) -> None:
    """Calibrates the binary tasks of a run on its validation part; exports and profiles are calibrated from then on."""
    import_backend()
    require_extra("train", "scipy", "sklearn")
    from mvke_tf.evaluation import calibrate_run, calibration_table

    run = _open(args)
    print(f"\n{calibration_table(calibrate_run(run, args.method))}\n\nCalibration: {run.calibration_file}")
    _say_next(("evaluate", run.folder, "--calibrated"), ("export", run.folder))


def _analyze_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir", "--out", dest="output_dir", type=Path, help="folder to write to (default: <run>/analysis)"
    )
    _part_option(parser)
    parser.add_argument("--user", help="id of the user to explain (default: the one with the most impressions)")
    parser.add_argument("--top", type=positive_int, default=10, help="items of that user, per task (default: 10)")
    parser.add_argument(
        "--map",
        choices=("pca", "tsne", "umap"),
        default="pca",
        help="plane of the map; umap is an extra (default: pca)",
    )


def _analyze(args: argparse.Namespace) -> None:
    """Says what the experts of a run learned: tables, pictures, a diagnosis and one page."""
    require_extra("analysis", "matplotlib", "pandas", "sklearn", "tqdm")
    import_backend()
    from mvke_tf.analysis import analyze_run

    run = _open(args)
    analysis = analyze_run(run, args.output_dir, args.split, args.user, args.map, args.top)
    print(f"\n{analysis.summary}\n")
    places = {"page": analysis.page, "tables": analysis.folder / "tables", "figures": analysis.folder / "figures"}
    for what, place in places.items():
        print(f"{what + ':':<9}{place}")
    _say_next(("explore", run.folder), _export_or_serve(run.folder))


def _explore_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=_port, default=7860, help="0 takes any free one (default: 7860)")


def _explore(args: argparse.Namespace) -> None:
    """Shows a run as a local page: users, edited ones too, and items, with what each expert contributes."""
    require_extra("explore", "gradio", "matplotlib", "pandas", "sklearn", "uvicorn")
    import_tensorflow()
    from mvke_tf.explore.server import explore

    explore(_open(args), args.port)


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir", "--export_path", dest="output_dir", type=Path, help="folder of all versions (default: export)"
    )
    parser.add_argument(
        "--version", type=positive_int, help="number of the version; one that exists is not overwritten (default: next)"
    )


def _export(args: argparse.Namespace) -> None:
    """Writes a SavedModel that takes raw features."""
    import_tensorflow()
    from mvke_tf.serving import export_run

    run = _open(args)
    path = export_run(run, args.output_dir, args.version)
    load = f"import tensorflow as tf; print(tf.saved_model.load({str(path.resolve())!r}).signatures['serving_default'])"
    print(f"SavedModel: {path}   (signatures with their inputs and outputs: {path / 'signatures.json'})")
    print(f'Load it: python -c "{load}"')
    _say_next(("serve", path.parent), ("profile", run.folder))


def _onnx_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir", "--onnx_path", dest="output_dir", type=Path, help="folder of the files (default: onnx)"
    )
    parser.add_argument(
        "--component",
        "--part",
        dest="component",
        nargs="+",
        choices=("model", "user", "item"),
        default=["model"],
        help="the whole model, or one tower; several make several files (default: model)",
    )


def _onnx(args: argparse.Namespace) -> None:
    """Writes ONNX files of the encoded inputs, checked against Keras."""
    require_extra("onnx", "tf2onnx", "onnx", "onnxruntime")
    import_tensorflow()
    from mvke_tf.serving.onnx import TOLERANCE, export_run_onnx

    run = _open(args)
    for component in dict.fromkeys(args.component):
        path = export_run_onnx(run, component, args.output_dir)
        print(f"ONNX: {path}   (its inputs and outputs: {path.with_suffix('.json')})")
    print(f"onnxruntime and Keras agree to {TOLERANCE:g} on rows of the test part.")
    _say_next(("export", run.folder), ("profile", run.folder))


def _port(text: str) -> int:
    if not text.isdecimal() or int(text[:6]) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, received {text!r}")
    return int(text)


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, '_', '-' and '.', received {text!r}")
    return text


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", nargs="?", type=Path, help="folder of all versions, such as runs/mine/export")
    parser.add_argument("--export_path", dest="model_dir_option", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", type=_name, default="mvke", help="name of the model in addresses (default: mvke)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; 0.0.0.0 lets other machines in)"
    )
    parser.add_argument("--port", type=_port, default=8501, help="0 takes any free one (default: 8501)")
    parser.add_argument("--max_request_mb", type=positive_int, default=8, help="longest request, MiB (default: 8)")
    parser.add_argument("--max_rows", type=positive_int, default=10_000, help="most rows of a request (default: 10000)")
    parser.add_argument(
        "--max_values",
        type=positive_int,
        default=200_000,
        help="most values of one input or output, such as rows x items (default: 200000)",
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=os.cpu_count() or 1,
        help="requests computed at the same time (default: one per core)",
    )
    parser.add_argument(
        "--max_waiting", type=positive_int, default=256, help="requests under way beyond those (default: 256)"
    )
    parser.add_argument(
        "--token_file",
        type=Path,
        help="file with the token that requests must bring (Authorization: Bearer ...); needed beyond this machine",
    )
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names of this server that requests may be addressed to, * for any; needed beyond this machine",
    )
    parser.add_argument(
        "--reload_seconds",
        type=float,
        default=10.0,
        help="how often to look for a newer version, which then answers; 0 never does (default: 10)",
    )
    parser.add_argument(
        "--batch_ms",
        type=float,
        default=0.0,
        help="how long a request waits for others to be computed with it, milliseconds (default: 0, none waits)",
    )
    parser.add_argument("--log_requests", action="store_true", help="print a line for each request")


def _check_serve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.model_dir is None) == (args.model_dir_option is None):
        parser.error("give one folder of an exported model, such as runs/mine/export")
    args.model_dir = args.model_dir or args.model_dir_option
    if not 0 <= args.reload_seconds < float("inf"):
        parser.error(f"argument --reload_seconds: expected 0 or more seconds, received {args.reload_seconds}")
    if not 0 <= args.batch_ms <= 1000:
        parser.error(f"argument --batch_ms: expected 0 to 1000 milliseconds, received {args.batch_ms}")


def _serve(args: argparse.Namespace) -> None:
    """Serves an exported model over HTTP, in TensorFlow Serving's protocol."""
    require_extra("serve", "starlette", "uvicorn")
    import_tensorflow(onednn=False)
    from mvke_tf.serving.rest import Limits, serve

    token = None
    if args.token_file is not None:
        try:
            token = args.token_file.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--token_file needs a file of text in UTF-8. Received: {args.token_file}, which is none"
            ) from error
        if not token:
            raise ConfigError(
                f"--token_file needs a file with a token in it. Received: {args.token_file}, which is empty"
            )
    limits = Limits(
        request_bytes=args.max_request_mb * 2**20,
        rows=args.max_rows,
        values=args.max_values,
        threads=args.threads,
        waiting=args.max_waiting,
        batch_seconds=args.batch_ms / 1000,
    )
    serve(
        args.model_dir,
        args.name,
        args.host,
        args.port,
        limits,
        token,
        args.allowed_hosts,
        args.reload_seconds,
        args.log_requests,
    )


def _profile_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", "--task", dest="tasks", nargs="+", help="tasks (default: all of the model)")
    parser.add_argument("--top", type=positive_int, default=20, help="ranks per user (default: 20)")
    parser.add_argument("--by", default="item", help="item, or a grouping of items by its name (default: item)")
    parser.add_argument("--users", nargs="+", default=["all"], metavar="ID", help="ids of users, or all (default: all)")
    parser.add_argument("--exclude_seen", action="store_true", help="leave out the items that a user has had")
    parser.add_argument(
        "--group_items",
        type=positive_int,
        default=10,
        help="a group's score is the mean over so many of its items, the user's best (default: 10)",
    )
    parser.add_argument(
        "--memory_mb",
        type=positive_int,
        default=512,
        help="bound of the working memory, in MiB, of each worker (default: 512)",
    )
    parser.add_argument(
        "--output_dir", "--out", dest="output_dir", type=Path, help="folder of the files (default: <run>/profiles)"
    )
    parser.add_argument(
        "--format", nargs="+", choices=("parquet", "csv"), default=["parquet", "csv"], help="formats (default: both)"
    )
    _add_engine(parser, "score users; several use no GPU")
    search = parser.add_argument_group(
        "vector search: an index finds the items, approximately, instead of scoring them all; for large catalogues"
    )
    search.add_argument("--index", choices=("faiss",), help="library of the index (default: none, exact scoring)")
    search.add_argument("--index_kind", choices=_SEARCHES, help="kind of the index (default: hnsw)")
    search.add_argument("--links", type=positive_int, help="HNSW: links per item, M (default: 32)")
    search.add_argument("--cells", type=positive_int, help="IVF: number of cells, nlist (default: 4 sqrt(items))")
    search.add_argument(
        "--effort",
        type=positive_int,
        help="HNSW: candidates kept while searching, ef_search; IVF: cells looked into, nprobe (default: 64)",
    )


_SEARCHES = ("flat", "hnsw", "ivf")


def _check_profile(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    _check_run(parser, args)
    if "all" in args.users and len(args.users) > 1:
        parser.error(f"argument --users: expected ids or all, received {args.users}")
    args.kind = (args.index_kind or "hnsw") if args.index else None
    for option, kinds in {"index_kind": _SEARCHES, "links": ("hnsw",), "cells": ("ivf",), "effort": _SEARCHES}.items():
        if getattr(args, option) is not None and args.kind not in kinds:
            found = f"an index of the kind {args.kind}" if args.kind else "no --index"
            parser.error(
                f"argument --{option}: belongs to --index with --index_kind {'|'.join(kinds)}, received {found}"
            )


def _profile(args: argparse.Namespace) -> None:
    """Makes the profiles of users in bulk: the items or groups that each rates highest, as files."""
    require_extra("profile", "pandas", "tqdm")
    # oneDNN's own allocator keeps twice the size of the largest table, and is no faster where nothing is trained.
    os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")
    import_tensorflow()
    from mvke_tf.inference.index import IndexConfig
    from mvke_tf.serving.profiles import profile_run

    run = _open(args)
    with Engine(args.engine, args.workers) as engine:
        files = profile_run(
            run,
            tasks=args.tasks,
            top=args.top,
            by=args.by,
            users=None if args.users == ["all"] else args.users,
            exclude_seen=args.exclude_seen,
            memory_mb=args.memory_mb,
            group_items=args.group_items,
            formats=args.format,
            folder=args.output_dir,
            index=IndexConfig(args.kind, links=args.links or 32, cells=args.cells or 0) if args.kind else None,
            effort=args.effort or 64,
            engine=engine,
        )
    for task, paths in files.items():
        print(f"{task}: {', '.join(map(str, paths))}")
    _say_next(_export_or_serve(run.folder))


def _own_config(text: str) -> tuple[str, Path]:
    """Type of `MODEL=FILE`."""
    model, separator, path = text.partition("=")
    if not separator or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"expected MODEL=FILE with a file that exists, received {text!r}")
    return model, Path(path)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    from mvke_tf.config import BASELINE_NAMES, MODEL_NAMES, WITHOUT_NETWORK

    names = (*MODEL_NAMES, *BASELINE_NAMES)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=names,
        # The other baseline needs a history of items.
        default=(*MODEL_NAMES, *WITHOUT_NETWORK),
        metavar="MODEL",
        help=f"rows of the table, of {', '.join(names)} (default: all but target_attention)",
    )
    parser.add_argument("--seeds", type=positive_int, default=5, help="seeds per model, from 0 (default: 5)")
    parser.add_argument(
        "--output_dir", "--out", dest="output_dir", type=Path, required=True, help="folder, as comparisons/<name>"
    )
    parser.add_argument("--config", type=Path, help="JSON or TOML file of settings of all models")
    parser.add_argument(
        "--configs",
        nargs="+",
        type=_own_config,
        default=[],
        metavar="MODEL=FILE",
        help="settings of one model each, such as the best_config.json of `mvke tune`; tasks, epochs, batch size and "
        "patience must be the same for all",
    )
    _add_engine(parser, f"make runs, one at a time each; {_DEVICES}")
    add_settings(parser, "model", "training", without=("model", "seed"))


def _check_compare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if unused := sorted(set(dict(args.configs)) - set(args.models)):
        parser.error(f"--configs has settings of {unused}, which --models does not name.")


def _compare(args: argparse.Namespace) -> None:
    """Trains several models with several seeds on the same data and writes one table."""
    require_extra("compare", "matplotlib", "pandas", "scipy", "sklearn", "tqdm")
    files = dict(args.configs)
    configs = {model: read_settings(args, files.get(model, args.config)) for model in dict.fromkeys(args.models)}
    engine = Engine(args.engine, args.workers, gpus_per_worker=1)
    import_backend()
    from mvke_tf.experiments.compare import Comparison

    _expect_many_models()
    with engine:
        Comparison(args.output_dir, configs, args.seeds, prepared_of(args)).run(engine)
    print(f"\n{(args.output_dir / 'table.md').read_text(encoding='utf-8')}")
    for name in ("table.md", "table.csv", "results.csv", "comparison.png", "runs"):
        print(args.output_dir / name)
    _say_next(("runs", args.output_dir / "runs"))


# Option of each searched setting.
_SEARCHED = {
    "learning_rate": "learning_rate",
    "embedding_dim": "embedding_dim",
    "num_virtual_kernels": "num_virtual_kernels",
    "hidden_width": "hidden_dims",
    "dropout_rate": "dropout_rate",
}


def _tune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output_dir", "--out", dest="output_dir", type=Path, required=True, help="folder, as tuning/<name>"
    )
    parser.add_argument("--trials", type=positive_int, default=20, help="trials in all (default: 20)")
    parser.add_argument("--tuner", choices=("random", "bayesian"), default="random", help="(default: random)")
    parser.add_argument("--config", type=Path, help="JSON or TOML file of the settings that are not searched")
    _add_engine(
        parser,
        "train trials, one at a time each; a bayesian search asks for as many trials at a time as there are, and so "
        f"depends on their number, a random one does not; {_DEVICES}",
    )
    add_settings(parser, "model", "training")


def _tune(args: argparse.Namespace) -> None:
    """Searches good settings of a model; a searched setting that is given is not searched."""
    require_extra("tune", "keras_tuner", "pandas", "tqdm")
    config = read_settings(args, args.config)
    fixed = [name for name, option in _SEARCHED.items() if getattr(args, option) is not None]
    engine = Engine(args.engine, args.workers, gpus_per_worker=1)
    import_backend()
    from mvke_tf.experiments.runs import configs_of_runs
    from mvke_tf.experiments.tune import tune

    prepared = prepared_of(args)
    _expect_many_models()
    with engine:
        table = tune(prepared, config, args.output_dir, args.trials, args.tuner, fixed, engine)
    print(f"\n{table.to_string(index=False)}\n\n{args.output_dir / 'trials.csv'}")
    # A run of single_task learns one task; a trial of its search makes one per task.
    best = [args.output_dir / f"best_config{suffix}.json" for suffix in configs_of_runs(config, prepared.task_names())]
    _say_next(*(("train", *_same_data(args), "--config", path) for path in best))


def _expect_many_models() -> None:
    # TensorFlow warns of functions that are traced again and again; here they belong to one model after another.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


_CONTINUE = "Continue with"


@dataclasses.dataclass(frozen=True)
class _Subcommand:
    run: Command
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] = lambda parser, args: None
    # What it works on: "data" (--data), "run", or something of its own.
    on: str = ""
    # Options of its own that the short help shows; all if there are none.
    common: tuple[str, ...] = ()
    # After the name; by default all options.
    usage: str = ""
    # What Ctrl-C says before the command line: it goes on where it was, or does everything once more.
    again: str = "Start again with"


_COMMANDS = {
    "From a table to a model": {
        "init": _Subcommand(_init, _init_options),
        "check": _Subcommand(_check, _check_options),
        "prepare": _Subcommand(_prepare, _prepare_options, on="data"),
        "train": _Subcommand(
            *(_train, _train_options, _check_train, "data"),
            common=("run_name", "resume", "config", "log"),
            usage="[--data DATA] [--run_name NAME] [options]",
            again=_CONTINUE,
        ),
    },
    "Runs": {
        "runs": _Subcommand(_runs, _runs_options),
        "show": _Subcommand(_show, _show_options, _check_run),
        "evaluate": _Subcommand(_evaluate, _evaluate_options, _check_run, on="run"),
        "calibrate": _Subcommand(_calibrate, _calibrate_options, _check_run, on="run"),
        "analyze": _Subcommand(_analyze, _analyze_options, _check_run, on="run"),
        "explore": _Subcommand(_explore, _explore_options, _check_run, on="run"),
    },
    "Use of a model": {
        "export": _Subcommand(_export, _export_options, _check_run, on="run"),
        "serve": _Subcommand(
            *(_serve, _serve_options, _check_serve),
            common=("name", "host", "port", "token_file", "allowed_hosts"),
            usage="MODEL_DIR [options]",
        ),
        "profile": _Subcommand(
            *(_profile, _profile_options, _check_profile, "run"),
            common=("tasks", "top", "by", "users", "exclude_seen", "output_dir", "format"),
            usage="RUN [options]",
        ),
        "onnx": _Subcommand(_onnx, _onnx_options, _check_run, on="run"),
    },
    "Many models": {
        "compare": _Subcommand(
            *(_compare, _compare_options, _check_compare, "data"),
            common=("models", "seeds", "output_dir", "config", "configs"),
            usage="--output_dir FOLDER [--data DATA] [options]",
            again=_CONTINUE,
        ),
        "tune": _Subcommand(
            *(_tune, _tune_options),
            on="data",
            common=("output_dir", "trials", "tuner", "config"),
            usage="--output_dir FOLDER [--data DATA] [options]",
            again=_CONTINUE,
        ),
    },
    "For editors": {"schema": _Subcommand(_schema)},
}
COMMANDS = {name: command for group in _COMMANDS.values() for name, command in group.items()}


def _words(command: _Subcommand) -> str:
    return inspect.cleandoc(command.run.__doc__ or "")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments of one command line, not run; ends the process if they are wrong."""
    from mvke_tf import __version__

    lines = ["From a table to a served multi-task model."]
    for title, group in _COMMANDS.items():
        lines += ["", f"{title}:", *(f"    {name:<9} {_words(command)}" for name, command in group.items())]
    parser = _Parser(
        prog="mvke",
        usage="mvke [--help] [--version] COMMAND ...",
        description="\n".join(lines),
        epilog="mvke COMMAND --help says more, mvke COMMAND --help-all everything.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mvke_tf {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS, parser_class=_Parser
    )
    # Options are made for the one command that is asked for: those of a dataset depend on which it is.
    asked = next((text for text in argv if not text.startswith("-")), None)
    for name, command in COMMANDS.items():
        chosen = commands.add_parser(
            name,
            prog=f"mvke {name}",
            usage=f"mvke {name} {command.usage}" if command.usage else None,
            description=_words(command),
            allow_abbrev=False,
        )
        if name == asked:
            chosen.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all options, and exit")
            if command.on == "data":
                add_data(chosen, argv)
            if command.on == "run":
                _add_run(chosen)
            command.options(chosen)
            if command.common:
                settings = (_FLAGS.get(("model", option), option) for option in COMMON_SETTINGS)
                chosen.common = ("help", "data", "set", *command.common, *settings)
        chosen.set_defaults(parser=chosen)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _run(argv: Sequence[str]) -> None:
    args = parse(argv)
    command = COMMANDS[args.command]
    command.check(args.parser, args)
    try:
        command.run(args)
    except KeyboardInterrupt as interrupt:
        # Training names the run that it was about to make; a comparison or a search goes on as a whole.
        if interrupt.args and args.command == "train":
            raise
        raise KeyboardInterrupt(f"{command.again}: {shlex.join(['mvke', *argv])}") from None
