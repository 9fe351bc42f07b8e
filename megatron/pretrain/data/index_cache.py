"""Megatron's indices of a dataset (order of documents, samples, shuffling), cached on disk.

Megatron lets the first rank of the job write them and all others read, which fails where a node has a disk of
its own. Here one rank for each folder of each host writes, and a file appears whole or not at all: nodes with
disks of their own and nodes that share one are the same to it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from helixpipe.reliability.exit_codes import DataError

Indices = tuple[np.ndarray, np.ndarray, np.ndarray]

_AFFIXES = ("document_index.npy", "sample_index.npy", "shuffle_index.npy")
# Written last: it says that the others are there.
_DESCRIPTION = "description.txt"


class CachedGPTDataset(GPTDataset):
    """Megatron's dataset, with indices that any rank may find missing, and make.

    Raises:
        DataError: a file in the cache that is damaged, or is no array of numbers.
        OSError: the indices are not there and cannot be written.
    """

    config: GPTDatasetConfig

    def _build_document_sample_shuffle_indices(self) -> Indices:
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}-"
        folder = Path(self.config.path_to_cache)
        paths = [folder / f"{base}{affix}" for affix in _AFFIXES]
        description = folder / f"{base}{_DESCRIPTION}"
        if not all(path.is_file() for path in (*paths, description)):
            for path, array in zip(paths, self._computed(), strict=True):
                _write_whole(path, partial(_save_array, array=array))
            _write_whole(
                description, partial(Path.write_text, data=self.unique_description, encoding="utf-8")
            )
        first, second, third = (_load_array(path) for path in paths)
        return first, second, third

    def _computed(self) -> Indices:
        """As Megatron computes them on any rank that has no cache."""
        shared, self.config = self.config, copy.copy(self.config)
        self.config.path_to_cache = ""
        try:
            computed: Indices = super()._build_document_sample_shuffle_indices()
            return computed
        finally:
            self.config = shared


def build_datasets(
    config: GPTDatasetConfig, num_samples: Sequence[int], *, reads_data: bool
) -> list[CachedGPTDataset | None]:
    """The training, validation and test part of a dataset; collective over all ranks.

    Args:
        config: with one prefix in ``blend``, a ``split_matrix`` with None for parts that are not used, and
            the folder of the cache in ``path_to_cache``.
        num_samples: at least so many of each part.
        reads_data: False on ranks that get None for every part.

    Raises:
        DataError: on all ranks, a cache that cannot be written or that is damaged.
    """
    (prefix,) = config.blend[0]

    def build() -> list[CachedGPTDataset | None]:
        whole = GPTDataset.build_low_level_dataset(prefix, config)
        count = GPTDataset.numel_low_level_dataset(whole)
        return [
            bounds and CachedGPTDataset(whole, prefix, _documents(bounds, count), samples, part, config)
            for bounds, samples, part in zip(config.split_matrix, num_samples, Split, strict=True)
        ]

    folder = Path(config.path_to_cache)
    place, problem = _place_of(folder) if reads_data else (None, "")
    told = _all_gather(_Told(place, problem))
    _raise_first(told)
    is_writer = place is not None and [rank.place for rank in told].index(place) == _rank()
    datasets, problem = _attempt(build, folder) if is_writer else (None, "")
    _raise_first(_all_gather(_Told(place, problem)))
    if not reads_data:
        return [None] * len(Split)
    return build() if datasets is None else datasets


class _Told(NamedTuple):
    """What a rank tells the others: host, device and number of its cache folder, or what is wrong with it."""

    place: tuple[str, int, int] | None
    problem: str


def _place_of(folder: Path) -> tuple[tuple[str, int, int] | None, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        return None, _not_written(folder, error)
    return (socket.gethostname(), found.st_dev, found.st_ino), ""


def _attempt(build: Callable[[], Any], folder: Path) -> tuple[Any, str]:
    try:
        return build(), ""
    except DataError as error:
        return None, str(error)
    except OSError as error:
        return None, _not_written(folder, error)


def _not_written(folder: Path, error: OSError) -> str:
    return (
        f"the index cache cannot be written to {folder} ({error.strerror}); give a --data-cache-path "
        "with room that may be written to"
    )


def _raise_first(told: Sequence[_Told]) -> None:
    for rank, (_, problem) in enumerate(told):
        if problem:
            raise DataError(
                problem if len(told) == 1 else f"rank {rank} on {_host_of(told[rank])}: {problem}"
            )


def _host_of(told: _Told) -> str:
    return "its host" if told.place is None else told.place[0]


def _documents(bounds: tuple[float, float], count: int) -> np.ndarray:
    """The numbers of the documents of a part, rounded as Megatron rounds."""
    first, last = (round(bound * float(count)) for bound in bounds)
    return np.arange(first, last, dtype=np.int32)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _all_gather(mine: _Told) -> list[_Told]:
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first: another node may write the same one, and others read it."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def _load_array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path} is not an index that was cached here ({reason}); remove it, it is made anew"
        ) from None
