"""torch's profiler around some iterations of this rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.pretrain.settings.profiling import ProfilingSettings


class StepProfiler:
    """Watches the iterations that were asked for and writes one trace for all of them.

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
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._settings.folder / f"profile_rank{self._rank}.json"))
        self._profiler = None
