"""The process that trains a tokenizer and can be ended at any moment; the library cannot be interrupted."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait

from helixpipe.data.prepare.tokenizer_training import train_bpe

# Characters that are sent at a time.
_BATCH_CHARACTERS = 1 << 18


def train_bpe_apart(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE tokenizer in a process of its own, which ends with this call whatever happens.

    Returns:
        the JSON of the tokenizer.

    Raises:
        ValueError: see :func:`train_bpe`.
        RuntimeError: the process died.
    """
    context = multiprocessing.get_context("spawn")
    # Blocked in the child for good: Ctrl-C reaches the whole process group, and the parent stops the child.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ours, theirs = context.Pipe()
        process = context.Process(target=_train, args=(theirs, vocab_size), daemon=True)
        process.start()
        theirs.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        # An error of the child comes back the same way as its result.
        with contextlib.suppress(ConnectionError):
            for batch in _batches(texts):
                ours.send(batch)
            ours.send(None)
        try:
            reply = ours.recv()
        except (EOFError, ConnectionError) as error:
            process.join()
            raise RuntimeError(
                f"the process that trains the tokenizer died with exit code {process.exitcode}: if memory "
                "ran out, train on a part of the input and give the result as --tokenizer-file"
            ) from error
    finally:
        ours.close()
        process.kill()
        process.join()
    if isinstance(reply, Exception):
        raise reply
    return str(reply)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _train(connection: Connection, vocab_size: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def received() -> Iterator[str]:
        while (batch := connection.recv()) is not None:
            yield from batch

    reply: object
    try:
        reply = train_bpe(received(), vocab_size).to_str(pretty=True)
    except EOFError:
        return  # the parent has ended
    except ValueError as error:
        reply = error
    except Exception as error:  # the library raises plain Exception
        reply = ValueError(f"the tokenizer cannot be trained: {' '.join(str(error).split())}")
    with contextlib.suppress(ConnectionError):
        connection.send(reply)


def _end_with_parent() -> None:
    """End this process as soon as its parent has, even if that was killed in the middle of training."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
