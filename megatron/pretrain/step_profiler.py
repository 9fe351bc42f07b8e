"""torch's profiler around some iterations of this rank."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron.pretrain.settings.profiling import ProfilingSettings
from megatron.pretrain.side_outputs import SideOutput

_TAIL_BYTES = 64


class StepProfiler:
    """Watches the iterations that were asked for and writes one trace for all of them, if it can be written.

    The operations of the plan are ranges in it, see :mod:`helixpipe.runtime.profiler_ranges`. The file is in
    the form of chrome://tracing and ui.perfetto.dev.

    Args:
        settings: what to profile; None for nothing.
        rank: this rank, for the name of the file.
    """

    def __init__(self, settings: ProfilingSettings | None, rank: int) -> None:
        self._settings = settings
        self._rank = rank
        self._profiler: torch.profiler.profile | None = None

    @contextmanager
    def around(self, iteration: int) -> Iterator[None]:
        """The iteration runs inside; the first that was asked for starts the profiler, the last ends it."""
        settings = self._settings
        if settings is not None and self._profiler is None and settings.first <= iteration <= settings.last:
            self._profiler = torch.profiler.profile()  # of the CPU, and of the GPU where there is one
            self._profiler.start()
        yield
        if settings is not None and iteration == settings.last:
            self.finish()

    def finish(self) -> None:
        """Write what has been watched so far; does nothing where nothing has been."""
        if self._profiler is None or self._settings is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self._settings.folder / f"profile_rank{self._rank}.json"
        SideOutput(path, "traces of the profiler").attempt(lambda: _export(profiler, path))


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    """Write a trace whole, or not at all.

    Raises:
        OSError: it cannot be written, of which the profiler says nothing.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(b"")
        profiler.export_chrome_trace(str(temporary))
        with temporary.open("rb") as stream:
            stream.seek(-min(_TAIL_BYTES, temporary.stat().st_size), os.SEEK_END)
            if not stream.read().rstrip().endswith(b"}"):
                raise OSError(errno.EIO, "the file was not written whole")
        temporary.replace(path)
    except OSError:
        # Among them what the profiler itself has written aside.
        for leftover in path.parent.glob(f"{temporary.name}*"):
            leftover.unlink()
        raise
