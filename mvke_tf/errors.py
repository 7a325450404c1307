# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend. Only these become one line at a command line; every other one keeps its traceback."""

from importlib.util import find_spec


class MvkeError(ValueError):
    """What came, what was expected, and what to do."""


class DeclarationError(MvkeError):
    """A declaration of a dataset that cannot be used; the message names file, table and key."""


class DataError(MvkeError):
    """Data that do not fit their declaration; the message names file, column, row and value where it can."""


class ConfigError(MvkeError):
    """A setting of a model or a training that cannot be used."""


class RunError(MvkeError):
    """A run directory that cannot be used; the message says why and what to do."""


class TrainingError(MvkeError):
    """Training that cannot go on; the message says where, and what is kept."""


class MissingExtraError(MvkeError):
    """An optional dependency that is not installed; the message says how to install it."""


def missing_modules(*modules: str) -> list[str]:
    """Those that are not installed; imports none."""
    return [module for module in modules if find_spec(module) is None]


def require_extra(extra: str, *modules: str) -> None:
    """Does nothing if the modules of an optional extra are installed; imports none of them.

    Raises:
        MissingExtraError: If one is missing; the message says how to install it.
    """
    if missing := missing_modules(*modules):
        raise MissingExtraError(f"This needs {', '.join(missing)}. Install the extra: pip install 'mvke_tf[{extra}]'")
