# SPDX-License-Identifier: Apache-2.0
"""Drafts of declarations, guessed from tables."""

import datetime
import gzip
import tomllib

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mvke_tf.data.check import check
from mvke_tf.data.declaration import Dataset, History
from mvke_tf.data.draft import draft
from mvke_tf.data.preparation import prepare
from mvke_tf.errors import DataError, DeclarationError


def ad_log(rows: int = 5_000, users: int = 400, ads: int = 150) -> pl.DataFrame:
    """A log of ad impressions with everything that a draft tells apart."""
    random = np.random.default_rng(0)
    user, ad = random.integers(0, users, rows), random.integers(0, ads, rows)
    words = np.array(["sport", "news", "travel", "food", "tech", "home"])
    tags = ["|".join(f"{t}:{random.random():.2f}" for t in words[random.random(6) < 0.4]) for _ in range(users)]
    categories = ["|".join(random.choice(words, random.integers(1, 4), replace=False)) for _ in range(ads)]
    click = (random.random(rows) < 0.3).astype(int)
    install = click * (random.random(rows) < 0.3)
    seconds = 1_795_132_800 + np.sort(random.integers(0, 30 * 86_400, rows))
    return pl.DataFrame(
        {
            "request_id": [f"r{row:06d}" for row in range(rows)],
            "ts": seconds,
            "user_id": user + 100_000,
            "age": np.where(random.random(users) < 0.1, -1, random.integers(18, 80, users))[user],
            "gender": random.choice(["f", "m"], users)[user],
            "tags": [tags[u] for u in user],
            "hour": seconds // 3_600 % 24,
            "slot": random.choice(["top", "side"], rows),
            "ad_id": [f"ad{a}" for a in ad],
            "ad_title": [f"Title of {a}" for a in ad],
            "categories": [categories[a] for a in ad],
            "bid": np.round(random.random(ads) * 5, 3)[ad],
            "click": click,
            "install": install,
            "revenue": np.where(install, np.round(random.lognormal(1, 1, rows), 2), 0),
            "country": ["DE"] * rows,
        }
    )


def drafted(table: pl.DataFrame, path, **options) -> Dataset:
    """The dataset that the draft of a table declares."""
    (table.write_parquet if path.suffix == ".parquet" else table.write_csv)(path, **options)
    toml = path.with_suffix(".toml")
    toml.write_text(draft(path), encoding="utf-8")
    return Dataset.from_toml(toml)


def test_ad_log_needs_no_edit(tmp_path):
    dataset = drafted(ad_log(), tmp_path / "ads.csv")
    assert dataset.source.path == ("ads.csv",) and (dataset.source.time, dataset.source.time_unit) == ("ts", "s")
    assert (dataset.keys.user, dataset.keys.item, dataset.keys.item_name) == ("user_id", "ad_id", "ad_title")
    assert dataset.split.by == "share_of_time"
    assert {feature.name: (feature.tower, feature.context, feature.encode) for feature in dataset.features} == {
        "user_id": ("user", False, "vocabulary"),
        "age": ("user", False, "buckets"),
        "gender": ("user", False, "vocabulary"),
        "tags": ("user", False, "vocabulary"),
        "click_share": ("user", False, "buckets"),
        "recent_items": ("user", False, None),
        "hour": ("user", True, "integer"),
        "slot": ("user", True, "vocabulary"),
        "ad_id": ("item", False, "vocabulary"),
        "categories": ("item", False, "vocabulary"),
        "bid": ("item", False, "buckets"),
    }
    assert dataset.feature("age").missing == (-1,) and dataset.feature("hour").bins == 24
    tags = dataset.feature("tags")
    assert (tags.length, tags.weighted, tags.keep) == (6, True, "heaviest")
    assert dataset.feature("categories").length == 3 and not dataset.feature("categories").weighted
    assert dataset.feature("recent_items").history == History(last="ad_id", where="click")
    assert dataset.feature("click_share").history == History(share="click")
    assert [(task.name, task.kind, task.given, task.where, task.transform) for task in dataset.tasks] == [
        ("click", "binary", None, None, None),
        ("install", "binary", "click", None, None),
        ("revenue", "regression", None, "install", "log1p"),
    ]


