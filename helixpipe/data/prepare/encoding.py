"""Processes that encode pieces of documents into tokens."""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from helixpipe.data.prepare.pieces import Piece
from helixpipe.data.text_tokenizers import (
    END_OF_DOCUMENT,
    LibraryTokenizer,
    TextTokenizer,
    TokenizerSettings,
    open_tokenizer,
)

# What a process is given: the JSON of a tokenizer whose documents end with <|endoftext|>, or where one is.
TokenizerSource: TypeAlias = str | TokenizerSettings

# Chunks read ahead of the one to be written next, per worker: enough to keep all of them busy
# behind one slow chunk, and a bound on memory.
_CHUNKS_AHEAD = 4


class EncodedChunk(NamedTuple):
    """Tokens of the pieces of a chunk, one after the other, and how many each has."""

    tokens: np.ndarray
    lengths: list[int]


class Encoders:
    """Encoding processes that give back chunks in the order in which they were read.

    Each process has a pipe of its own. The queues of multiprocessing.Pool are guarded by shared
    locks: a worker killed by the system while it holds one would leave the parent waiting for ever.
    """

    def __init__(self, workers: int, tokenizer: TokenizerSource, dtype: type[np.generic]) -> None:
        self._arguments = (tokenizer, np.dtype(dtype).name)
        self._workers = workers
        self._processes: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> "Encoders":
        # Spawned, not forked: the tokenizer's threads would be lost in a fork.
        context = multiprocessing.get_context("spawn")
        # Blocked in the children for good: Ctrl-C reaches the whole process group, and it is the
        # parent that stops them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self._workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_encode_chunks, args=(theirs, *self._arguments), daemon=True)
                process.start()
                theirs.close()
                self._processes[ours] = process
        except BaseException:
            self.__exit__()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return self

    def __exit__(self, *exception: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.join()

    def encode(self, chunks: Iterator[list[Piece]]) -> Iterator[tuple[list[Piece], EncodedChunk]]:
        """Yield each chunk with its tokens."""
        limit = _CHUNKS_AHEAD * len(self._processes)
        idle = list(self._processes)
        busy: dict[Connection, int] = {}
        waiting: deque[list[Piece]] = deque()
        encoded: dict[int, EncodedChunk] = {}
        sent = done = 0
        more = True
        while more or busy or encoded:
            while more and idle and sent - done < limit:
                chunk = next(chunks, None)
                if chunk is None:
                    more = False
                    break
                connection = idle.pop()
                self._exchange(connection, [piece.text for piece in chunk])
                busy[connection] = sent
                waiting.append(chunk)
                sent += 1
            while done in encoded:
                yield waiting.popleft(), encoded.pop(done)
                done += 1
            # Nothing is busy if the limit had held all processes back until now.
            for ready in wait(list(busy)) if busy else ():
                connection = cast(Connection, ready)
                encoded[busy.pop(connection)] = self._exchange(connection)
                idle.append(connection)

    def _exchange(self, connection: Connection, texts: list[str] | None = None) -> Any:
        """Send texts, or receive them encoded."""
        try:
            if texts is not None:
                return connection.send(texts)
            reply = connection.recv()
        except (EOFError, ConnectionError) as error:
            process = self._processes[connection]
            process.join()
            raise RuntimeError(
                f"an encoding process died with exit code {process.exitcode}: if memory ran out, "
                "give fewer --workers or shorter documents"
            ) from error
        if isinstance(reply, Exception):
            raise reply
        return reply


def text_tokenizer(source: TokenizerSource) -> TextTokenizer:
    """Load a tokenizer; errors are those of :func:`open_tokenizer`."""
    if isinstance(source, TokenizerSettings):
        return open_tokenizer(source)
    return LibraryTokenizer(source, END_OF_DOCUMENT, "the tokenizer")


def _encode_chunks(connection: Connection, source: TokenizerSource, dtype: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = text_tokenizer(source)
    # The parent closes the pipe, or dies.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            texts: list[str] = connection.recv()
            try:
                reply: object = _encode(tokenizer, texts, dtype)
            except ValueError as error:
                reply = error
            connection.send(reply)


def _encode(tokenizer: TextTokenizer, texts: list[str], dtype: str) -> EncodedChunk:
    # A prompt apart from its response: so is it encoded when the model is asked to go on from it.
    pieces = [np.array(ids, dtype=dtype) for ids in tokenizer.encode(texts)]
    return EncodedChunk(np.concatenate(pieces), [len(piece) for piece in pieces])
