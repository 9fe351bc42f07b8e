"""Read torch's checkpoint files without ever running code from them.

torch.distributed.checkpoint stores its table of contents as a pickle, and a pickle may name any function to
be called. Here only the names that such a table really holds are found.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from helixpipe.contact_points import replace

# What a checkpoint says of its job: a file, and since megatron-core 0.19 an object among the shards.
COMMON_FILE, _COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
# In which Megatron-LM keeps its arguments there.
MegatronArguments = argparse.Namespace
_load = torch.load

# Classes without side effects, and torch's own types.
_KNOWN = {
    "torch": {
        "Size",
        "device",
        *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    },
    "torch.serialization": {"_get_layout"},
    # Where torch itself has saved it.
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _SafePickle:
    """Takes the place of the pickle module where checkpoints are read."""

    dump = staticmethod(pickle.dump)
    dumps = staticmethod(pickle.dumps)

    @staticmethod
    def load(stream: IO[bytes]) -> Any:
        return _Unpickler(stream).load()


def find_unsafe_content(folder: Path) -> str:
    """What in a checkpoint's pickles is more than plain data, or no pickle at all; empty if nothing is.

    A table of contents may also lead torch to files outside of the folder.
    """
    path = folder / ".metadata"
    try:
        _read_places(folder)
        path = folder / COMMON_FILE
        path = _place_of_common(folder).path
        _read_common(folder)
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{path} holds more than plain data; do not use it ({reason})"
    return ""


def read_table(folder: Path) -> Any:
    """The table of contents of a checkpoint, a ``torch.distributed.checkpoint.metadata.Metadata``."""
    with (folder / ".metadata").open("rb") as stream:
        return _SafePickle.load(stream)


def tensors_in(table: Any) -> dict[str, TensorStorageMetadata]:
    """The tensors of a table of contents, which names other objects, too."""
    found = table.state_dict_metadata.items()
    return {name: value for name, value in found if isinstance(value, TensorStorageMetadata)}


def _read_places(folder: Path) -> None:
    for place in (getattr(read_table(folder), "storage_data", None) or {}).values():
        name = place.relative_path
        if name != Path(name).name or not (folder / name).is_file():
            raise ValueError(f"it names {name!r}, which is not a file of this folder")


def open_common(folder: Path) -> IO[bytes]:
    """What a checkpoint says of its job, as ``torch.save`` wrote it.

    Raises:
        OSError, KeyError: it is not there.
    """
    place = _place_of_common(folder)
    with place.path.open("rb") as stream:
        stream.seek(place.offset)
        return io.BytesIO(stream.read(place.length))


class _Place(NamedTuple):
    """Bytes of a file: ``length`` from ``offset`` on, all the rest of it if that is None."""

    path: Path
    offset: int = 0
    length: int | None = None


def _place_of_common(folder: Path) -> _Place:
    """``KeyError`` if it is not there."""
    path = folder / COMMON_FILE
    if path.exists():
        return _Place(path)
    places = read_table(folder).storage_data or {}
    place = next((place for index, place in places.items() if index.fqn == _COMMON_OBJECT), None)
    if place is None or place.relative_path != Path(place.relative_path).name:
        raise KeyError(f"neither {COMMON_FILE} nor {_COMMON_OBJECT} is there")
    return _Place(folder / place.relative_path, place.offset, place.length)


def _read_common(folder: Path) -> None:
    with open_common(folder) as stream:
        load_plain(stream)


def load_plain(source: Any, **options: Any) -> Any:
    """``torch.load`` of plain data, tensors and options; ``pickle.UnpicklingError`` for all else."""
    with torch.serialization.safe_globals([MegatronArguments]):
        return _load(source, **{**options, "weights_only": True, "map_location": "cpu"})


@contextmanager
def no_code_from_disk(load: Callable[..., Any] = load_plain) -> Iterator[None]:
    """Inside, torch's checkpoint reader builds plain data only, and raises for the rest.

    Args:
        load: takes the place of ``torch.load``.
    """
    with ExitStack() as undone:
        undone.callback(replace("torch.distributed.checkpoint.filesystem", "pickle", _SafePickle))
        undone.callback(replace("torch", "load", load))
        yield
