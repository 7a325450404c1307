# SPDX-License-Identifier: Apache-2.0
"""Datasets that come with the package: a declaration each, and a program that makes their tables.

A dataset here is a package with one or more declarations (TOML) and two functions: `options(name)`, what a user can
choose, and `load(name, dataset, data_dir, given)`, which makes the tables on disk and returns the declaration that
reads them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvke_tf.config import nearest
from mvke_tf.datasets.options import Option, read_options
from mvke_tf.errors import DeclarationError
from mvke_tf.io import read_json

if TYPE_CHECKING:
    from mvke_tf.data.declaration import Dataset

# Name to the package and the declaration in it.
_BUILT_IN = {
    "movielens": ("movielens", "impressions.toml"),
    "movielens/ratings": ("movielens", "ratings.toml"),
    "adult": ("adult", "adult.toml"),
    "ads": ("ads", "ads.toml"),
}
DEFAULT = "movielens"


def names() -> tuple[str, ...]:
    """Names of the built-in datasets."""
    return tuple(_BUILT_IN)


def find(name_or_path: str | Path) -> Dataset:
    """A declaration, whether or not its tables are there.

    Args:
        name_or_path: Path of a declaration (it ends in `.toml`), of a run, which keeps the declaration of its data, or
            the name of a built-in dataset, as in `names`.

    Raises:
        DeclarationError: If there is no such dataset, or the declaration is wrong.
    """
    from mvke_tf.data.declaration import Dataset

    if _is_run(name_or_path):
        return _of_run(Path(name_or_path))
    if _is_path(name_or_path):
        return Dataset.from_toml(Path(name_or_path))
    package, file = _built_in(name_or_path)
    return Dataset.from_toml(Path(__file__).parent / package / file)


def options(name_or_path: str | Path) -> tuple[Option, ...]:
    """What a command line can offer for a dataset; nothing for one that is declared in a file.

    Raises:
        DeclarationError: If there is no such dataset.
    """
    if _is_path(name_or_path):
        return ()
    return _program(name_or_path).options(str(name_or_path))


def load(name_or_path: str | Path, data_dir: str | Path = Path("data"), **given: Any) -> Dataset:
    """A dataset whose tables are on disk.

    Those of a built-in dataset are made unless that has been done, in a folder of their own below `data_dir/tables`;
    after an error, or an interruption, there is none.

    Args:
        name_or_path: As in `find`.
        data_dir: Where raw files and tables are kept.
        **given: Options of the dataset, see `options`; None counts as not given.

    Raises:
        DeclarationError: If there is no such dataset or option, or a value is none.
        DataError: If the raw files cannot be had, or are damaged.
    """
    chosen = read_options(options(name_or_path), given, str(name_or_path))
    dataset = find(name_or_path)
    if _is_path(name_or_path):
        return dataset
    return _program(name_or_path).load(str(name_or_path), dataset, Path(data_dir), chosen)


def _of_run(folder: Path) -> Dataset:
    """The declaration that a run keeps in `dataset.json`; `data.json` says where its tables are."""
    from mvke_tf.data.declaration import Dataset

    values, data = (read_json(folder / name, DeclarationError) for name in ("dataset.json", "data.json"))
    source = data.get("source") if isinstance(data, dict) else None
    if not isinstance(source, str):
        raise DeclarationError(f"{folder / 'data.json'} is damaged: it does not say where the tables are.")
    return Dataset.from_dict(values, folder / source, where=str(folder / "dataset.json"))


def _is_path(name_or_path: str | Path) -> bool:
    return str(name_or_path).endswith(".toml") or _is_run(name_or_path)


def _is_run(name_or_path: str | Path) -> bool:
    return (Path(name_or_path) / "dataset.json").is_file()


def _built_in(name: str | Path) -> tuple[str, str]:
    if str(name) not in _BUILT_IN:
        hint = nearest(name, _BUILT_IN)
        if str(name).endswith((".csv", ".csv.gz", ".parquet")):
            hint = f" A table needs a declaration: `mvke init {name}` writes a draft of one."
        raise DeclarationError(
            f"There is no dataset {str(name)!r}.{hint} Expected a declaration (a file that ends in .toml) or one of "
            f"{', '.join(_BUILT_IN)}."
        )
    return _BUILT_IN[str(name)]


def _program(name: str | Path) -> Any:
    return importlib.import_module(f"{__name__}.{_built_in(name)[0]}")
