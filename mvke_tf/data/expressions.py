# SPDX-License-Identifier: Apache-2.0
"""Durations and SQL conditions as declarations write them."""

from __future__ import annotations

import re

import polars as pl

from mvke_tf.data.values import MOST_TEXT, nearest_word, short
from mvke_tf.errors import DeclarationError

UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
# A thousand years in milliseconds: longer than any log.
LONGEST = 1_000 * 366 * UNITS["d"]

# Functions of SQL whose value in a row depends on that row alone, so that no moment can leak into another.
# fmt: off
FUNCTIONS = frozenset((
    "abs", "cbrt", "ceil", "ceiling", "div", "exp", "floor", "ln", "log", "log10", "log1p", "log2", "mod", "pow",
    "power", "round", "sign", "sqrt",
    "cast", "coalesce", "greatest", "if", "ifnull", "least", "nullif", "try_cast",
    "char_length", "character_length", "concat", "concat_ws", "ends_with", "initcap", "left", "length", "lower",
    "ltrim", "octet_length", "regexp_like", "replace", "reverse", "right", "rtrim", "starts_with", "strpos", "substr",
    "substring", "trim", "upper",
    "date", "date_part", "extract", "strptime", "timestamp",
    "array_contains", "array_get", "array_length", "array_mean", "array_sum", "array_to_string",
))
# Words before a parenthesis that call nothing.
_WORDS = frozenset((
    "and", "or", "not", "in", "is", "like", "ilike", "rlike", "regexp", "between", "case", "when", "then", "else",
    "end", "distinct", "from", "as", "interval",
))
# Words that SQL reads as the present moment: a label must not depend on the day on which it is read.
_PRESENT = frozenset((
    "current_date", "current_time", "current_timestamp", "localtime", "localtimestamp",
))
# Functions whose value may be NaN, which compares as larger than every number: it is unknown instead.
_PARTIAL = frozenset(("ln", "log", "log10", "log1p", "log2", "mod", "pow", "power", "sqrt"))
# Of 0 these are infinite, and the difference of two infinite numbers is NaN.
_OF_POSITIVE = frozenset(("ln", "log10", "log2"))
# fmt: on
# Divisions and such functions inside one another: each doubles the size of what is around it.
_MOST_NESTED = 8
_TOKEN = re.compile(
    r"""(?P<text>'(?:[^']|'')*')|(?P<quoted>"(?:[^"]|"")*"|`[^`]*`)|(?P<comment>--|/\*)"""
    r"""|(?P<word>[^\W\d]\w*)|(?P<number>[\d.]+(?:[eE][+-]?\d+)?)|(?P<space>\s+)|(?P<sign>.)""",
    re.DOTALL,
)


def duration_ms(text: str, where: str = "duration") -> int:
    """Milliseconds of a duration such as `"30d"`; units ms, s, m, h, d and w.

    Args:
        text: The duration.
        where: File, table and key, for the message.

    Raises:
        DeclarationError: If it is written in another way, or longer than a thousand years.

    >>> duration_ms("1d")
    86400000
    """
    found = re.fullmatch(r"([0-9]{1,15})\s*(ms|s|m|h|d|w)", text) if isinstance(text, str) else None
    value = int(found[1]) * UNITS[found[2]] if found else 0
    if not 0 < value <= LONGEST:
        raise DeclarationError(
            f'{where} must be a duration of more than 0 and at most 1,000 years, such as "30d" '
            f"(units {', '.join(UNITS)}). Received: {short(text)}"
        )
    return value


def condition(text: str, where: str = "condition") -> pl.Expr:
    """A SQL condition as a boolean expression, true in the rows in which it holds.

    A number counts as true where it is not 0. Where the condition is unknown (null) it does not hold. A division by 0,
    a logarithm of what is not positive and the like are unknown. Frames are expected to say null and not NaN, as those
    of `mvke_tf.data.tables.read_tables` do.

    Args:
        text: A column name, or a SQL expression over the columns of one row, such as `"price >= 4 and clicked"`.
        where: File, table and key, for the message.

    Raises:
        DeclarationError: If it cannot be parsed, names no column, or depends on more than one row.
    """
    return (value(text, where) != 0).fill_null(False)


