"""Writes MovieLens frames as files, in the original and in the RecBole layout, with the quirks of the real ones."""

from pathlib import Path

import pandas as pd

from mvke_tf.data.movielens import MovieLens

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
        (1, "Toy Story", 1995, ("Animation", "Children's", "Comedy")),
        (267, "unknown", None, ("unknown",)),
        (RELEASED_ON_VIDEO, "Land Before Time III: The Time of the Great Giving", 1995, ("Animation", "Children's")),
        (543, "Misérables, Les", 1995, ("Drama", "Musical")),
        (1373, "Good Morning", 1971, ("unknown",)),
        (1635, "Two Friends", 1986, ("Drama",)),
        (1005, "Double vie de Véronique, La (Double Life of Veronique, The)", 1991, ("Film-Noir", "Sci-Fi")),
        (1353, '1-900 "Quoted" (A)', 1994, ("Romance",)),
    ]
    item_frame = pd.DataFrame(items, columns=["item_id", "title", "release_year", "genres"])
    return MovieLens(
        ratings=pd.DataFrame(ratings, columns=["user_id", "item_id", "rating", "timestamp"]),
        users=pd.DataFrame(users, columns=["user_id", "age", "gender", "occupation", "zip_code"]),
        items=item_frame.astype({"release_year": "Int64"}),
    )


def write_original(folder: Path, movielens: MovieLens) -> Path:
    """`u.data`, `u.user` and `u.item` as GroupLens writes them: no header, latin-1, flags for genres."""
    items = [_original_item(*row) for row in movielens.items.itertuples(index=False)]
    _write(folder / "u.data", _rows(movielens.ratings, "\t"), "latin-1")
    _write(folder / "u.user", _rows(movielens.users, "|"), "latin-1")
    _write(folder / "u.item", items, "latin-1")
    return folder


def write_recbole(folder: Path, movielens: MovieLens, number_suffix: str = "") -> Path:
    """`ml-100k.inter`, `.user`, `.item` as in the RecBole wheel. `number_suffix` may write ratings as `3.0`."""
    ratings = movielens.ratings.astype(str)
    ratings[["rating", "timestamp"]] += number_suffix
    inter_header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    user_header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    item_header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    items = [_recbole_item(*row) for row in movielens.items.itertuples(index=False)]
    _write(folder / "ml-100k.inter", [inter_header, *_rows(ratings, "\t")], "utf-8")
    _write(folder / "ml-100k.user", [user_header, *_rows(movielens.users, "\t")], "utf-8")
    _write(folder / "ml-100k.item", [item_header, *items], "utf-8")
    return folder


def _rows(frame: pd.DataFrame, separator: str) -> list[str]:
    return [separator.join(map(str, row)) for row in frame.itertuples(index=False)]


def _write(path: Path, lines: list[str], encoding: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))


def _original_item(item_id: int, title: str, year: object, genres: tuple[str, ...]) -> str:
    flags = [str(int(genre in genres)) for genre in GENRE_COLUMNS]
    if pd.isna(year):
        return "|".join([str(item_id), title, "", "", "", *flags])
    on_video = " (V)" if item_id == RELEASED_ON_VIDEO else ""
    trailing = " " if item_id == 1635 else ""  # "Two Friends (1986) |"
    # The release date often lies in another year than the title says, so a reader must not take it from there.
    fields = [str(item_id), f"{title} ({year}){on_video}{trailing}", "4-Feb-1903", "", "http://us.imdb.com/Title"]
    return "|".join(fields + flags)


def _recbole_item(item_id: int, title: str, year: object, genres: tuple[str, ...]) -> str:
    if pd.isna(year):
        title, year = "unkonwn", "unkonwn"
    elif item_id == RELEASED_ON_VIDEO:
        title, year = f"{title} ({year})", "V"
    return "\t".join([str(item_id), title, str(year), " ".join(genres)])
