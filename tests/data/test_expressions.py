# SPDX-License-Identifier: Apache-2.0
"""Durations and SQL conditions of declarations."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvke_tf.data.expressions import FUNCTIONS, LONGEST, columns, condition, duration_ms, parts, value
from mvke_tf.errors import DeclarationError

FRAME = pl.DataFrame(
    {
        "click": [1, 0, None, 2],
        "price": [5.0, 1.5, 0.0, float("nan")],
        "device": ["tv", "", None, "phone"],
        "seen": [True, False, None, True],
        "event type": ["a", "b", "b", None],
        "order": [1, 0, 1, 0],
        "tags": [["x"], [], None, ["x", "y"]],
    }
).with_columns(pl.col("price").fill_nan(None))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1ms", 1),
        ("5s", 5_000),
        ("2m", 120_000),
        ("3h", 10_800_000),
        ("30d", 2_592_000_000),
        ("1w", 604_800_000),
        ("12 h", 43_200_000),
        ("366000d", LONGEST),
    ],
)
def test_duration(text, expected):
    assert duration_ms(text) == expected


@pytest.mark.parametrize(
    "text", ["", "30", "d", "0d", "-1d", "1.5h", "30 days", "1D", "366001d", "9" * 16 + "s", 30, None]
)
def test_wrong_duration(text):
    with pytest.raises(DeclarationError, match=r"`within` must be a duration .* such as \"30d\"") as error:
        duration_ms(text, "`within`")
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("click", [True, False, False, True]),
        ("seen", [True, False, False, True]),
        ("order", [True, False, True, False]),
        ("not click", [False, True, False, False]),
        ("click and price > 3", [True, False, False, False]),
        ("price >= 1.5 and (seen or click)", [True, False, False, False]),
        ("click or price = 0", [True, False, True, True]),
        ("price between 1 and 5 and click", [True, False, False, False]),
        ("price not between click and 2", [True, False, False, False]),
        ("device = 'tv'", [True, False, False, False]),
        ("device in ('tv', 'phone') and not order", [False, False, False, True]),
        ("device <> ''", [True, False, False, True]),
        ("device is null", [False, False, True, False]),
        ("device like 'p%'", [False, False, False, True]),
        ("length(device) > 0 and seen", [True, False, False, True]),
        ("\"event type\" = 'a'", [True, False, False, False]),
        ("`event type` = 'a' AND CLICK_ is null".replace("CLICK_", "device"), [False, False, False, False]),
        ("case when click then price > 2 else seen end", [True, False, False, False]),
        ("coalesce(click, 1) > 0", [True, False, True, True]),
        ("array_contains(tags, 'y')", [False, False, False, True]),
        ("price / 2 > 2.4e0", [True, False, False, False]),
        ("(((click)))", [True, False, False, True]),
    ],
)
def test_condition_holds_where_it_is_known_to_be_true(text, expected):
    assert FRAME.select(condition(text)).to_series().to_list() == expected


def test_words_in_texts_are_no_operands():
    frame = pl.DataFrame({"text": ["a and b", "it's"], "b": [1, 1]})
    assert frame.select(condition("text = 'a and b' and b")).to_series().to_list() == [True, False]
    assert frame.select(condition("text = 'it''s'")).to_series().to_list() == [False, True]


def test_value_keeps_unknown():
    frame = FRAME.select(a=value("click"), b=value("seen"), c=value("price >= 1.5"))
    assert frame["a"].to_list() == [1.0, 0.0, None, 2.0]
    assert frame["b"].to_list() == [1.0, 0.0, None, 1.0]
    assert frame["c"].to_list() == [1.0, 1.0, 0.0, None]
    assert frame.dtypes == [pl.Float64] * 3
    assert pl.DataFrame({"x": [1.0, float("nan")]}).select(value("x")).to_series().to_list() == [1.0, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("click", ("click",)),
        ("order", ("order",)),
        ("price between 1 and 2 and click", ("price", "click")),
        ('"event type" = 1 or device is null', ("event type", "device")),
        ("grün >= 4", ("grün",)),
    ],
)
def test_columns(text, expected):
    assert columns(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a column or a SQL condition"),
        ("  ", "a column or a SQL condition"),
        (None, "a column or a SQL condition"),
        (1, "a column or a SQL condition"),
        ("a" * 1_001 + " = 1", "at most 1,000 characters"),
        ("event type", "double quotes"),
        ("click and", "double quotes"),
        ("click; drop table log", "double quotes"),
        ("select click", "without SELECT"),
        ("(" * 400 + "click" + ")" * 400, "double quotes"),
        ("click = '\ud800'", "double quotes"),
        ("click, price", "double quotes"),
        ("1 = 1", "at least one column"),
        ('"^cl.*$" and seen', "at least one column"),
        ("click -- comment", "without SELECT and comments"),
        ("click /* comment */", "without SELECT and comments"),
        ("sum(click) > 3", "functions of one row"),
        ("count(*) > 3", "functions of one row"),
        ("click > (select 1)", "without SELECT"),
        ("row_number() over (order by click) > 1", "functions of one row"),
        ("first (click) = 1", "functions of one row"),
        ('"sum"(click) = 1', "functions of one row"),
        ("unnest(tags) = 'x'", "functions of one row"),
        ("lenght(device) > 1", r"Did you mean 'length'\?"),
    ],
)
def test_wrong_condition(text, reason):
    for function in (condition, value, columns):
        with pytest.raises(DeclarationError, match=reason) as error:
            function(text, "[tasks.buy] `where`")
        message = str(error.value)
        assert message.startswith("[tasks.buy] `where` ") and "Received: " in message
        assert "\n" not in message and len(message) < 500


WORDS = (
    "click price and or not between 1 0.5 'tv' \"event type\" ( ) , = <> >= in is null like case when then else end "
    "cast as int :: || * . - + round( lower( select from over [ ] ; ^ $ ~ ? : -> extract( year date interval true"
)


@given(st.lists(st.sampled_from(WORDS.split(" ")), max_size=12).map(" ".join) | st.text(max_size=30))
def test_any_text_is_a_condition_or_an_error_of_one_line(text):
    try:
        found = columns(text, "`where`")
    except DeclarationError as error:
        assert "\n" not in str(error)
    else:
        assert found and all(isinstance(name, str) for name in found)


def test_functions_depend_on_one_row_alone():
    """Every function gives a row the same value whether or not other rows are there."""
    frame = pl.DataFrame(
        {"n": [1.5, 2.5, 0.5], "s": ["2020-01-01", "2021-02-03", "2020-01-02"], "l": [[1], [2, 3], [4]]}
    )
    of_numbers = [
        "abs",
        "cbrt",
        "ceil",
        "ceiling",
        "exp",
        "floor",
        "ln",
        "log10",
        "log1p",
        "log2",
        "round",
        "sign",
        "sqrt",
    ]
    of_two = ["div", "greatest", "ifnull", "least", "mod", "nullif", "coalesce", "pow", "power"]
    of_texts = [
        "char_length",
        "character_length",
        "initcap",
        "length",
        "lower",
        "ltrim",
        "octet_length",
        "reverse",
        "rtrim",
        "trim",
        "upper",
        "date",
        "timestamp",
    ]
    of_lists = ["array_length", "array_mean", "array_sum"]
    other = {
        "array_contains": "(l, 1)",
        "array_get": "(l, 1)",
        "array_to_string": "(l, ',')",
        "cast": "(n as int)",
        "concat": "(s, 'x')",
        "concat_ws": "('-', s, 'x')",
        "date_part": "('year', date(s))",
        "ends_with": "(s, 'x')",
        "extract": "(year from date(s))",
        "if": "(n > 1, 1, 0)",
        "left": "(s, 1)",
        "log": "(n, 2)",
        "regexp_like": "(s, 'x')",
        "replace": "(s, '0', '1')",
        "right": "(s, 1)",
        "starts_with": "(s, 'x')",
        "strpos": "(s, '0')",
        "strptime": "(s, '%Y-%m-%d')",
        "substr": "(s, 1, 2)",
        "substring": "(s, 1, 2)",
        "try_cast": "(n as int)",
    }
    calls = {
        **dict.fromkeys(of_numbers, "(n)"),
        **dict.fromkeys(of_two, "(n, 2)"),
        **dict.fromkeys(of_texts, "(s)"),
        **dict.fromkeys(of_lists, "(l)"),
        **other,
    }
    assert set(calls) == FUNCTIONS
    for name, arguments in calls.items():
        expression = pl.sql_expr(name + arguments).alias("value")
        together = frame.select(expression)["value"].to_list()
        assert together == [frame[row : row + 1].select(expression)["value"].item() for row in range(3)], name


NUMBERS = pl.DataFrame({"a": [0.0, 1.0, 0.0, -1.0], "b": [0.0, 4.0, 2.0, 0.0], "i": [0, 1, 2, 0], "y": [1, 0, 1, 1]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a / b > 0.5", [None, False, False, None]),
        ("not (a / b > 0.2)", [None, False, True, None]),
        ("i % i >= 0", [None, True, True, None]),
        ("a / b::double > 0.2", [None, True, False, None]),
        ("a / - (b) < 0", [None, True, False, None]),
        ("y / case when b > 0 then b else 0 end > 0.3", [None, False, True, None]),
        ("ln(a) > -5", [None, True, None, None]),
        ("ln(a) - ln(a) >= 0", [None, True, None, None]),
        ("sqrt(a) > -1", [True, True, True, None]),
        ("power(a, 0.5) >= 0", [True, True, True, None]),
        ("a / b / i > -9", [None, True, True, None]),
        ("coalesce(a / b, 7) = 7", [True, False, False, True]),
        ("case when b <> 0 then a / b else 1 end = 1", [True, False, False, True]),
    ],
)
def test_what_has_no_value_is_unknown_and_not_larger_than_every_number(text, expected):
    assert NUMBERS.select(value(text)).to_series().to_list() == expected
    assert NUMBERS.select(condition(text)).to_series().to_list() == [flag is True for flag in expected]


def test_a_number_in_parentheses_is_no_condition():
    assert FRAME.select(condition("1 - (price) < -3")).to_series().to_list() == [True, False, False, False]
    assert FRAME.select(condition("((click)) and price")).to_series().to_list() == [True, False, False, False]


def test_divisions_inside_one_another_are_few():
    def nested(depth: int) -> str:
        return "a / (" * depth + "a" + ")" * depth

    assert NUMBERS.select(value(nested(8))).to_series().to_list() == [None, 1.0, None, 1 / -1]
    with pytest.raises(DeclarationError, match=r"`where` must have at most 8 divisions.*Received: 9 in"):
        value(nested(9), "`where`")


@pytest.mark.parametrize("word", ["current_date", "CURRENT_TIMESTAMP", "current_time", "localtime", "LocalTimestamp"])
def test_the_present_moment_is_no_value(word):
    with pytest.raises(DeclarationError, match=f"`label` must not depend on the present moment.*Received: {word} in"):
        condition(f"{word} > '2020-01-01' and click", "`label`")
    # A column may be called so.
    assert columns(f'"{word}" > 1 and click') == (word, "click")
    assert columns(word) == (word,)


def test_parts_of_an_expression():
    found = [sorted(set(part.meta.root_names())) for part in parts(value("click > 1 or device = 'tv'"))]
    assert found[-1] == ["click", "device"]
    assert ["click"] in found and ["device"] in found
    assert parts(pl.col("click")) == []
