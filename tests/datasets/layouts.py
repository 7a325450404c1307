# SPDX-License-Identifier: Apache-2.0
"""Writes MovieLens frames as files, in the layout of each size, with the quirks of the real ones."""

from pathlib import Path

import polars as pl

from mvke_tf.datasets.movielens.read import MovieLens

GENRE_COLUMNS = [
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
]
RELEASED_ON_VIDEO = 1412  # the one item whose title ends in "(1995) (V)"


def small_movielens() -> MovieLens:
    """A few users and items, among them every item whose line in the real files is unusual."""
    ratings = [
        (3, 1, 5, 881250949),
        (1, 267, 1, 881250950),
        (1, 1412, 3, 874724710),
        (2, 543, 4, 893286638),
        (3, 1635, 2, 881250949),
    ]
    users = [
        (1, 24, "M", "technician", "85711"),
        (2, 53, "F", "other", "T8H1N"),
        (3, 7, "M", "student", "01002"),
    ]
    items = [
        (1, "Toy Story", 1995, ["Animation", "Children's", "Comedy"]),
        (267, "unknown", None, ["unknown"]),
        (RELEASED_ON_VIDEO, "Land Before Time III: The Time of the Great Giving", 1995, ["Animation", "Children's"]),
        (543, "Misérables, Les", 1995, ["Drama", "Musical"]),
        (1373, "Good Morning", 1971, ["unknown"]),
        (1635, "Two Friends", 1986, ["Drama"]),
        (1005, "Double vie de Véronique, La (Double Life of Veronique, The)", 1991, ["Film-Noir", "Sci-Fi"]),
        (1353, '1-900 "Quoted" (A)', 1994, ["Romance"]),
    ]
    return MovieLens(
        ratings=pl.DataFrame(ratings, ["user_id", "item_id", "rating", "timestamp"], orient="row"),
        users=pl.DataFrame(users, ["user_id", "age", "gender", "occupation", "zip_code"], orient="row"),
        items=pl.DataFrame(items, ["item_id", "title", "release_year", "genres"], orient="row"),
    )


def larger_movielens(size: str) -> MovieLens:
    """A few rows in the words of 1M, 10M or of 20M and 25M."""
    halves = size != "1m"
    ratings = [(1, 1193, 5, 978300760), (1, 661, 3, 978302109), (2, 5, 4, 978298413), (2, 11, 1, 978220179)]
    if halves:
        ratings = [(user, item, rating - 0.5, time) for user, item, rating, time in ratings]
    users = [(1, 1, "F", "K-12 student", "48067"), (2, 56, "M", "self-employed", "70072-1234")]
    children = "Children" if halves else "Children's"
    items = [
        (1193, "One Flew Over the Cuckoo's Nest", 1975, ["Drama"]),
        (661, "James and the Giant Peach", 1996, ["Animation", children, "Musical"]),
        (5, "Misérables, Les", 1998, ["Drama", "IMAX"] if halves else ["Drama"]),
        (11, "American President, The", 1995, ["Comedy", "Drama", "Romance"]),
    ]
    if halves:
        items += [(131252, 'Forklift Driver "Klaus"', 2000, []), (79607, "Babylon 5", None, ["Sci-Fi"])]
    return MovieLens(
        ratings=pl.DataFrame(ratings, ["user_id", "item_id", "rating", "timestamp"], orient="row"),
        users=None
        if halves
        else pl.DataFrame(users, ["user_id", "age", "gender", "occupation", "zip_code"], orient="row"),
        items=pl.DataFrame(items, ["item_id", "title", "release_year", "genres"], orient="row"),
        size=size,
    )


def write_original(folder: Path, movielens: MovieLens) -> Path:
    """`u.data`, `u.user` and `u.item` as GroupLens writes them: no header, latin-1, flags for genres."""
    items = [_original_item(*row) for row in movielens.items.rows()]
    write_lines(folder / "u.data", _rows(movielens.ratings, "\t"), "latin-1")
    write_lines(folder / "u.user", _rows(movielens.users, "|"), "latin-1")
    write_lines(folder / "u.item", items, "latin-1")
    return folder


