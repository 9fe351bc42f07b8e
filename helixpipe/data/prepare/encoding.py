"""Processes that encode documents into tokens."""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from helixpipe.data.prefix import end_of_document_id

# Chunks read ahead of the one to be written next, per worker: enough to keep all of them busy
# behind one slow chunk, and a bound on memory.
_CHUNKS_AHEAD = 4


class Chunk(NamedTuple):
    """Texts to encode together, the prompts before them, and the bytes of input that were read for both."""

    texts: list[str]
    prompts: list[str]
    input_bytes: int


class EncodedChunk(NamedTuple):
    """Tokens of the documents that are kept, their lengths, and how many were left out and why.

    A document begins with its prompt, whose length may be 0.
    """

    tokens: np.ndarray
    lengths: list[int]
    prompt_lengths: list[int]
    empty: int
    short: int


class Encoders:
    """Encoding processes that give back chunks in the order in which they were read.

    Each process has a pipe of its own. The queues of multiprocessing.Pool are guarded by shared
    locks: a worker killed by the system while it holds one would leave the parent waiting for ever.
    """

    def __init__(self, workers: int, tokenizer_json: str, dtype: type[np.generic], min_tokens: int) -> None:
        self._arguments = (tokenizer_json, np.dtype(dtype).name, min_tokens)
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

    def encode(self, chunks: Iterator[Chunk]) -> Iterator[tuple[EncodedChunk, int]]:
        """Yield each chunk encoded, with its input bytes."""
        limit = _CHUNKS_AHEAD * len(self._processes)
        idle = list(self._processes)
        busy: dict[Connection, int] = {}
        sizes: deque[int] = deque()
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
                self._exchange(connection, chunk)
                busy[connection] = sent
                sizes.append(chunk.input_bytes)
                sent += 1
            while done in encoded:
                yield encoded.pop(done), sizes.popleft()
                done += 1
            # Nothing is busy if the limit had held all processes back until now.
            for ready in wait(list(busy)) if busy else ():
                assert isinstance(ready, Connection)
                encoded[busy.pop(ready)] = self._exchange(ready)
                idle.append(ready)

    def _exchange(self, connection: Connection, chunk: Chunk | None = None) -> Any:
        """Send a chunk, or receive an encoded one."""
        try:
            if chunk is not None:
                return connection.send(chunk)
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


def _encode_chunks(connection: Connection, tokenizer_json: str, dtype: str, min_tokens: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    # "<|endoftext|>" in a text is text; the token itself marks ends of documents alone.
    tokenizer.encode_special_tokens = True
    # A tokenizer file may carry these settings; a document is written whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The parent closes the pipe, or dies.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            chunk: Chunk = connection.recv()
            try:
                reply: object = _encode(tokenizer, chunk, dtype, min_tokens)
            except Exception as error:  # the library raises plain Exception
                reason = " ".join(str(error).split())
                reply = ValueError(f"the tokenizer cannot encode a document: {reason}")
            connection.send(reply)


def _encode(tokenizer: Tokenizer, chunk: Chunk, dtype: str, min_tokens: int) -> EncodedChunk:
    end = end_of_document_id(tokenizer)
    # Apart from the response: so is a prompt encoded when the model is asked to go on from it.
    prompts = iter(tokenizer.encode_batch_fast([p for p in chunk.prompts if p], add_special_tokens=False))
    documents, prompt_lengths = [], []
    empty = short = 0
    texts = tokenizer.encode_batch_fast(chunk.texts, add_special_tokens=False)
    for encoding, prompt in zip(texts, chunk.prompts, strict=True):
        before = next(prompts).ids if prompt else []
        ids = encoding.ids
        if not ids:
            empty += 1
        elif len(before) + len(ids) < min_tokens:
            short += 1
        else:
            documents.append(np.array([*before, *ids, end], dtype=dtype))
            prompt_lengths.append(len(before))
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=dtype)
    return EncodedChunk(tokens, [len(document) for document in documents], prompt_lengths, empty, short)