def test_guesses_and_what_is_not_read_are_said(tmp_path):
    ad_log().write_csv(tmp_path / "ads.csv")
    text = draft(tmp_path / "ads.csv")
    for line in (
        "# Draft of a declaration, made by `mvke init` from 5,000 rows of ads.csv.",
        'time_unit = "s"  # guess',
        'tower = "item"  # guess: all rows of one item have one value',
        "context = true  # guess: it changes from row to row of a user",
        'given = "click"  # guess: it is 1 only where click is 1',
        "#   request_id  nearly every row has a value of its own",
        "#   country     one value only: 'DE'",
    ):
        assert line in text.splitlines()
    assert 'time = "ts"  # guess: 2026-11-20 ' in text and " to 2026-12-19 " in text
    assert "[features.age]  # integers from -1 to 79, " in text and "[features.gender]  # 2 values such as " in text


def test_parquet_with_lists_vectors_and_timestamps(tmp_path):
    random = np.random.default_rng(1)
    table = ad_log(2_000).with_columns(
        pl.from_epoch("ts"),
        pl.col("categories").str.split("|"),
        pl.Series("embedding", random.random((2_000, 4))),
        pl.col("click").cast(pl.Boolean),
        pl.Series("topics", [["a", "b"][: 1 + row % 2] for row in range(2_000)]),
        pl.Series("topics_weight", [[0.5, 0.25][: 1 + row % 2] for row in range(2_000)]),
        pl.Series("signup_date", [datetime.date(2020, 1, 1 + row % 28) for row in range(2_000)]),
        pl.Series("nothing", [None] * 2_000),
        pl.Series("structs", [{"a": row} for row in range(2_000)]),
    )
    dataset = drafted(table.drop("tags"), tmp_path / "ads.parquet")
    assert dataset.source.time == "ts" and dataset.task_names == ("click", "install", "revenue")
    assert dataset.feature("embedding").encode == "vector" and dataset.feature("embedding").width == 4
    assert dataset.feature("categories").length == 3
    topics = dataset.feature("topics")
    assert (topics.weights, topics.length, topics.keep) == ("topics_weight", 2, "heaviest")
    text = (tmp_path / "ads.toml").read_text()
    assert "time_unit" not in text
    for column, why in (
        ("nothing", "nothing but unknown values"),
        ("structs", "no encoding for values of type Struct"),
        ("signup_date", "no encoding for moments"),
    ):
        assert any(line.startswith(f"#   {column} ") and why in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("kind", "far"),
    [
        (pl.Date, [2**30, -(2**30), -800_000]),
        (pl.Datetime("ms"), [2**62, -(2**62), 10**15]),
        (pl.Datetime("us", "UTC"), [2**62, -(2**62), 10**18]),
        (pl.Datetime("ns"), []),
    ],
)
def test_moments_of_years_that_python_does_not_have(tmp_path, kind, far):
    rows = 300
    moments = pl.Series([datetime.date(2026, 1, 1 + row % 28) for row in range(rows)]).cast(kind)
    moments = pl.concat([pl.Series(far, dtype=pl.Int64).cast(moments.to_physical().dtype).cast(kind), moments])[:rows]
    table = pl.DataFrame({"time": moments, "kind": ["a", "b", "c"] * (rows // 3), "click": [0, 1] * (rows // 2)})
    table.write_parquet(tmp_path / "log.parquet")
    text = draft(tmp_path / "log.parquet")
    # Rows without a moment have no place in time.
    found = next(line for line in text.splitlines() if line.startswith("#   time  " if far else "time = "))
    assert found.startswith("#   time  moments from 2026-01-01" if far else 'time = "time"  # guess: 2026-01-01')
    assert (", 1.0% unknown; no encoding for moments" in found) == bool(far)
    nowhere = pl.Series(far or [None], dtype=pl.Int64).cast(moments.to_physical().dtype).cast(kind)[:1]
    table.with_columns(nowhere.new_from_index(0, rows).alias("time")).write_parquet(tmp_path / "log.parquet")
    text = draft(tmp_path / "log.parquet")
    assert "time = " not in text and "#   time  nothing but unknown values" in text


def test_table_without_keys_and_time(tmp_path):
    """Such as a census: every row is a user of its own, and the label is one of two words."""
    random = np.random.default_rng(2)
    rows = 600
    table = pl.DataFrame(
        {
            "age": random.integers(17, 90, rows),
            "work class": random.choice(["Private", "Self-emp", "?"], rows),
            "hours-per-week": random.integers(1, 99, rows),
            "income": random.choice(["<=50K", ">50K"], rows, p=[0.75, 0.25]),
        }
    )
    dataset = drafted(table, tmp_path / "adult.csv")
    assert dataset.keys.user is None and dataset.keys.item is None and dataset.split.by == "random"
    assert dataset.source.null == ("?",)
    assert dataset.task("income").label == "income = '>50K'"
    assert [(feature.name, feature.source_column, feature.context) for feature in dataset.features] == [
        ("age", "age", False),
        ("work_class", "work class", False),
        ("hours_per_week", "hours-per-week", False),
    ]


def test_grades_become_two_tasks(tmp_path):
    random = np.random.default_rng(3)
    rows = 2_000
    table = pl.DataFrame(
        {
            "userId": random.integers(0, 100, rows),
            "movieId": random.integers(0, 80, rows),
            "rating": random.choice([1, 2, 3, 4, 5], rows, p=[0.1, 0.1, 0.2, 0.4, 0.2]),
            "timestamp": 900_000_000_000 + random.integers(0, 10**9, rows),
        }
    )
    dataset = drafted(table, tmp_path / "ratings.csv")
    assert (dataset.keys.user, dataset.keys.item) == ("userId", "movieId")
    assert (dataset.source.time, dataset.source.time_unit) == ("timestamp", "ms")
    assert [(task.name, task.kind, task.label, task.default) for task in dataset.tasks] == [
        ("high_rating", "binary", "rating >= 4", True),
        ("rating", "regression", "rating", False),
    ]
    assert "rating" not in [feature.source_column for feature in dataset.features]


def recipes(rows: int = 2_000) -> pl.DataFrame:
    """Recipes that are shown: `saved` and `seconds` come with `viewed` only, `stars` are known of some viewed rows."""
    random = np.random.default_rng(0)
    viewed = random.random(rows) < 0.4
    recipe = random.integers(0, 60, rows)
    return pl.DataFrame(
        {
            "customer": [f"c{number}" for number in random.integers(0, 100, rows)],
            "recipe_id": [f"R-{number}" for number in recipe],
            "recipe_title": [f"Salad {number % 50}" for number in recipe],
            "minutes": [str(5 + number) for number in recipe],
            "placement": random.choice(["top", "side"], rows),
            "viewed": viewed.astype(int),
            "saved": (viewed & (random.random(rows) < 0.5)).astype(int),
            "seconds": np.where(viewed, random.integers(1, 300, rows), 0),
            "coupon": ["taken" if one else None for one in viewed & (random.random(rows) < 0.3)],
            "stars": np.where(viewed & (random.random(rows) < 0.3), random.integers(1, 6, rows), np.nan),
        }
    )


def test_what_comes_with_an_event_only_is_no_feature(tmp_path):
    table = recipes()
    dataset = drafted(table, tmp_path / "recipes.csv")
    text = (tmp_path / "recipes.toml").read_text()
    assert dataset.keys.item_name == "recipe_title"
    assert [(task.name, task.given, task.objective) for task in dataset.tasks] == [
        ("viewed", None, "joint"),
        ("saved", "viewed", "joint"),
        # The label is unknown where nothing was viewed.
        ("high_stars", "viewed", "conditional"),
        ("stars", None, "joint"),
    ]
    sources = {feature.source_column for feature in dataset.features}
    assert not sources & {"viewed", "saved", "seconds", "coupon", "stars"} and {"placement", "minutes"} <= sources
    for column in ("seconds", "coupon"):
        assert f"#   {column:<7}  an outcome: it has a value only where viewed; as a feature it would give that" in text
    assert dataset.feature("minutes").encode == "buckets" and check(dataset).warnings == ()

    # And what a user declares all the same is noticed.
    changed = {
        "tasks.saved": None,
        "tasks.high_stars.objective": "joint",
        "features.saved": {"tower": "user", "context": True, "encode": "vocabulary"},
        "features.seconds": {"tower": "user", "context": True, "encode": "buckets", "bins": 4},
        "features.coupon": {"tower": "user", "context": True, "encode": "vocabulary"},
    }
    found = check(dataset.replace(changed)).warnings
    seen = {
        name: int(table.filter(pl.col(name).is_not_null() & (pl.col(name) != 0)).height)
        for name in ("saved", "seconds")
    }
    for place, condition in (
        ("saved", f"has a value other than 0, the label of [tasks.viewed] is always 1 ({seen['saved']:,} rows)"),
        ("seconds", f"has a value other than 0, the label of [tasks.viewed] is always 1 ({seen['seconds']:,} rows)"),
        ("coupon", "is known, the label of [tasks.viewed] is always 1"),
    ):
        assert any(line.startswith(f"[features.{place}]: where it {condition}") for line in found), found
    assert any(
        line.startswith("[tasks.high_stars]: the label is known only where that of 'viewed' is 1") for line in found
    )
    assert len([line for line in found if "outcome" in line]) == 3


def test_a_stray_text_among_numbers_is_named(tmp_path):
    table = recipes().with_columns(
        pl.when(pl.int_range(pl.len()) == 7).then(pl.lit("about 30")).otherwise("minutes").alias("minutes")
    )
    table.write_csv(tmp_path / "recipes.csv")
    text = draft(tmp_path / "recipes.csv")
    lines = text.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("[features.minutes]"))
    assert "# guess: a text, because of cells such as 'about 30'. Nearly all others are numbers" in "\n".join(
        lines[place : place + 5]
    )


def test_an_outcome_of_any_name_is_no_feature(tmp_path):
    """`viewed` would tell a model of `bought` what it is to predict; `mobile` is 1 in all rows of `liked` by chance."""
    random = np.random.default_rng(0)
    viewed = random.random(400) < 0.4
    bought = viewed & (random.random(400) < 0.5)
    gift = np.flatnonzero(bought)[:3]
    mobile = random.random(400) < 0.5
    mobile[gift] = True
    visits = pl.DataFrame(
        {
            "customer": random.integers(0, 40, 400),
            "product": random.integers(0, 30, 400),
            "mobile": mobile.astype(int),
            "viewed": viewed.astype(int),
            "bought": bought.astype(int),
            "liked": np.isin(np.arange(400), gift).astype(int),
        }
    )
    visits.write_csv(tmp_path / "visits.csv")
    text = draft(tmp_path / "visits.csv")
    (tmp_path / "visits.toml").write_text(text)
    dataset = Dataset.from_toml(tmp_path / "visits.toml")
    assert [(task.name, task.given) for task in dataset.tasks] == [
        *(("viewed", None), ("bought", "viewed"), ("liked", "bought"))
    ]
    assert "mobile" in {feature.source_column for feature in dataset.features}
    assert "viewed" not in {feature.source_column for feature in dataset.features}
    assert "# guess: an outcome: bought is 1 only where it is 1" in text

    visits.rename({"bought": "bought\x1f"}).write_csv(tmp_path / "strange.csv")
    text = draft(tmp_path / "strange.csv")
    assert "# guess: an outcome: bought\\u001f is 1 only where it is 1" in text
    assert list(tomllib.loads(text)["tasks"]) == ["viewed", "bought", "liked"]


def test_a_column_of_parts_splits(tmp_path):
    random = np.random.default_rng(4)
    table = pl.DataFrame(
        {
            "x": random.random(300),
            "fold": random.choice(["train", "valid", "test"], 300),
            "label": random.integers(0, 2, 300),
        }
    )
    dataset = drafted(table, tmp_path / "t.csv")
    assert dataset.split.by == "column" and dataset.split.column == "fold"
    assert (dataset.split.train, dataset.split.validation) == (("train",), ("valid",))
    assert [feature.name for feature in dataset.features] == ["x"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_delimiters_and_compression(tmp_path, delimiter):
    table = pl.DataFrame(
        {"x": [1.5, 2.5, 3.0] * 20, "tags": ["a,b", "b", "a"] * 20, "clicked": [True, False, True] * 20}
    )
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(table.write_csv(separator=delimiter).encode()))
    toml = tomllib.loads(draft(path))
    assert toml["source"] == {"path": "log.csv.gz", "delimiter": delimiter, "list_separator": ","}
    assert toml["features"]["tags"]["length"] == 2 and toml["tasks"]["clicked"]["label"] == "clicked"


def test_a_separator_that_is_the_delimiter_is_not_proposed(tmp_path):
    lists = ["red|blue", "blue|green", "green|red", "red|green"] * 50
    table = pl.DataFrame({"colours": lists, "click": [0, 1, 1, 0] * 50})
    table.write_csv(tmp_path / "log.csv", separator="|")
    assert "list_separator" not in draft(tmp_path / "log.csv")
    (tmp_path / "log.toml").write_text(draft(tmp_path / "log.csv"))
    assert not Dataset.from_toml(tmp_path / "log.toml").feature("colours").is_list


def test_huge_cardinalities_are_hashed(tmp_path):
    rows = 60_000
    random = np.random.default_rng(5)
    table = pl.DataFrame(
        {
            "user_id": np.arange(rows) % 30_000,
            "query": [f"q{value}" for value in random.integers(0, 55_000, rows)],
            "click": random.integers(0, 2, rows),
            "long": ["prose that has more than forty characters, number " + str(row % 50_000) for row in range(rows)],
        }
    )
    dataset = drafted(table, tmp_path / "log.parquet")
    assert dataset.feature("user_id").encode == "vocabulary" and dataset.feature("user_id").min_count == 5
    table = table.with_columns(pl.Series("page", [f"p{row % 52_000}" for row in range(rows)]))
    dataset = drafted(table, tmp_path / "log.parquet")
    assert (dataset.feature("page").encode, dataset.feature("page").bins) == ("hash", 1_000_000)
    assert "long" not in [feature.name for feature in dataset.features]


def test_only_the_first_rows_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("mvke_tf.data.draft.MOST_ROWS", 500)
    ad_log(1_000).write_csv(tmp_path / "ads.csv")
    assert "from the first 500 rows of ads.csv" in draft(tmp_path / "ads.csv")


def test_folder_of_the_declaration(tmp_path):
    (tmp_path / "log").mkdir()
    for part in range(2):
        ad_log(200).write_parquet(tmp_path / "log" / f"{part}.parquet")
    text = draft(tmp_path / "log", tmp_path / "elsewhere")
    assert tomllib.loads(text)["source"]["path"] == "../log" and "400 rows of log" in text
    assert Dataset.from_dict(tomllib.loads(text)).task_names == ("click", "install", "revenue")


def test_without_a_label_the_draft_says_what_to_edit(tmp_path):
    table = pl.DataFrame({"x": [0.5, 1.5, 2.5] * 20, "k": ["a", "b", "c"] * 20})
    table.write_csv(tmp_path / "t.csv")
    text = draft(tmp_path / "t.csv")
    assert "# EDIT FIRST, [tasks]: must be given." in text
    with pytest.raises(DeclarationError, match=r"\[tasks\]: must be given"):
        Dataset.from_dict(tomllib.loads(text))
    lines = text.replace("# [tasks.label]", "[tasks.label]").replace('# label = "k"', 'label = "x > 1"').splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("[features.x]"))
    end = next(number for number, line in enumerate(lines) if number > start and not line)
    assert Dataset.from_dict(tomllib.loads("\n".join(lines[:start] + lines[end:]))).task_names == ("label",)


def test_without_a_user_feature_the_draft_says_so(tmp_path):
    pl.DataFrame({"click": [0, 1] * 20}).write_csv(tmp_path / "t.csv")
    text = draft(tmp_path / "t.csv")
    assert "# EDIT FIRST, [features]: must be given." in text and "tasks" in tomllib.loads(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "there is no file .*missing.csv"),
        ("table.txt", b"a,b\n1,2\n", "table.txt must be a table whose name ends in .csv"),
        ("empty.csv", b"", "empty.csv is empty"),
        ("heads.csv", b"a,b\n", "heads.csv has no rows"),
        ("twice.csv", b"a,a\n1,2\n", "the column 'a' appears twice in the header"),
        ("broken.parquet", b"PAR1 no", "broken.parquet cannot be read as Parquet"),
        ("ragged.csv", b"a,b\n1,2,3\n", "line 2: expected 2 columns"),
        ("latin.csv", b"a,b\n\xe4,2\n", "expected UTF-8 text"),
        ("broken.csv.gz", b"\x1f\x8b no", "broken.csv.gz cannot be read"),
        ("wide.csv", b",".join(b"c%d" % i for i in range(2_001)) + b"\n", "Expected at most 2,000"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        draft(tmp_path / name)
    assert "\n" not in str(error.value)


NAMES = st.sampled_from(
    ["user_id", "item_id", "ts", "click", "label", "revenue", "rating", "x", "user_rows", "a b", "é", "1", "x_weights"]
) | st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1, max_size=6)
CELLS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "true", "NA", "a|b", "a:1|b:2", "1.5", "-1", "2026-11-20", "1795132800", '"', "\x7f", "'"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=5),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_table_has_a_draft(tmp_path, data):
    """The draft is a legal declaration, or says what to edit first; it is always TOML."""
    names = data.draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    rows = data.draw(st.integers(1, 30))
    table = pl.DataFrame(
        {
            name: data.draw(
                st.one_of(
                    st.lists(CELLS, min_size=rows, max_size=rows),
                    st.lists(st.sampled_from(["0", "1"]), min_size=rows, max_size=rows),
                    st.lists(st.integers(0, 3).map(str), min_size=rows, max_size=rows),
                )
            )
            for name in names
        }
    )
    path = tmp_path / "t.csv"
    table.write_csv(path, quote_style="always")
    try:
        text = draft(path)
    except DataError as error:
        assert "\n" not in str(error)
        return
    values = tomllib.loads(text)
    try:
        dataset = Dataset.from_dict(values)
    except DeclarationError as error:
        assert "# EDIT FIRST, " in text and ("[tasks]" in str(error) or "[features]" in str(error))
    else:
        assert set(feature.source_column for feature in dataset.features if feature.source_column) <= set(names)