def value(text: str, where: str = "value") -> pl.Expr:
    """A column or SQL expression as float64; true is 1, false is 0, unknown is null.

    Args:
        text: As in `condition`.
        where: As in `condition`.

    Raises:
        DeclarationError: As of `condition`.
    """
    return _parse(text, where).cast(pl.Float64).fill_nan(None)


def columns(text: str, where: str = "condition") -> tuple[str, ...]:
    """Names of the columns that a condition reads, each once, in the order of their first use.

    Args:
        text: As in `condition`.
        where: As in `condition`.

    Raises:
        DeclarationError: As of `condition`.
    """
    return tuple(dict.fromkeys(_parse(text, where).meta.root_names()))


def _quoted(text: str) -> str:
    """How a text that may be the name of a column is written in TOML, whose own quotes are not enough."""
    return f", inside TOML's own: '\"{text}\"'" if re.fullmatch(r"[\w .:/%#&€$?!№-]{1,60}", text) else ""


def _parse(text: str, where: str) -> pl.Expr:
    if not isinstance(text, str) or not text.strip() or len(text) > MOST_TEXT:
        raise DeclarationError(
            f"{where} must be a column or a SQL condition of at most {MOST_TEXT:,} characters. Received: {short(text)}"
        )
    if text.isidentifier():
        # Also what SQL has as a word of its own, such as a column `order`.
        return pl.col(text)
    sql = _checked(text, where)
    try:
        expression = pl.sql_expr(sql)
        if not expression.meta.eq(expression.meta.undo_aliases()):
            # SQL takes a second word for a new name of the first.
            raise pl.exceptions.SQLSyntaxError("two names without anything between them")
        names = expression.meta.root_names()
        several = expression.meta.has_multiple_outputs()
    except (pl.exceptions.PolarsError, UnicodeEncodeError) as error:
        reason = " ".join(str(error).split())
        raise DeclarationError(
            f"{where} must be a column or a SQL condition; a column of another name than letters, digits and _ is "
            f"written in double quotes{_quoted(text)}. Received: {short(text)} ({reason[:120]})"
        ) from error
    if not names or several:
        raise DeclarationError(f"{where} must be one value, of at least one column. Received: {short(text)}")
    return expression


def parts(expression: pl.Expr) -> list[pl.Expr]:
    """The expressions that one is made of and that read columns, the innermost first, itself last; no bare columns."""
    found: dict[bytes, pl.Expr] = {}
    waiting = [expression]
    while waiting:
        part = waiting.pop()
        key = part.meta.serialize()
        if key in found or part.meta.is_column() or not part.meta.root_names():
            continue
        found[key] = part
        waiting += part.meta.pop()
    return list(found.values())[::-1]


