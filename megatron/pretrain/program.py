"""The training program: what ``pretrain_gpt.py`` and ``helixpipe train`` run on each rank."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

# megatron.core warns at import about every optional package that is not installed.
warnings.filterwarnings("ignore", module="megatron.core")
# Saving through torch.distributed.checkpoint warns about its own use of an older tensor class.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.checkpoint")
# megatron.core calls the distributed optimizer's collectives by names that newer torch releases replace.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
logging.getLogger("megatron.core").setLevel(logging.ERROR)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

# Hides broken packages, which must come before any import of megatron.core.
import helixpipe.layers  # noqa: E402, F401

# isort: split
from megatron.core import parallel_state  # noqa: E402

from helixpipe.layers.attention.context_parallel import own_pieces  # noqa: E402
from helixpipe.layers.documents import Documents  # noqa: E402
from helixpipe.reliability.exit_codes import INTERRUPTED, exit_code_of, leave_exit_code  # noqa: E402
from megatron.pretrain.health.exit_barrier import ExitBarrier  # noqa: E402
from megatron.pretrain.health.monitoring import PROGRAM  # noqa: E402
from megatron.pretrain.loop import pretrain  # noqa: E402
from megatron.pretrain.settings.arguments import parse_arguments  # noqa: E402

_TENSORS = ("tokens", "labels", "loss_mask", "position_ids")
EXIT_UNEXPECTED = 1  # an error in the program; the others are in helixpipe.reliability.exit_codes


def get_batch(data_iterator: Iterator[dict[str, Any]] | None) -> tuple[Any, ...]:
    """Tokens, labels, loss mask and positions of the next micro batch, [b, s] each; None without data.

    With context parallelism those of this rank, [b, s/c].

    Last come its :class:`Documents`, if attention ends at them.
    """
    if data_iterator is None:
        return None, None, None, None, None
    batch = next(data_iterator)
    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    # On the host: what other ranks of the context group have need not be copied.
    parts = (own_pieces(batch[name], 1, size, rank) for name in _TENSORS)
    tensors = tuple(part.cuda(non_blocking=True) for part in parts)
    documents: Documents | None = batch.get("documents")
    return *tensors, documents and documents.on(tensors[0].device)


def loss_func(loss_mask: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss, number of tokens, and both for the log."""
    assert loss_mask is not None, "the loss is computed where the data is read"
    mask = loss_mask.view(-1).float()
    total = torch.sum(losses.float().view(-1) * mask)
    tokens = mask.sum()
    return total, tokens.int(), {"lm loss": torch.stack([total.detach(), tokens])}


def forward_step(data_iterator: Iterator[dict[str, Any]] | None, model: Any) -> tuple[Any, Any]:
    """Megatron's forward step: the model's output and the function that turns it into a loss."""
    tokens, labels, loss_mask, position_ids, documents = get_batch(data_iterator)
    # No mask: attention is causal in every core attention used here.
    output = model(tokens, position_ids, None, labels=labels, packed_seq_params=documents)
    return output, partial(loss_func, loss_mask)


def main() -> int:
    """Run the job; its exit code, see :mod:`helixpipe.reliability.exit_codes`, after one line on stderr."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_barrier = ExitBarrier()
    code = _run(exit_barrier)
    if code:
        leave_exit_code(code)
        exit_barrier.wait()
    return code


def _run(exit_barrier: ExitBarrier) -> int:
    try:
        settings = parse_arguments()
        exit_barrier.checked()
        return pretrain(settings, forward_step, exit_barrier.leave)
    except (ValueError, OSError) as error:
        return _fail(str(error), exit_code_of(error))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{PROGRAM}: stopped by SIGINT before the first iteration\n")
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_UNEXPECTED


def _fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    # In one write, newline included: ranks share the terminal.
    sys.stderr.write(f"{PROGRAM}: rank {rank}: error: {message}\n")
    return code


def end(code: int) -> None:
    """End the process with the job's exit code."""
    if code:
        # Not through the destructors of a process group whose other ranks are gone: they may wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