def test_names_that_a_declaration_does_not_take_are_changed(tmp_path):
    rows = range(200)
    columns = {
        "user_id": [f"u{row % 20}" for row in rows],
        "item_id": [f"i{row % 7}" for row in rows],
        "k": [f"k{row % 3}" for row in rows],
        "self": [row % 4 for row in rows],
        "age_weights": [row % 8 for row in rows],
        "age": [row % 5 for row in rows],
        "Age": [f"a{row % 6}" for row in rows],
        "class": [f"c{row % 6}" for row in rows],
        "*": [f"s{row % 6}" for row in rows],
        "^.*$": [f"p{row % 6}" for row in rows],
        "click": [int(row % 3 == 0) for row in rows],
    }
    declared = drafted(pl.DataFrame(columns), tmp_path / "log.parquet")
    made = {feature.name: feature.source_column for feature in declared.features}
    renamed = {"k_2": "k", "self_2": "self", "age_2": "age", "Age_3": "Age", "class_2": "class"}
    assert renamed.items() <= made.items() and made["age_weights"] == "age_weights"
    # Names that Polars takes for patterns are left out, with a word.
    assert sorted(made.values()) == sorted(set(columns) - {"click", "*", "^.*$"})
    prepared = prepare(declared)
    for name, column in made.items():
        assert len(np.unique((prepared.users if name in prepared.users.raw else prepared.items).raw[name])) == len(
            set(columns[column])
        )


