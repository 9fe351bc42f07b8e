"""Rows of Parquet files, by the library that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

# Rows in memory at a time; a text may be long.
_ROWS = 256


def read_rows(path: str, keys: list[str]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each row as an object, with the share of the file that it is.

    Args:
        path: of the file.
        keys: names of the columns that are wanted, or of values within objects, like ``data.text``.

    Raises:
        ValueError: the library is missing, the file is damaged, or a key is not there.
    """
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f'{path}: is Parquet, which needs pyarrow ({error}): pip install "helixpipe[hf]"'
        ) from error
    problems = import_module("pyarrow").ArrowException
    try:
        with parquet.ParquetFile(path) as file:
            columns = [column_of(path, key, file.schema_arrow.names) for key in keys]
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield row, 1.0 / file.metadata.num_rows
    except problems as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: its Parquet data are damaged ({reason}): copy the file again") from error


def column_of(path: str, key: str, names: list[str]) -> str:
    """The column that a key is, or is in.

    Args:
        path: of what has the columns, for messages.
        key: see :func:`read_rows`.
        names: of the columns.

    Raises:
        ValueError: none is.
    """
    for name in (key, key.partition(".")[0]):
        if name in names:
            return name
    shown = ", ".join(map(repr, names[:5])) or "none"
    raise ValueError(f"{path}: has no column {key!r} (columns: {shown}): set --json-key")
