"""What a checkpoint says of its job: the part that is not in shards, ours and Megatron-LM's.

Megatron-LM pickles its whole ``args`` there, with whatever objects a script has put into them. They are read
through torch's restricted reader: a class that it does not know becomes a :class:`Placeholder`, which does
nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.safe_pickle import MegatronArguments, load_plain, open_common


class Placeholder:
    """Stands for an object of a class that is not built, and swallows what a pickle gives it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        """Forget it."""

    def __repr__(self) -> str:
        return f"<{', '.join(map(repr, self.arguments))}>"


def load_with_placeholders(source: Any, **options: Any) -> Any:
    """``torch.load`` of plain data and tensors, and :class:`Placeholder` for objects of unknown classes.

    Args:
        source: a file that ``torch.save`` has written, or its path.
        options: of ``torch.load``.

    Raises:
        pickle.UnpicklingError: what could run code.
    """
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    if hasattr(source, "seek"):
        source.seek(0)
    known = f"{MegatronArguments.__module__}.{MegatronArguments.__qualname__}"
    stand_ins: list[Any] = [(Placeholder, name) for name in unknown if name != known]
    with torch.serialization.safe_globals(stand_ins):
        return load_plain(source, **options)


def read_common(folder: Path) -> dict[str, Any]:
    """What the checkpoint in ``folder`` says of its job.

    Raises:
        DataError: it is not there, damaged, or more than plain data.
    """
    try:
        with open_common(folder) as stream:
            found: Any = load_with_placeholders(stream)
    except pickle.UnpicklingError:
        raise DataError(f"{folder}: what it says of its job is more than plain data; do not use it") from None
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{folder}: what it says of its job cannot be read ({reason}); use another checkpoint"
        ) from None
    # As an object among shards it is one of a list.
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    if not isinstance(found, dict):
        raise DataError(f"{folder}: what it says of its job is no dictionary; use another checkpoint")
    return found


def arguments_in(common: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments in a common state, by name; empty if there are none."""
    args = common.get("args")
    return dict(vars(args)) if isinstance(args, MegatronArguments) else {}