def _checked(text: str, where: str) -> str:
    """The condition with every bare operand of `and`, `or` and `not` compared with 0, and unknown for NaN.

    Raises:
        DeclarationError: If it calls what is not in `FUNCTIONS`, or depends on the present moment.
    """
    found = [match for match in _TOKEN.finditer(text) if match.lastgroup != "space"]
    tokens = [(match.lastgroup, match.group()) for match in found]
    if any(kind == "comment" or (kind == "word" and word.lower() == "select") for kind, word in tokens):
        raise DeclarationError(f"{where} must be a SQL condition without SELECT and comments. Received: {short(text)}")
    for kind, word in tokens:
        if kind == "word" and word.lower() in _PRESENT:
            raise DeclarationError(
                f"{where} must not depend on the present moment; a column of this name is written in double quotes. "
                f"Received: {word} in {short(text)}"
            )
    lower = ["", *(word.lower() if kind in ("word", "sign") else "\0" for kind, word in tokens), ""]
    # Whether each open parenthesis belongs to a call or to the list of IN; a bare column in one is an argument.
    arguments, betweens = [False], 0
    # First and last token of what is put between two texts, and these.
    edits: list[tuple[int, int, str, str]] = []
    for position, (kind, _) in enumerate(tokens, start=1):
        before, after = lower[position - 1], lower[position + 1]
        if lower[position] == "(":
            calls = position > 1 and tokens[position - 2][0] in ("word", "quoted") and before not in _WORDS
            name = before if before != "\0" else tokens[position - 2][1]
            if calls and name not in FUNCTIONS:
                raise DeclarationError(
                    f"{where} may only call functions of one row.{nearest_word(name, FUNCTIONS)} "
                    f"Received: {short(name)} in {short(text)}"
                )
            if calls and name in _PARTIAL:
                end = _closing(lower, position)
                edits.append((position - 2, end - 1, "nullif(", ", cast('nan' as double))"))
                if name in _OF_POSITIVE:
                    edits.append((position, end - 2, "nullif(", ", 0)"))
            arguments.append(calls or before == "in")
        elif lower[position] == ")" and len(arguments) > 1:
            arguments.pop()
        elif lower[position] in ("/", "%") and after != "/":
            edits.append((position, _operand_end(lower, position + 1) - 1, "nullif(", ", 0)"))
        betweens += lower[position] == "between"
        if lower[position] == "and" and betweens:
            # This `and` belongs to BETWEEN, and what follows is no operand of its own.
            betweens -= 1
            lower[position] = "between-and"
        operand = (kind == "word" and lower[position] not in {*_WORDS, "true", "false", "null"}) or kind == "quoted"
        left, right = position - 1, position + 1
        while operand and lower[left] == "(" and lower[right] == ")":
            # What is around the parentheses says what they are an operand of.
            left, right = left - 1, right + 1
        if (
            operand
            and len(tokens) > 1
            and not arguments[-1]
            and lower[left] in ("", "and", "or", "not", "(", "when")
            and lower[right] in ("", "and", "or", ")", "then")
        ):
            edits.append((position - 1, position - 1, "(", " <> 0)"))
    return _edited(text, found, edits, where)


def _closing(lower: list[str], position: int) -> int:
    """The position of the parenthesis that closes the one here, or of the last token."""
    depth = 0
    for end in range(position, len(lower) - 1):
        depth += (lower[end] == "(") - (lower[end] == ")")
        if not depth:
            return end
    return len(lower) - 2


def _operand_end(lower: list[str], position: int) -> int:
    """The position of the last token of the operand that starts here, or of the last token."""
    last = len(lower) - 2
    while position < last and lower[position] in ("+", "-"):
        position += 1
    if lower[position] == "case":
        depth = 0
        for end in range(position, last + 1):
            depth += (lower[end] == "case") - (lower[end] == "end")
            if not depth:
                position = end
                break
    elif lower[position] == "(":
        position = _closing(lower, position)
    elif position < last and lower[position + 1] == "(":
        position = _closing(lower, position + 1)
    while position + 2 < last and lower[position + 1] == lower[position + 2] == ":":
        position += 3
    return min(position, last)


def _edited(text: str, found: list[re.Match], edits: list[tuple[int, int, str, str]], where: str) -> str:
    """The text with something before the first and after the last of some tokens."""
    edits = [edit for edit in edits if 0 <= edit[0] <= edit[1] < len(found)]
    nested = [
        sum(first <= token <= last for first, last, left, _ in edits if left != "(") for token in range(len(found))
    ]
    if max(nested, default=0) > _MOST_NESTED:
        raise DeclarationError(
            f"{where} must have at most {_MOST_NESTED} divisions, logarithms and powers inside one another. "
            f"Received: {max(nested)} in {short(text)}"
        )
    before = [""] * len(found)
    after = [""] * len(found)
    # What is around more goes outside.
    for first, last, left, right in sorted(edits, key=lambda edit: edit[1] - edit[0]):
        before[first] = left + before[first]
        after[last] += right
    pieces, done = [], 0
    for match, left, right in zip(found, before, after, strict=True):
        pieces += [text[done : match.start()], left, match.group(), right]
        done = match.end()
    return "".join([*pieces, text[done:]])