def write_recbole(folder: Path, movielens: MovieLens, number_suffix: str = "") -> Path:
    """`ml-100k.inter`, `.user`, `.item` as in the RecBole wheel. `number_suffix` may write ratings as `3.0`."""
    ratings = movielens.ratings.with_columns(pl.col("rating", "timestamp").cast(pl.String) + number_suffix)
    inter_header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    user_header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    item_header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    items = [_recbole_item(*row) for row in movielens.items.rows()]
    write_lines(folder / "ml-100k.inter", [inter_header, *_rows(ratings, "\t")], "utf-8")
    write_lines(folder / "ml-100k.user", [user_header, *_rows(movielens.users, "\t")], "utf-8")
    write_lines(folder / "ml-100k.item", [item_header, *items], "utf-8")
    return folder


def write_larger(folder: Path, movielens: MovieLens) -> Path:
    """1M: `ratings.dat`, `users.dat`, `movies.dat`; 10M: no users, but `tags.dat`; 20M and 25M: `.csv`."""
    titles = [
        (item, title if year is None else f"{title} ({year})", "|".join(genres) or "(no genres listed)")
        for item, title, year, genres in movielens.items.rows()
    ]
    if movielens.size == "20m-25m":
        items = [",".join([str(item), _quoted(title), genres]) for item, title, genres in titles]
        write_lines(
            folder / "ratings.csv", ["userId,movieId,rating,timestamp", *_rows(movielens.ratings, ",")], "utf-8"
        )
        write_lines(folder / "movies.csv", ["movieId,title,genres", *items], "utf-8")
        return folder
    encoding = "latin-1" if movielens.size == "1m" else "utf-8"
    ratings = movielens.ratings
    if movielens.size == "10m":
        # Whole ratings have no fraction in this one.
        ratings = ratings.with_columns(pl.col("rating").cast(pl.String).str.strip_suffix(".0"))
        write_lines(folder / "tags.dat", ["15::4973::excellent!::1215184630"], encoding)
    else:
        write_lines(folder / "users.dat", [_coded_user(*row) for row in movielens.users.rows()], encoding)
    write_lines(folder / "ratings.dat", _rows(ratings, "::"), encoding)
    write_lines(folder / "movies.dat", ["::".join(map(str, row)) for row in titles], encoding)
    return folder


def write_lines(path: Path, lines: list[str], encoding: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))


def _rows(frame: pl.DataFrame, separator: str) -> list[str]:
    return [separator.join(map(str, row)) for row in frame.rows()]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if "," in text or '"' in text else text


def _coded_user(user_id: int, age: int, gender: str, occupation: str, zip_code: str) -> str:
    code = {"K-12 student": 10, "self-employed": 16}[occupation]
    return "::".join(map(str, (user_id, gender, age, code, zip_code)))


def _original_item(item_id: int, title: str, year: int | None, genres: list[str]) -> str:
    flags = [str(int(genre in genres)) for genre in GENRE_COLUMNS]
    if year is None:
        return "|".join([str(item_id), title, "", "", "", *flags])
    on_video = " (V)" if item_id == RELEASED_ON_VIDEO else ""
    trailing = " " if item_id == 1635 else ""  # "Two Friends (1986) |"
    # The release date often lies in another year than the title says, so a reader must not take it from there.
    fields = [str(item_id), f"{title} ({year}){on_video}{trailing}", "4-Feb-1903", "", "http://us.imdb.com/Title"]
    return "|".join(fields + flags)


def _recbole_item(item_id: int, title: str, year: int | None, genres: list[str]) -> str:
    shown = str(year)
    if year is None:
        title, shown = "unkonwn", "unkonwn"
    elif item_id == RELEASED_ON_VIDEO:
        title, shown = f"{title} ({year})", "V"
    return "\t".join([str(item_id), title, shown, " ".join(genres)])
