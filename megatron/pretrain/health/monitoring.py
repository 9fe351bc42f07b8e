"""Watch a training job: what is called a hang, and where its traces go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from helixpipe.megatron_adapter.watching import reporting, stack_folder
from helixpipe.reliability.deadlines import Deadlines
from helixpipe.reliability.monitor import Monitor
from megatron.pretrain.settings.job import JobSettings

PROGRAM = "pretrain_gpt"


@contextmanager
def monitored(settings: JobSettings, before_exit: Callable[[], None]) -> Iterator[Monitor]:
    """Watch this rank while it runs; an error inside is told to the other ranks.

    Args:
        settings: of the job.
        before_exit: called if the process is ended because of another rank.

    Raises:
        PeerLost: another rank has ended, and this process was not told which.
    """
    # A single rank holds nobody up; it may be stopped from its terminal, or stand in a debugger.
    parallel, fixed_s = settings.parallel, settings.health.hang_timeout_s
    if parallel.world_size == 1 and fixed_s is None:
        fixed_s = 0.0
    monitor = Monitor(
        parallel.rank,
        parallel.world_size,
        program=PROGRAM,
        stack_folder=stack_folder(settings.health.failure_dir, settings.checkpoint.save, PROGRAM),
        deadlines=Deadlines(60.0 * parallel.distributed_timeout_minutes, fixed_s),
        before_exit=before_exit,
    )
    with reporting(monitor):
        yield monitor
