# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mvke_tf.datasets.movielens import read
from mvke_tf.datasets.movielens.read import (
    GENRES,
    ML_100K_COUNTS,
    OCCUPATIONS,
    Counts,
    MovieLens,
    detect,
    read_movielens,
)
from mvke_tf.errors import DataError
from tests.datasets.layouts import (
    GENRE_COLUMNS,
    larger_movielens,
    small_movielens,
    write_larger,
    write_original,
    write_recbole,
)

ORIGINAL, RECBOLE = "original", "recbole"


def assert_same(left: MovieLens, right: MovieLens) -> None:
    assert left.size == right.size
    assert_frame_equal(left.ratings, right.ratings)
    assert_frame_equal(left.items, right.items)
    if right.users is None:
        assert left.users is None
    else:
        assert_frame_equal(left.users, right.users)


def write_layout(folder: Path, layout: str) -> Path:
    return (write_original if layout == ORIGINAL else write_recbole)(folder, small_movielens())


def replace_line(path: Path, line: int, content: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = content
    path.write_bytes(b"\n".join(lines))


def test_both_layouts_give_the_frames_that_were_written(original_folder, recbole_folder):
    expected = small_movielens()
    assert_same(read_movielens(original_folder, None), expected)
    assert_same(read_movielens(recbole_folder, None), expected)


def test_dtypes(original_folder):
    data = read_movielens(original_folder, None)
    assert set(data.ratings.dtypes) == {pl.Int64}
    assert data.users.schema["user_id"] == data.users.schema["age"] == pl.Int64
    assert data.users["zip_code"].to_list() == ["85711", "T8H1N", "01002"]
    assert data.items.schema["release_year"] == pl.Int64
    assert data.items.schema["genres"] == pl.List(pl.String)


def test_genre_order():
    assert list(GENRES) == GENRE_COLUMNS


def test_recbole_genres_are_put_into_column_order(recbole_folder):
    replace_line(recbole_folder / "ml-100k.item", 2, b"1\tToy Story\t1995\tComedy Children's Animation")
    assert_same(read_movielens(recbole_folder, None), small_movielens())


@pytest.mark.parametrize("suffix", [".0", ".", ".000"])
def test_recbole_floats(tmp_path, suffix):
    write_recbole(tmp_path, small_movielens(), suffix)
    assert_same(read_movielens(tmp_path, None), small_movielens())


@pytest.mark.parametrize("layout", [ORIGINAL, RECBOLE])
def test_line_ends_and_blank_lines_at_the_end(tmp_path, layout):
    write_layout(tmp_path, layout)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n")
    assert_same(read_movielens(tmp_path, None), small_movielens())


@pytest.mark.parametrize(
    ("raw", "title", "year"),
    [
        ("Two  Friends   (1986) ", "Two Friends", 1986),
        ("Murder at 1600 (1997)", "Murder at 1600", 1997),
        ("2001 (1968) (1997) (TV)", "2001 (1968)", 1997),
        ("No Year", "No Year", None),
        ("(1995)", "(1995)", None),
    ],
)
def test_titles(original_folder, raw, title, year):
    path = original_folder / "u.item"
    first = path.read_bytes().split(b"\n")[0]
    replace_line(path, 1, first.replace(b"Toy Story (1995)", raw.encode()))
    item = read_movielens(original_folder, None).items.row(0, named=True)
    assert (item["title"], item["release_year"]) == (title, year)


def test_original_is_preferred_where_both_are_complete(original_folder):
    write_recbole(original_folder, small_movielens())
    (original_folder / "ml-100k.inter").write_text("not read")
    assert_same(read_movielens(original_folder, None), small_movielens())


def flags(*places: str) -> bytes:
    return "|".join(places).encode()


ONE_GENRE = ["0"] * 18 + ["1"]
# layout, file, line, what that line becomes, and what the message says was received and expected
BAD_LINES = {
    "three columns": (ORIGINAL, "u.data", 2, b"1\t267\t1", "received 3 columns; expected 4 columns separated by '\\t'"),
    "blank line": (ORIGINAL, "u.data", 2, b"", "received 1 columns; expected 4 columns"),
    "six columns": (ORIGINAL, "u.user", 3, b"3|7|M|student|0|1", "received 6 columns; expected 5 columns"),
    "23 columns": (ORIGINAL, "u.item", 1, flags("1", "A (1995)", "", "", *ONE_GENRE), "23 columns; expected 24"),
    "recbole columns": (RECBOLE, "ml-100k.inter", 3, b"1 267 1 5", "received 1 columns; expected 4 columns"),
    "user of a rating": (ORIGINAL, "u.data", 1, b"x\t1\t5\t8", "user_id 'x'; expected a whole number"),
    "item of a rating": (ORIGINAL, "u.data", 1, b"3\t\t5\t8", "item_id ''; expected a whole number"),
    "rating nan": (ORIGINAL, "u.data", 4, b"2\t543\tnan\t8", "rating 'nan'; expected a whole number"),
    "rating 3.0": (ORIGINAL, "u.data", 4, b"2\t543\t3.0\t8", "rating '3.0'; expected a whole number"),
    "rating 3.7": (RECBOLE, "ml-100k.inter", 5, b"2\t543\t3.7\t8", "rating '3.7'; expected a whole number"),
    "rating 1e400": (RECBOLE, "ml-100k.inter", 5, b"2\t543\t1e400\t8", "rating '1e400'; expected a whole number"),
    "rating inf": (RECBOLE, "ml-100k.inter", 5, b"2\t543\tinf\t8", "rating 'inf'; expected a whole number"),
    "rating 0": (ORIGINAL, "u.data", 5, b"3\t1635\t0\t8", "rating '0'; expected a rating from 1 to 5"),
    "rating 6.0": (RECBOLE, "ml-100k.inter", 2, b"3\t1\t6.0\t8", "rating '6.0'; expected a rating from 1 to 5"),
    "time": (ORIGINAL, "u.data", 3, b"1\t1412\t3\t-1", "timestamp '-1'; expected a whole number"),
    "time overflow": (ORIGINAL, "u.data", 3, b"1\t1412\t3\t9" + b"0" * 19, "expected a whole number of 1 to 18 digits"),
    "age": (ORIGINAL, "u.user", 2, b"2|old|F|other|T8H1N", "age 'old'; expected a whole number"),
    "user id": (RECBOLE, "ml-100k.user", 3, b"1e2\t53\tF\tother\tT8H1N", "user_id '1e2'; expected a whole number"),
    "item id": (RECBOLE, "ml-100k.item", 2, b"\tA\t1995\tDrama", "item_id ''; expected a whole number"),
    "no occupation": (ORIGINAL, "u.user", 2, b"2|53|F| |T8H1N", "occupation ' '; expected a text that is not empty"),
    "unknown user": (ORIGINAL, "u.data", 2, b"9\t267\t1\t8", "user_id '9'; expected a user of the user file"),
    "unknown item": (RECBOLE, "ml-100k.inter", 3, b"1\t9\t1\t8", "item_id '9'; expected an item of the item file"),
    "rated twice": (ORIGINAL, "u.data", 5, b"1\t1412\t3\t8", "user 1, item 1412 a second time; expected each user"),
    "user twice": (ORIGINAL, "u.user", 3, b"1|7|M|student|01002", "user_id '1'; expected each user_id once"),
    "item twice": (RECBOLE, "ml-100k.item", 3, b"1\tA\t1995\tDrama", "item_id '1'; expected each item_id once"),
    "genre flag": (
        *(ORIGINAL, "u.item", 1, flags("1", "A (1995)", "", "", "", "0", "2", *["0"] * 17)),
        "Action '2'; expected the genre flag 'Action' as 0 or 1",
    ),
    "no genre flag": (
        *(ORIGINAL, "u.item", 1, flags("1", "A (1995)", "", "", "", *["0"] * 19)),
        "received no genre flag that is 1; expected at least one genre",
    ),
    "no title": (ORIGINAL, "u.item", 1, flags("1", " ", "", "", "", *ONE_GENRE), "raw_title ' '; expected a text"),
    "genre": (RECBOLE, "ml-100k.item", 2, b"1\tA\t1995\tDrama Opera", "genres 'Drama Opera'; expected genres among"),
    "no genre": (RECBOLE, "ml-100k.item", 2, b"1\tA\t1995\t", "genres ''; expected a text that is not empty"),
    "year": (RECBOLE, "ml-100k.item", 2, b"1\tA\t95\tDrama", "year '95'; expected a year of 4 digits"),
    "header": (RECBOLE, "ml-100k.user", 1, b"user_id\tage", "the header 'user_id\\tage'; expected the header"),
    "not utf-8": (RECBOLE, "ml-100k.item", 5, b"543\tMis\xe9rables\t1995\tDrama", "bytes 0xe9 0x72; expected utf-8"),
    "not latin-1": (
        *(ORIGINAL, "u.item", 4, flags("543", "Misérables (1995)", "", "", "", *ONE_GENRE)),
        "bytes 0xc3 0xa9; expected latin-1 text",
    ),
    "binary": (ORIGINAL, "u.data", 2, b"1\t267\t\x00\x01\t8", "bytes 0x00 0x01; expected latin-1 text"),
}


@pytest.mark.parametrize(("layout", "name", "line", "content", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line(tmp_path, layout, name, line, content, message):
    write_layout(tmp_path, layout)
    replace_line(tmp_path / name, line, content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError) as raised:
        read_movielens(tmp_path, None)
    assert f"{tmp_path / name}, line {line}: received " in str(raised.value)
    assert message in str(raised.value)
    assert f"Correct that line, or replace {name} by the one of a fresh copy of ML-100K." in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["u.data", "u.user", "u.item"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_file(original_folder, name, content):
    (original_folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}, line 1: received an empty file; expected at least one row\. "):
        read_movielens(original_folder, None)


def test_only_a_header(recbole_folder):
    path = recbole_folder / "ml-100k.inter"
    path.write_bytes(path.read_bytes().split(b"\n")[0])
    with pytest.raises(DataError, match=r"ml-100k\.inter, line 2: received an empty file"):
        read_movielens(recbole_folder, None)


@pytest.mark.parametrize("name", ["u.data", "u.user", "u.item"])
def test_missing_file(original_folder, name):
    (original_folder / name).unlink()
    with pytest.raises(DataError) as raised:
        read_movielens(original_folder)
    assert f"{original_folder}: received a folder without {name}; expected" in str(raised.value)
    assert "Copy the missing files there" in str(raised.value)


def test_missing_recbole_file_and_missing_folder(recbole_folder, tmp_path):
    (recbole_folder / "ml-100k.user").unlink()
    with pytest.raises(DataError, match=r"a folder without ml-100k\.user; expected"):
        read_movielens(recbole_folder)
    with pytest.raises(DataError, match=r"received no such folder; expected .*name another folder"):
        read_movielens(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (Counts(6, 3, 8), r"u\.data, line 5: the file ends after 5 ratings; expected 6 ratings\. Replace u\.data"),
        (Counts(5, 2, 8), r"u\.user, line 3: the file ends after 3 users; expected 2 users"),
        (Counts(5, 3, 9), r"u\.item, line 8: the file ends after 8 items; expected 9 items.*expected_counts=None"),
        (ML_100K_COUNTS, r"u\.data, line 5: .* expected 100,000 ratings"),
    ],
)
def test_counts(original_folder, counts, message):
    with pytest.raises(DataError, match=message):
        read_movielens(original_folder, counts)
    read_movielens(original_folder, Counts(5, 3, 8))


@pytest.mark.slow
def test_real_movielens(movielens_folder, tmp_path):
    data = read_movielens(movielens_folder)
    assert (len(data.ratings), len(data.users), len(data.items)) == (100_000, 943, 1_682)
    assert data.ratings["rating"].mean() == pytest.approx(3.52986, abs=1e-12)
    assert data.ratings.row(0) == (196, 242, 3, 881250949)
    assert data.ratings["timestamp"].sum() == 88_352_885_148_862
    assert data.ratings["item_id"].sum() == 42_553_013
    assert (data.users["age"].min(), data.users["age"].max(), data.users["age"].sum()) == (7, 73, 32_111)
    assert data.users["occupation"].n_unique() == 21

    items = {item: rest for item, *rest in data.items.rows()}
    assert items[267] == ["unknown", None, ["unknown"]]
    title = "Land Before Time III: The Time of the Great Giving"
    assert items[1412] == [title, 1995, ["Animation", "Children's"]]
    assert items[543][0] == "Misérables, Les"
    assert items[1635] == ["Two Friends", 1986, ["Drama"]]
    assert items[242][1] == 1996  # by its title; its release date is in 1997
    assert data.items["release_year"].null_count() == 1
    assert data.items["genres"].list.len().sum() == 2_893

    assert_same(read_movielens(write_original(tmp_path / "original", data)), data)
    assert_same(read_movielens(write_recbole(tmp_path / "recbole", data, ".0")), data)


@pytest.mark.parametrize("size", ["1m", "10m", "20m-25m"])
@pytest.mark.parametrize("block", [1, 2**26])
def test_larger_sizes(tmp_path, monkeypatch, size, block):
    monkeypatch.setattr(read, "_BLOCK", block)
    data = larger_movielens(size)
    write_larger(tmp_path, data)
    assert detect(tmp_path)[0] == size
    assert_same(read_movielens(tmp_path), data)


@pytest.mark.parametrize(("years", "year"), [("1997-2003", 1997), ("2006\u20132007", 2006), ("2011- ", 2011)])
def test_years_of_a_series(tmp_path, years, year):
    write_larger(tmp_path, larger_movielens("20m-25m"))
    replace_line(tmp_path / "movies.csv", 2, f"1193,A Series ({years}),Drama".encode())
    assert read_movielens(tmp_path).items.row(0) == (1193, "A Series", year, ["Drama"])


def test_occupations_of_1m():
    assert len(OCCUPATIONS) == 21
    assert (OCCUPATIONS[0], OCCUPATIONS[10], OCCUPATIONS[20]) == ("other", "K-12 student", "writer")


def test_half_stars(tmp_path):
    write_larger(tmp_path, larger_movielens("20m-25m"))
    replace_line(tmp_path / "ratings.csv", 2, b"1,1193,0.5,978300760")
    assert read_movielens(tmp_path).ratings["rating"].to_list() == [0.5, 2.5, 3.5, 0.5]


STARS = "; expected a rating from 0.5 to 5 in steps of 0.5"
# size, file, line, what that line becomes, and what the message says was received and expected
BAD_LINES_OF_LARGER = {
    "one colon": (
        "1m",
        "ratings.dat",
        2,
        b"1:661:3:978302109",
        "received 1 columns; expected 4 columns separated by '::'",
    ),
    "rating 3.5 in 1m": ("1m", "ratings.dat", 2, b"1::661::3.5::8", "rating '3.5'; expected a whole number"),
    "user of 1m": ("1m", "ratings.dat", 1, b"9::661::3::8", "user_id '9'; expected a user of the user file"),
    "occupation": ("1m", "users.dat", 1, b"1::F::1::21::0", "occupation '21'; expected a number from 0 to 20"),
    "occupation in words": ("1m", "users.dat", 1, b"1::F::1::x::0", "occupation 'x'; expected a whole number"),
    "genre": ("1m", "movies.dat", 2, b"661::A (1995)::Opera", "genres 'Opera'; expected genres among unknown, Action"),
    "quarter": ("10m", "ratings.dat", 2, b"1::661::3.25::8", f"rating '3.25'{STARS}"),
    "no star": ("10m", "ratings.dat", 3, b"2::5::0::8", f"rating '0'{STARS}"),
    "six stars": ("20m-25m", "ratings.csv", 4, b"2,5,5.5,8", f"rating '5.5'{STARS}"),
    "header": ("20m-25m", "ratings.csv", 1, b"user,movie", "the header 'user,movie'; expected the header 'userId,"),
    "item": ("20m-25m", "ratings.csv", 5, b"2,12,1.0,8", "item_id '12'; expected an item of the item file"),
    "rated twice": ("20m-25m", "ratings.csv", 3, b"1,1193,1.0,8", "user 1, item 1193 a second time"),
    "open quote": (
        "20m-25m",
        "movies.csv",
        3,
        b'661,"A (1995),Drama',
        'the line 661,"A (1995),Drama; expected 3 columns',
    ),
    "bare comma": (
        "20m-25m",
        "movies.csv",
        3,
        b"661,A, The (1995),Drama",
        "the line 661,A, The (1995),Drama; expected",
    ),
}


@pytest.mark.parametrize(
    ("size", "name", "line", "content", "message"), BAD_LINES_OF_LARGER.values(), ids=BAD_LINES_OF_LARGER
)
@pytest.mark.parametrize("block", [1, 2**26])
def test_bad_line_of_larger_sizes(tmp_path, monkeypatch, block, size, name, line, content, message):
    monkeypatch.setattr(read, "_BLOCK", block)
    write_larger(tmp_path, larger_movielens(size))
    replace_line(tmp_path / name, line, content)
    with pytest.raises(DataError) as raised:
        read_movielens(tmp_path)
    assert f"{tmp_path / name}, line {line}: received " in str(raised.value)
    assert message.replace("\\", "") in str(raised.value)
    title = {"1m": "ML-1M", "10m": "ML-10M", "20m-25m": "ML-20M or ML-25M"}[size]
    assert str(raised.value).endswith(f"or replace {name} by the one of a fresh copy of {title}.")


@pytest.mark.parametrize(
    ("size", "without", "message"),
    [
        # It is not taken for 10M, which has no users.
        ("1m", "users.dat", "a folder without users.dat; expected"),
        ("10m", "movies.dat", "a folder without movies.dat; expected"),
        ("20m-25m", "movies.csv", "a folder without movies.csv; expected"),
    ],
)
def test_missing_file_of_larger_sizes(tmp_path, size, without, message):
    write_larger(tmp_path, larger_movielens(size))
    (tmp_path / without).unlink()
    with pytest.raises(DataError, match=message):
        read_movielens(tmp_path)
