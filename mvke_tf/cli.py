"""What the command lines in `scripts/` share. Imports nothing heavy: `--help` and bad arguments answer at once."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from mvke_tf.config import CHOICES, SECTIONS, RunConfig, entry_type

DEBUG = "MVKE_DEBUG"


def run_main(main: Callable[[], None]) -> NoReturn:
    """Runs the `main` of a script and ends the process.

    The errors of this package that a user can mend are `ValueError`s (`RunError`, `DataError`, bad settings). They
    become one line on stderr, without a traceback unless the environment has `MVKE_DEBUG=1`. Anything else is a defect
    and keeps its traceback. `TF_CPP_MIN_LOG_LEVEL` is set to 2 (errors) unless the environment has it; for that,
    `main` must import TensorFlow inside.

    Args:
        main: Parses the command line and does the work.

    Raises:
        SystemExit: Always. Status 0 when `main` returns, 2 after a `ValueError` (as after a bad argument), 130 after
            Ctrl-C; what `main` itself exits with passes through.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        main()
    except ValueError as error:
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        if type(error) is ValueError:
            print(f"({DEBUG}=1 shows where it was raised.)", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


# Settings whose own name would be ambiguous on a command line.
_FLAGS = {("data", "seed"): "data_seed", ("model", "name"): "model"}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a run: `--checkpoint_path`, which must exist, and `--model`."""
    parser.add_argument(
        "--checkpoint_path", type=_existing, required=True, help="folder of the run, or the best.keras in it"
    )
    parser.add_argument("--model", help="name of the model, to make sure that the run holds it")


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is nothing at {path}")
    return path


def add_settings(parser: argparse.ArgumentParser, *sections: str, without: Collection[str] = ()) -> None:
    """Adds one option per setting of the named sections of `RunConfig`; the help is the docstring's.

    An option that is not given leaves the setting to `read_settings`.

    Args:
        parser: Gets the options.
        sections: Names of sections.
        without: Options to leave out, such as `"model"`.
    """
    for section in sections:
        cls = SECTIONS[section]
        # Python 3.13 strips the indentation of docstrings, earlier ones do not.
        described = dict(re.findall(r"^ {4}(\w+): (.+?)(?=\n {4}\w|\Z)", inspect.cleandoc(cls.__doc__), re.M | re.S))
        group = parser.add_argument_group(f"settings of the {section}")
        for field in dataclasses.fields(cls):
            option = _FLAGS.get((section, field.name), field.name)
            if option in without:
                continue
            words = " ".join(described[field.name].split()).replace("`", "").replace("%", "%%")
            options: dict[str, Any] = {"default": None, "help": f"{words} (default: {field.default})"}
            if isinstance(field.default, bool):
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(field.default, tuple):
                options |= {"nargs": "+", "type": entry_type(field)}
            else:
                options["type"] = type(field.default)
            if (section, field.name) in CHOICES:
                options["choices"] = CHOICES[section, field.name]
            group.add_argument(f"--{option}", **options)


def given_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings that a command line states, `{section: {setting: value}}`."""
    given: dict[str, dict[str, Any]] = {}
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            value = getattr(args, _FLAGS.get((section, field.name), field.name), None)
            if value is not None:
                given.setdefault(section, {})[field.name] = value
    return given


def read_settings(args: argparse.Namespace, config_file: Path | None = None) -> RunConfig:
    """The settings of a command line: those given, over those of a JSON file, over the defaults.

    Args:
        args: Parsed options of `add_settings`.
        config_file: A file such as the `config.json` of a run; sections and settings may be absent.

    Raises:
        ValueError: If the file cannot be read, or a setting is unknown or invalid.
    """
    values: Any = {}
    if config_file is not None:
        try:
            values = json.loads(config_file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--config needs a JSON file, such as a run's config.json. Received: {error}") from error
    config = RunConfig.from_dict(values)
    changed = {
        section: dataclasses.replace(getattr(config, section), **settings)
        for section, settings in given_settings(args).items()
    }
    return dataclasses.replace(config, **changed)


def positive_int(text: str) -> int:
    """Type of an argparse argument that counts something: a whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text!r}")
    return value


def require_extra(extra: str, *modules: str) -> None:
    """Does nothing if the modules of an optional extra are installed; imports none of them.

    Raises:
        ValueError: If one is missing; the message says how to install it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"This needs {', '.join(missing)}. Install the extra: pip install '.[{extra}]'")