def test_lists_of_lists_are_left_out(tmp_path):
    rows = range(200)
    table = pl.DataFrame(
        {
            "user_id": [f"u{row % 20}" for row in rows],
            "item_id": [f"i{row % 7}" for row in rows],
            "nested": [[[row % 5]] for row in rows],
            "age": [row % 5 for row in rows],
            "click": [int(row % 3 == 0) for row in rows],
        }
    )
    declared = drafted(table, tmp_path / "log.parquet")
    assert {feature.name for feature in declared.features} == {"user_id", "item_id", "age"}
    assert "nested" in (tmp_path / "log.toml").read_text()


def test_a_table_of_one_day_is_not_split_by_time(tmp_path):
    rows = range(200)
    table = pl.DataFrame(
        {
            "user_id": [f"u{row % 20}" for row in rows],
            "item_id": [f"i{row % 7}" for row in rows],
            "day": [datetime.date(2026, 11, 1)] * 200,
            "age": [row % 5 for row in rows],
            "click": [int(row % 3 == 0) for row in rows],
        }
    )
    declared = drafted(table, tmp_path / "log.parquet")
    assert declared.split.by == "random"
    assert "has no row" not in check(declared).table()


def jobs(**names) -> pl.DataFrame:
    random = np.random.default_rng(0)
    user, item = random.integers(0, 200, 3_000), random.integers(0, 60, 3_000)
    columns = {
        "request": [f"r{row}" for row in range(3_000)],
        "user": [f"c{u}" for u in user],
        "item": item + 1_000,
        "age": random.integers(18, 65, 200)[user],
        "salary": np.round(random.random(60) * 1e5)[item],
        "opened": (random.random(3_000) < 0.3).astype(int),
    }
    return pl.DataFrame({names.get(name, name): values for name, values in columns.items()})


@pytest.mark.parametrize(
    ("user", "item"),
    [("Candidate ID", "Job Ad ID"), ("candidate_id", "job_id"), ("kunde_id", "anzeige_id"), ("user_id", "anzeige_id")],
)
def test_keys_of_any_name_that_ends_like_one(tmp_path, user, item):
    declared = drafted(jobs(request="request_id", user=user, item=item), tmp_path / "log.csv")
    assert (declared.keys.user, declared.keys.item) == (user, item)
    towers = {feature.source_column: feature.tower for feature in declared.features}
    assert towers["age"] == "user" and towers["salary"] == "item"


def test_a_draft_without_keys_says_what_is_the_matter(tmp_path):
    declared = drafted(jobs(user="wer", item="was"), tmp_path / "log.csv")
    assert declared.keys.user is None and declared.keys.item is None
    text = (tmp_path / "log.toml").read_text()
    assert "# guess: no column looks like the id of the user. If one is, name it: without, every row is" in text
    assert "# guess: no column looks like the id of the item. If one is, name it: without, no items" in text
    shown = check(declared).table()
    assert "Note: [keys] names no user: every row is a user of its own" in shown
    assert "Note: [keys] names no item: no items can be recommended." in shown
