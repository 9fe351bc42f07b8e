"""Megatron's indices of a dataset (order of documents, samples, shuffling), cached on disk.

Megatron lets the first rank of the job write them and all others read, which fails where a node has a disk of
its own. Here one rank for each folder of each host writes, and a file appears whole or not at all: nodes with
disks of their own and nodes that share one are the same to it.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from helixpipe.data.index_file import PREPARE_AGAIN
from helixpipe.data.whole_file import write_whole
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
    indices: Any  # the documents: a range, where Megatron has an array

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """Megatron's sample.

        Raises:
            DataError: an id outside the vocabulary, which a large corpus may still have.
        """
        sample: dict[str, Any] = super().__getitem__(idx)
        for ids in (sample["tokens"], sample["labels"]):
            least, most = (int(found) for found in ids.aminmax())
            if least < 0 or most >= self.config.tokenizer.vocab_size:
                wrong, size = least if least < 0 else most, self.config.tokenizer.vocab_size
                raise DataError(
                    f"{self.dataset_path}.bin: sample {idx} has id {wrong}, outside the vocabulary of "
                    f"{size}: {PREPARE_AGAIN}"
                )
        return sample

    def _build_document_sample_shuffle_indices(self) -> Indices:
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}-"
        folder = Path(self.config.path_to_cache)
        paths = [folder / f"{base}{affix}" for affix in _AFFIXES]
        description = folder / f"{base}{_DESCRIPTION}"
        if not all(path.is_file() for path in (*paths, description)):
            for path, array in zip(paths, self._computed(), strict=True):
                write_whole(path, partial(_save_array, array=array))
            write_whole(description, partial(Path.write_text, data=self.unique_description, encoding="utf-8"))
        first, second, third = (_load_array(path) for path in paths)
        return first, second, third

    def _computed(self) -> Indices:
        """As Megatron computes them on any rank that has no cache."""
        shared, self.config = self.config, copy.copy(self.config)
        self.config.path_to_cache = ""
        documents = self.indices
        # Only now as an array, of 4 bytes for each.
        self.indices = np.arange(documents.start, documents.stop, dtype=np.int32)
        try:
            computed: Indices = super()._build_document_sample_shuffle_indices()
            return computed
        finally:
            self.config, self.indices = shared, documents


def build_datasets(
    config: GPTDatasetConfig, num_samples: Sequence[int | None], *, reads_data: bool
) -> list[CachedGPTDataset | None]:
    """The training, validation and test part of a dataset; collective over all ranks.

    Args:
        config: with one prefix in ``blend``, a ``split_matrix`` with None for parts that are not used, and
            the folder of the cache in ``path_to_cache``.
        num_samples: at least so many of each part; None for one epoch.
        reads_data: False on ranks that get None for every part.

    Raises:
        DataError: on all ranks, a cache that cannot be written or that is damaged.
    """
    (prefix,) = config.blend[0]

    def build() -> list[CachedGPTDataset | None]:
        whole = GPTDataset.build_low_level_dataset(prefix, config)
        count = GPTDataset.numel_low_level_dataset(whole)
        return [
            bounds
            and CachedGPTDataset(whole, prefix, documents_of_part(bounds, count), samples, part, config)
            for bounds, samples, part in zip(config.split_matrix, num_samples, Split, strict=True)
        ]

    folder = Path(config.path_to_cache)
    place, problem = _place_of(folder) if reads_data else (None, "")
    content = config.tokenizer.unique_identifiers["index"] if place is not None else ""
    told = _all_gather(_Told(place, problem, content))
    _raise_first(told)
    _refuse_other_copies(told)
    is_writer = place is not None and [rank.place for rank in told].index(place) == _rank()
    datasets, problem = _attempt(build, folder) if is_writer else (None, "")
    _raise_first(_all_gather(_Told(place, problem)))
    if not reads_data:
        return [None] * len(Split)
    return build() if datasets is None else datasets


class _Told(NamedTuple):
    """What a rank tells the others: host, device and number of its cache folder, or what is wrong with it.

    Then the hash of the index that it is about to read; empty if it reads none.
    """

    place: tuple[str, int, int] | None
    problem: str
    content: str = ""


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
    for rank, (_, problem, _) in enumerate(told):
        if problem:
            raise DataError(
                problem if len(told) == 1 else f"rank {rank} on {_host_of(told[rank])}: {problem}"
            )


def _refuse_other_copies(told: Sequence[_Told]) -> None:
    """``DataError`` where nodes have data of their own that differ: their samples would differ, too."""
    reading = [(rank, entry) for rank, entry in enumerate(told) if entry.content]
    for rank, entry in reading:
        first, other = reading[0]
        if entry.content != other.content:
            raise DataError(
                f"the data of rank {rank} on {_host_of(entry)} are not those of rank {first} on "
                f"{_host_of(other)}: copy one dataset to all nodes"
            )


def _host_of(told: _Told) -> str:
    return "its host" if told.place is None else told.place[0]


def documents_of_part(bounds: tuple[float, float], count: int) -> range:
    """The numbers of the documents of a part, rounded as Megatron rounds."""
    return range(*(round(bound * float(count)) for bound in bounds))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _all_gather(mine: _Told) -> list[_Told]:
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


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
