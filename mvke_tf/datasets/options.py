# SPDX-License-Identifier: Apache-2.0
"""What a built-in dataset lets its user choose, described for a command line. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvke_tf.config import nearest
from mvke_tf.errors import DeclarationError


@dataclasses.dataclass(frozen=True)
class Option:
    """One choice.

    Args:
        name: Its name, also as a flag.
        text: What it is, in a sentence without its default.
        default: What holds if it is not given, in words if it is None.
        type: Type of a value.
        choices: Legal values; any by default.
        keys: Dotted keys of the declaration that take the value as it is, as `Dataset.replace` reads them. Without any,
            the program that makes the tables reads it.
    """

    name: str
    text: str
    default: Any
    type: type = str
    choices: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def help(self) -> str:
        """The line of a command's help."""
        return f"{self.text} (default: {self.default})".replace("%", "%%")

    def argument(self) -> dict[str, Any]:
        """Keyword arguments of `ArgumentParser.add_argument`; an option that is not given is None."""
        arguments: dict[str, Any] = {"type": self.type, "default": None}
        return arguments | ({"choices": self.choices} if self.choices else {})

    def read(self, value: Any) -> Any:
        """The value as its type.

        Raises:
            DeclarationError: If it has another type, or is no legal one.
        """
        if self.type is Path and isinstance(value, (str, Path)):
            return Path(value)
        kinds = (int, float) if self.type is float else self.type
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise DeclarationError(f"Option {self.name} must be of type {self.type.__name__}. Received: {value!r:.80}")
        if self.choices and value not in self.choices:
            raise DeclarationError(
                f"Option {self.name} must be one of {', '.join(self.choices)}.{nearest(value, self.choices)} "
                f"Received: {value!r:.80}"
            )
        return value


def read_options(options: Sequence[Option], given: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The given values, checked; None counts as not given.

    Args:
        options: What can be chosen.
        given: Values by name.
        dataset: The dataset's name, for messages.

    Raises:
        DeclarationError: If there is no such option, or a value is none.
    """
    known = {option.name: option for option in options}
    for name in given:
        if name not in known:
            raise DeclarationError(
                f"The dataset {dataset!r} has no option {name!r}.{nearest(name, known)} "
                f"Options: {', '.join(known) or 'none'}"
            )
    return {name: known[name].read(value) for name, value in given.items() if value is not None}


def changes(options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """What `Dataset.replace` is given for the options that are keys of the declaration."""
    return {key: given[option.name] for option in options if option.name in given for key in option.keys}
