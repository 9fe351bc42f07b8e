"""Who writes where: every place that a job writes to has one owner at a time.

A lock is a file beside the output that names its owner. It is made in one step, by a link or by exclusive
creation, which holds on shared file systems, too, where ``flock`` may not. Its owner touches it from time to
time. On the same host it is seen whether the owner has ended; of one on another host, or before a reboot,
only that it no longer touches the file. An owner that was believed to be gone and is not finds out before it
writes the next checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from helixpipe.json_input import parse_object

# How often a lock is touched, and how long one that is not is believed in.
BEAT_S = 5.0
PATIENCE_S = 30.0
_POLL_S = 0.5
# Where a file system has no links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


class Owner(NamedTuple):
    """A process that writes for a job.

    Attributes:
        job: see :func:`megatron.pretrain.health.rendezvous.job_identity`.
        name: of the job for people, as the scheduler or torchrun gave it.
        host, boot, namespace: where the number of the process means something.
        process: its number.
        started: when, in ticks since the boot: numbers are used again.
        since: wall-clock time.
    """

    job: str
    name: str
    host: str
    boot: str
    namespace: str
    process: int
    started: str
    since: str

    @classmethod
    def here(cls, job: str) -> Owner:
        """This process."""
        name = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or job[:12]
        return cls(
            job, name, socket.gethostname(), _boot(), _namespace(), os.getpid(), _started(os.getpid()),
            time.strftime("%Y-%m-%d %H:%M:%S"),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"job {self.name} (process {self.process} on host {self.host}, since {self.since})"

    def has_ended(self) -> bool | None:
        """Whether it has; None if that cannot be seen from here."""
        here = (socket.gethostname(), _boot(), _namespace())
        if (self.host, self.boot, self.namespace) != here or not self.boot:
            return None
        return _started(self.process) != self.started


class Taken(ValueError):
    """An output has another owner."""


class Locks:
    """Locks of one job, touched by a thread until they are released.

    Args:
        owner: this process.
        say: told what is taken over, and what is waited for.
    """

    def __init__(self, owner: Owner, say: Callable[[str], None]) -> None:
        self._owner = owner
        self._unique = uuid.uuid4().hex
        self._text = json.dumps(owner._asdict()) + "\n"
        self._say = say
        self._held: dict[Path, str] = {}
        self._ended = Event()
        self._toucher: Thread | None = None

    def take(self, lock: Path, flag: str) -> None:
        """Own the output that ``lock`` stands for.

        Args:
            lock: the file.
            flag: the option and its value, for messages.

        Raises:
            Taken: it is another job's, which has not ended.
            OSError: the file cannot be made.
        """
        lock = lock.resolve()
        if lock in self._held:
            return
        # Before it is made: Ctrl-C may come in between, and what is released is only what has this text.
        self._held[lock] = flag
        try:
            self._make(lock, flag)
        except (ValueError, OSError):
            self._give_up(lock)
            raise
        if self._toucher is None:
            self._toucher = Thread(target=self._touch, daemon=True)
            self._toucher.start()

    def _make(self, lock: Path, flag: str) -> None:
        while not _create(lock, self._text, self._temporary(lock)):
            seen = _read(lock)
            if seen is None:
                continue  # released meanwhile
            text, owner = seen
            if owner is None:
                raise Taken(f"{flag}: {lock} names no owner; remove it if no job writes there")
            self._require_end_of(owner, lock, flag)
            _discard(lock, text)

    def verify(self) -> None:
        """``OSError`` if one of the outputs has gone to another job."""
        for lock, flag in self._held.items():
            seen = _read(lock)
            if seen is None or seen[0] != self._text:
                other = seen[1] if seen else None
                raise OSError(f"{flag} has been taken over by {other or 'another job'}")

    def release(self) -> None:
        """Give up what is still this job's."""
        self._ended.set()
        for lock in list(self._held):
            self._give_up(lock)

    def _give_up(self, lock: Path) -> None:
        seen = _read(lock)
        if seen is not None and seen[0] == self._text:
            lock.unlink(missing_ok=True)
        self._temporary(lock).unlink(missing_ok=True)
        del self._held[lock]

    def _temporary(self, lock: Path) -> Path:
        """What becomes the lock; one name, so that it is found again if Ctrl-C came before its removal."""
        return lock.with_name(f"{lock.name}.{self._unique}")

    def _require_end_of(self, owner: Owner, lock: Path, flag: str) -> None:
        has_ended = owner.has_ended()
        if owner.job == self._owner.job and owner.process != self._owner.process:
            has_ended = True  # torchrun starts ranks again only when those before them have ended
        if has_ended is None:
            self._say(
                f"{flag} is owned by {owner}; waiting up to {PATIENCE_S:.0f} s to see whether it still is"
            )
            has_ended = not _is_touched(lock)
        if not has_ended:
            raise Taken(f"{flag} is in use by {owner}; give another path, or wait until that job has ended")
        self._say(f"{flag} was left by {owner}, which has ended; going on with it")

    def _touch(self) -> None:
        while not self._ended.wait(BEAT_S):
            for lock in list(self._held):
                try:
                    if lock.read_text(encoding="utf-8") == self._text:
                        os.utime(lock)
                except OSError:
                    continue  # storage that stalls may answer again


def lock_in(folder: Path) -> Path:
    """The lock of a folder."""
    return folder / "owner.json"


def lock_beside(file: Path) -> Path:
    """The lock of a file."""
    return file.with_name(f"{file.name}.owner.json")


def _create(lock: Path, text: str, temporary: Path) -> bool:
    """Make the lock with its content in one step; False if there is one."""
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, lock)
    except FileExistsError:
        # The answer of a server to a request that had arrived twice.
        return temporary.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_exclusively(lock, text)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_exclusively(lock: Path, text: str) -> bool:
    try:
        with lock.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    except KeyboardInterrupt:
        # Made, not yet written: it would name no owner, and only people may remove that.
        if lock.exists() and not lock.read_text(encoding="utf-8", errors="replace"):
            lock.unlink(missing_ok=True)
        raise
    return True


def _read(lock: Path) -> tuple[str, Owner | None] | None:
    """Content and owner of a lock, which may name none; None if there is no lock."""
    try:
        text = lock.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    try:
        return text, Owner(**parse_object(text, str(lock)))
    except (ValueError, TypeError):
        return text, None


def _discard(lock: Path, text: str) -> None:
    """Remove a lock that was found with this content: another job may have replaced it meanwhile."""
    found = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    try:
        lock.rename(found)
    except FileNotFoundError:
        return
    try:
        if found.read_text(encoding="utf-8", errors="replace") != text:
            os.link(found, lock)
    except OSError:
        pass  # a third job has it; the second one sees that before its next checkpoint
    finally:
        found.unlink(missing_ok=True)


def _is_touched(lock: Path) -> bool:
    """Whether the lock changes, or goes, within the time that its owner has for that."""
    first, end = _seen(lock), time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(_POLL_S)
        if _seen(lock) != first:
            return True
    return False


def _seen(lock: Path) -> int:
    """When it was touched last; opened, because a network file system asks its server only then."""
    try:
        with lock.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _boot() -> str:
    return _text_of(Path("/proc/sys/kernel/random/boot_id"))


def _namespace() -> str:
    """In a container of the same host the same number is another process."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process was started; empty if it has ended."""
    text = _text_of(Path(f"/proc/{process}/stat"))
    # The name before the state may contain anything.
    fields = text.rpartition(")")[2].split()
    return "" if not fields or fields[0] in ("Z", "X") else fields[19]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
