"""Write a rank's part of a checkpoint: in this process, and hashed while it is written.

Megatron plans which rank writes what. Its writing is done by processes that it forks and that answer through
one more process; those die of the SIGTERM that a launcher sends to a rank's whole process group, and outlive
a rank that is killed. Threads do neither.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from helixpipe.contact_points import replace
from megatron.pretrain.checkpoint.files import FileDigest

BACKEND, VERSION = "torch_dist", 1

# Files per rank, each with a thread that writes it and one that hashes it.
_FILES = 2
_BLOCK_BYTES = 1 << 20
_POLL_S = 0.002


class Written(NamedTuple):
    """What a rank has written, or why it could not."""

    results: list[WriteResult]
    digests: dict[str, FileDigest]
    error: str = ""


class PlannedSave(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to where the writing would begin.

    Attributes:
        writer: knows what this rank writes.
        metadata: the table of contents, on rank 0.
    """

    writer: FileSystemWriterAsync
    metadata: Metadata | None

    def __init__(self) -> None:
        super().__init__(BACKEND, VERSION, thread_count=_FILES)
        # Where Megatron's writing processes would put their answers; without it, it starts a process.
        replace(filesystem_async.__name__, "_results_queue", queue.SimpleQueue())

    def _get_save_and_finalize_callbacks(
        self, writer: Any, planned: Any, async_strategy: str = ""
    ) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])

    def host_copy(self, *, detached: bool) -> list[WriteBucket]:
        """What this rank writes, in host memory; ``detached`` from tensors that training will change."""
        buckets = []
        for path, name, (raw, tensors) in self.writer.write_buckets or []:
            copies = [(item, tensor.to("cpu", non_blocking=True, copy=detached)) for item, tensor in tensors]
            buckets.append((path, name, (raw, copies)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return buckets

    def write(self, buckets: list[WriteBucket]) -> Written:
        """Write, hash and bring to disk; called in any thread, raises nothing."""
        results: list[WriteResult] = []
        digests: dict[str, FileDigest] = {}
        try:
            with _without_torch_checksums(), ThreadPoolExecutor(max_workers=_FILES) as pool:
                for name, found, file_digest in pool.map(self._write_file, buckets):
                    results += found
                    digests[name] = file_digest
        except Exception as error:  # whatever it is, it must not be lost in a thread
            return Written([], {}, describe(error))
        return Written(results, digests)

    def _write_file(self, bucket: WriteBucket) -> tuple[str, list[WriteResult], FileDigest]:
        path, name, (raw, tensors) = bucket
        with HashingFile(Path(path)) as stream:
            results = [
                filesystem._write_item(
                    self.writer.transforms,
                    stream,  # type: ignore[arg-type]
                    data,
                    item,
                    name,
                    filesystem.SerializationFormat.TORCH_SAVE,
                )
                for item, data in [*raw, *tensors]
            ]
        return name, results, stream.digest


@contextmanager
def _without_torch_checksums() -> Iterator[None]:
    """torch adds a CRC-32 of every tensor, which nothing reads: the manifest's hash covers it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class HashingFile:
    """A file to write from start to end, while a thread that follows the writer reads and hashes it.

    It goes on while the file is brought to disk, and takes no copy of what is written: it finds it in the
    page cache.

    Attributes:
        digest: of the whole file, once the context has been left.
    """

    digest: FileDigest

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._position = 0
        self._error: OSError | None = None
        self._has_ended = Event()

    def __enter__(self) -> HashingFile:
        self._stream = self._path.open("wb", buffering=_BLOCK_BYTES)
        self._hashing = Thread(target=self._follow, daemon=True)
        self._hashing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._stream:
                if kind is None:
                    self._stream.flush()
                    self._has_ended.set()
                    os.fsync(self._stream.fileno())
        except OSError as error:
            self._note(error)
        self._has_ended.set()
        self._hashing.join()
        if self._error is not None:
            # torch's own exception, raised over this one, does not say what was wrong.
            raise self._error
        self.digest = FileDigest(self._position, self._hash.hexdigest())

    def tell(self) -> int:
        """Bytes written so far."""
        return self._position

    def flush(self) -> None:
        """Nothing: the file is brought to disk when it is left."""

    def write(self, block: Any) -> int:
        """Append a block."""
        try:
            self._stream.write(block)
        except OSError as error:
            self._note(error)
            raise
        self._position += len(block)
        return len(block)

    def _note(self, error: OSError) -> None:
        if self._error is None:
            self._error = OSError(error.errno, error.strerror, str(self._path))

    def _follow(self) -> None:
        buffer, hashed = memoryview(bytearray(_BLOCK_BYTES)), 0
        try:
            with self._path.open("rb", buffering=0) as stream:
                while self._error is None:
                    is_last = self._has_ended.is_set()
                    missing = min(self._position - hashed, _BLOCK_BYTES)
                    count = stream.readinto(buffer[:missing]) if missing else 0
                    if count:
                        self._hash.update(buffer[:count])
                        hashed += count
                    elif is_last:
                        break
                    else:
                        self._has_ended.wait(_POLL_S)
            if hashed != self._position and self._error is None:
                raise OSError(errno.EIO, f"{hashed} of {self._position} bytes can be read back")
        except OSError as error:
            self._note(error)


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
