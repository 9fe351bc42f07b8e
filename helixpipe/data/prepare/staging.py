"""A dataset's files under temporary names, until all three are whole."""

import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Iterator

from helixpipe.data.prefix import DatasetPaths
from helixpipe.data.whole_file import sync_folder

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def refuse_existing(paths: DatasetPaths) -> None:
    """``ValueError`` if one of a dataset's files is already there."""
    for path in paths:
        if os.path.lexists(path):
            raise ValueError(
                f"{path} exists already: give --overwrite to replace the dataset, or another --output-prefix"
            )


class Staging:
    """Holds the files under temporary names; on exit removes those not published.

    Args:
        paths: of the dataset.
        overwrite: replace what stands there.
        has_tokenizer: the tokenizer is one of the files; otherwise one that stands there is removed.
    """

    def __init__(self, paths: DatasetPaths, overwrite: bool, *, has_tokenizer: bool = True) -> None:
        # Unique, so that two runs at one prefix do not write into one file.
        mark = secrets.token_hex(4)
        self.temporary = DatasetPaths(*(f"{path}.tmp-{mark}" for path in paths))
        self._paths = paths
        self._overwrite = overwrite
        self._has_tokenizer = has_tokenizer

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *exception: object) -> None:
        with _signals_deferred():
            for path in self.temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def publish(self) -> None:
        """Give the files their names; without .idx the others are no dataset."""
        for path in self.temporary if self._has_tokenizer else self.temporary[:2]:
            _sync(path)
        folder = os.path.dirname(self._paths.idx) or "."
        with _signals_deferred():
            if self._overwrite:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._paths.idx)
                sync_folder(folder)
            else:
                refuse_existing(self._paths)
            os.replace(self.temporary.bin, self._paths.bin)
            if self._has_tokenizer:
                os.replace(self.temporary.tokenizer, self._paths.tokenizer)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._paths.tokenizer)
            # A crash of the machine must not find .idx on the disk and the others not.
            sync_folder(folder)
            os.replace(self.temporary.idx, self._paths.idx)
            sync_folder(folder)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Let a stop signal wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread alone
        return
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number)) for number in _STOP_SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for deferred in received[:1]:
        signal.raise_signal(deferred)
