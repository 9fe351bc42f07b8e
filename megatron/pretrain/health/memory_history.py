"""The history of this GPU's memory in torch's form, for https://pytorch.org/memory_viz."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron.pretrain.side_outputs import SideOutput


class MemoryHistory:
    """Every rank writes its own file; what cannot be written does not end training.

    Args:
        path: of rank 0; other ranks add their number to its stem. None: there is no history.
        rank: this one.
        interval: iterations between writings, each of all that there is.
    """

    def __init__(self, path: Path | None, rank: int, interval: int) -> None:
        self._interval = interval
        self._path = path if path is None or not rank else path.with_stem(f"{path.stem}_rank{rank}")
        self._output = SideOutput(path or Path(), "histories of memory")
        if self._path is not None and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history()

    def write(self, iteration: int) -> None:
        """Write it, if the iteration is one of those after which it is written."""
        if self._path is None or iteration % self._interval or not torch.cuda.is_available():
            return
        self._output.attempt(lambda: torch.cuda.memory._dump_snapshot(str(self._path)))
