"""Rows of datasets that Hugging Face's library ``datasets`` has saved to disk, by that library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from helixpipe.data.prepare.parquet import column_of

# Rows in memory at a time; a text may be long.
_ROWS = 256
# Files of a dataset's folder, and of one that holds several.
_FILES, _SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"


def is_saved_dataset(folder: str) -> bool:
    """Whether a folder is what ``Dataset.save_to_disk`` writes.

    Raises:
        ValueError: it holds several, of which one may be there for tests.
    """
    if os.path.isfile(os.path.join(folder, _SPLITS)):
        raise ValueError(f"{folder}: holds datasets for several uses: give the folder of one, like train")
    return all(os.path.isfile(os.path.join(folder, file)) for file in _FILES)


def size_of(folder: str) -> int:
    """Bytes of all files in it."""
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.is_file())


def read_rows(folder: str, keys: list[str]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each row as an object, with the share of the dataset that it is; files are mapped, not read at once.

    Args:
        folder: of the dataset.
        keys: names of the columns that are wanted, or of values within objects, like ``data.text``.

    Raises:
        ValueError: the library is missing, files are damaged or missing, or a key is not there.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f'{folder}: is a saved dataset, which needs datasets ({error}): pip install "helixpipe[hf]"'
        ) from error
    with _naming(folder):
        dataset = datasets.load_from_disk(folder).with_format(None)
    columns = [column_of(folder, key, dataset.column_names) for key in keys]
    batches = dataset.select_columns(columns).iter(batch_size=_ROWS)
    while True:
        with _naming(folder):
            batch = next(batches, None)
        if batch is None:
            return
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True)), 1.0 / len(dataset)


@contextmanager
def _naming(folder: str) -> Iterator[None]:
    """Say of damaged files where they are; what the libraries raise of these is of many types."""
    try:
        yield
    except (LookupError, OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, FileNotFoundError):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder}: its files are damaged ({reason}): save the dataset again") from error
