"""Distributed checkpoints, written and read part by part, without a model and without other ranks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.pretrain.checkpoint.safe_pickle import read_table, tensors_in


class Part(NamedTuple):
    """A tensor of one layer, or of one expert in it, out of one that is stacked over them; or a whole tensor.

    Attributes:
        name: of the tensor in the checkpoint.
        place: numbers of the layer and the expert whose part it is; empty for a whole tensor.
        sizes: of how many.
        shape, dtype: of the part.
        produce: makes it.
    """

    name: str
    place: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: torch.Size
    dtype: torch.dtype
    produce: Callable[[], Tensor]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Its place in the tensor."""
        return _chunk(self.place, self.shape)

    @property
    def whole_shape(self) -> torch.Size:
        """Of the tensor."""
        return torch.Size((*self.sizes, *self.shape))


def _chunk(place: Sequence[int], shape: Sequence[int]) -> ChunkStorageMetadata:
    """Where a part lies, and how large it is, in dimensions of layers and experts and its own."""
    offsets, sizes = (*place, *(0 for _ in shape)), (*(1 for _ in place), *shape)
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def write_parts(folder: Path, parts: Sequence[Part]) -> None:
    """Write a checkpoint's tensors; each part is made when its turn comes and let go when it is written."""
    writer = _Writer(folder, single_file_per_rank=True, thread_count=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is wanted
        dcp.save({}, storage_writer=writer, planner=_PartPlanner(parts), no_dist=True)


class _Writer(dcp.FileSystemWriter):
    """Leaves the folder's name out of the table of contents, which then is plain data."""

    def storage_meta(self) -> StorageMeta:
        """See torch's writer."""
        return StorageMeta()


class _PartPlanner(dcp.DefaultSavePlanner):
    """A plan to save what does not exist yet."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts = {(part.name, part.chunk.offsets): part for part in parts}

    def create_local_plan(self) -> SavePlan:
        """See torch's planner."""
        items = []
        for part in self._parts.values():
            data = TensorWriteData(part.chunk, TensorProperties(dtype=part.dtype), part.whole_shape)
            index = MetadataIndex(part.name, part.chunk.offsets)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """See torch's planner."""
        offset = write_item.index.offset
        assert offset is not None
        part = self._parts[write_item.index.fqn, offset]
        tensor = part.produce()
        assert (tensor.shape, tensor.dtype) == (part.shape, part.dtype), part.name
        return tensor.contiguous().reshape(part.chunk.sizes)


class CheckpointReader:
    """Reads a checkpoint part by part, whatever layout it was saved from.

    Args:
        folder: of the checkpoint. Its table of contents must have been found to be plain data.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        table = read_table(folder)
        self._tensors = tensors_in(table)
        self._reader = dcp.FileSystemReader(folder)
        self._reader.set_up_storage_reader(table, is_coordinator=True)

    def describe(self, name: str) -> TensorStorageMetadata | None:
        """Size and type of a tensor; None if there is none of this name."""
        return self._tensors.get(name)

    def read(self, name: str, place: tuple[int, ...]) -> Tensor:
        """A layer's tensor, or an expert's, out of one that is stacked over them; or a whole tensor."""
        saved = self._tensors[name]
        into = torch.empty(saved.size[len(place) :], dtype=saved.properties.dtype)
        chunk = _chunk(place, into.shape)
        items = create_read_items_for_chunk_list(name, saved, [chunk])
        planner = _IntoTensor(into.view(chunk.sizes))
        self._reader.read_data(LoadPlan(items), planner).wait()
        if planner.missing:
            raise ValueError(f"{self._folder} holds {name} in part only; use another checkpoint")
        return into


class _IntoTensor(LoadPlanner):
    """Gathers what is read in one tensor."""

    def __init__(self, into: Tensor) -> None:
        self._into = into
        self.missing = into.numel()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """See torch's planner."""
        target = self._into
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """See torch's planner."""
        self.missing -= tensor.numel()

    def set_up_planner(self, *arguments: Any, **named: Any) -> None:
        """Nothing: the plan is there already."""

    def create_local_plan(self) -> LoadPlan:
        """Not called."""
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Not called."""
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Not called."""
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Not called."""
        raise NotImplementedError
