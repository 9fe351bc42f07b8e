"""What a checkpoint says of its job: the part that is not in shards, ours and Megatron-LM's.

Up to megatron-core 0.18 it is the file ``common.pt``, since 0.19 an object among the shards. Megatron-LM
pickles its whole ``args`` there, with whatever objects a script has put into them. They are read through
torch's restricted reader: a class that it does not know becomes a :class:`Placeholder`, which does nothing.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.safe_pickle import read_table

COMMON_FILE = "common.pt"
# Under which megatron-core 0.19 keeps it among the shards.
_COMMON_OBJECT = "common_state/shard_0_1"
_DOES_NOT_READ = "cannot be read; use another checkpoint"


class Placeholder:
    """Stands for an object of a class that is not built, and swallows what a pickle gives it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        """Forget it."""

    def __repr__(self) -> str:
        return f"<{', '.join(map(repr, self.arguments))}>"


def load_plain(stream: IO[bytes], **options: Any) -> Any:
    """``torch.load`` of plain data and tensors; ``pickle.UnpicklingError`` for what could run code.

    Args:
        stream: of what ``torch.save`` wrote.
        options: of ``torch.load``.
    """
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    stream.seek(0)
    stand_ins: list[Any] = [
        (Placeholder, name) for name in unknown if name != f"argparse.{argparse.Namespace.__name__}"
    ]
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
        return torch.load(stream, **{**options, "weights_only": True, "map_location": "cpu"})


def read_common(folder: Path) -> dict[str, Any]:
    """What the checkpoint in ``folder`` says of its job.

    Raises:
        DataError: it is not there, damaged, or more than plain data.
    """
    try:
        found: Any = load_plain(_open_common(folder))
    except pickle.UnpicklingError:
        raise DataError(f"{folder}: what it says of its job is more than plain data; do not use it") from None
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{folder}: what it says of its job {_DOES_NOT_READ} ({reason})") from None
    # As an object among shards it is one of a list.
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    if not isinstance(found, dict):
        raise DataError(f"{folder}: what it says of its job {_DOES_NOT_READ} (no dictionary)")
    return found


def arguments_in(common: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments in a common state, by name; empty if there are none."""
    args = common.get("args")
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else {}


def _open_common(folder: Path) -> IO[bytes]:
    path = folder / COMMON_FILE
    if path.exists():
        return path.open("rb")
    places = read_table(folder).storage_data or {}
    place = next((place for index, place in places.items() if index.fqn == _COMMON_OBJECT), None)
    if place is None or place.relative_path != Path(place.relative_path).name:
        raise KeyError(f"it has neither {COMMON_FILE} nor {_COMMON_OBJECT}")
    with (folder / place.relative_path).open("rb") as stream:
        stream.seek(place.offset)
        return io.BytesIO(stream.read(place.length))
