"""How a rank of a training job is watched: who joins, and what the others are told of its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch.distributed import DistError, Store

from helixpipe.reliability.exit_codes import PEER_LOST, JobError
from helixpipe.reliability.monitor import HubAddress, Monitor

# What errors say when the process at the other end is gone.
_LOST = ("by peer", "Broken pipe", "Connection refused", "remote process exited", "Socket closed")
# How long this rank waits to be told which rank is to blame, before it says only that one is.
_VERDICT_S = 8.0


class PeerLost(JobError):
    """Another rank has ended, and nobody could say which."""

    exit_code = PEER_LOST


@contextmanager
def reporting(monitor: Monitor) -> Iterator[None]:
    """Tell the other ranks how what is inside has ended.

    Raises:
        PeerLost: another rank has ended, and this process was not told which.
    """
    try:
        yield
    except KeyboardInterrupt:
        # From a terminal it reaches every rank: none is to blame.
        monitor.close()
        raise
    except SystemExit as end:
        if end.code in (None, 0):
            monitor.close()
        else:
            monitor.report_failure("it was told to stop")
        raise
    except Exception as error:
        if _is_peer_loss(error):
            time.sleep(_VERDICT_S)
            monitor.report_failure("it lost its connection to another rank")
            raise PeerLost("another rank has stopped; its own message says why") from None
        is_for_user = isinstance(error, (ValueError, OSError))
        text = str(error) if is_for_user else f"{type(error).__name__}: {error}"
        monitor.report_failure(text.partition("\n")[0], say=not is_for_user)
        raise
    monitor.close()


def join(rank: int, monitor: Monitor, store: Store) -> None:
    """Let the ranks watch each other; ``store`` is one that all of them reach."""
    if rank == 0:
        store.set("hub", json.dumps(monitor.address(_hosts())))
    monitor.join(HubAddress(*json.loads(store.get("hub"))))
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def stack_folder(failure_dir: Path | None, save: Path | None, program: str) -> Path:
    """Where stacks go after a hang: as asked for, beside checkpoints, or a temporary folder of this user."""
    if failure_dir is not None:
        return failure_dir
    if save is not None:
        return save / "failures"
    return Path(tempfile.gettempdir()) / f"{program}-{os.getuid()}"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Stop, unless this process is ended meanwhile because of another rank.

    torchrun sends SIGTERM to all ranks as soon as one has gone, when the verdict about that one is under way;
    and may send it again.
    """
    signal.signal(number, signal.SIG_IGN)
    time.sleep(_VERDICT_S)
    sys.exit(128 + number)


def _is_peer_loss(error: Exception) -> bool:
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)
    )


def _hosts() -> list[str]:
    """Names and addresses under which the other ranks may reach this host."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    found = [master, socket.gethostname()]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # Sends nothing: it only asks which of this host's addresses leads there.
            probe.connect((master, 9))
            found.insert(0, probe.getsockname()[0])
    except OSError:
        pass
    return list(dict.fromkeys(found))
