"""Read torch's checkpoint files without ever running code from them.

torch.distributed.checkpoint stores its table of contents as a pickle, and a pickle may name any function to
be called. Here only the names that such a table really holds are found.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from helixpipe.contact_points import replace

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
    for name, read in ((".metadata", _read_places), ("common.pt", _read_common)):
        try:
            read(folder)
        except Exception as error:  # a damaged pickle may raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return f"{folder / name} holds more than plain data; do not use it ({reason})"
    return ""


def read_table(folder: Path) -> Any:
    """The table of contents of a checkpoint, a ``torch.distributed.checkpoint.metadata.Metadata``."""
    with (folder / ".metadata").open("rb") as stream:
        return _SafePickle.load(stream)


def _read_places(folder: Path) -> None:
    for place in (getattr(read_table(folder), "storage_data", None) or {}).values():
        name = place.relative_path
        if name != Path(name).name or not (folder / name).is_file():
            raise ValueError(f"it names {name!r}, which is not a file of this folder")


def _read_common(folder: Path) -> None:
    torch.load(folder / "common.pt", map_location="cpu", weights_only=True)


@contextmanager
def no_code_from_disk() -> Iterator[None]:
    """Inside, torch's checkpoint reader and ``torch.load`` build plain data only, and raise for the rest."""
    load = torch.load
    with ExitStack() as undone:
        undone.callback(replace("torch.distributed.checkpoint.filesystem", "pickle", _SafePickle))
        plain = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": True})  # noqa: E731
        undone.callback(replace("torch", "load", plain))
        yield
