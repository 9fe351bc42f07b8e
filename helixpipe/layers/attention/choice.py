"""Which attention backend computes: the first in the order of the hardware that imports and runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from helixpipe.layers.attention.aten import AtenCpu, AtenEfficient, AtenFlash
from helixpipe.layers.attention.blocks import BlockAttention
from helixpipe.layers.attention.cudnn import AtenCudnn, EngineCudnn
from helixpipe.layers.attention.flash_packages import FlashAttention2, FlashAttention3
from helixpipe.layers.attention.interface import AttentionBackend, AttentionProblem
from helixpipe.layers.attention.trial import run_trial
from helixpipe.layers.variants import variants_of

AUTO = "auto"

# FlashAttention-3 and cuDNN reach 0.66 of an H100's peak forward, FlashAttention-2 0.39.
_HOPPER = (FlashAttention3, AtenCudnn, EngineCudnn, FlashAttention2, AtenFlash, AtenEfficient)
# cuDNN is ahead on what came after; FlashAttention-3 has no kernels for it.
_NEWER = (AtenCudnn, EngineCudnn, FlashAttention2, AtenFlash, AtenEfficient)
_OLDER = (FlashAttention2, AtenFlash, AtenCudnn, EngineCudnn, AtenEfficient)

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (*_HOPPER, AtenCpu, BlockAttention)
}

# Megatron's names of kinds of backends; of a kind the fastest that works is chosen.
FAMILIES: dict[str, tuple[type[AttentionBackend], ...]] = {
    "flash": (FlashAttention3, FlashAttention2, AtenFlash, AtenCpu, BlockAttention),
    "fused": (AtenCudnn, EngineCudnn),
}
# Megatron's own attention, which holds all scores: no backend of ours, but it has dropout.
UNFUSED = ("unfused", "local")


class Choice(NamedTuple):
    """The backend that was chosen, and why those before it were not, by name."""

    backend: AttentionBackend
    passed_over: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        return self.backend.name + (f" ({reasons})" if reasons else "")


def order_of(problem: AttentionProblem) -> tuple[type[AttentionBackend], ...]:
    """The backends to try, the fastest first.

    Where lengths differ from batch to batch, those come first that pack: cuDNN would build a plan for every
    new length, and the others would launch once for each sequence. Blocks of our own come last, and only
    where kernels may lack what is asked for, as all of a GPU's lack fp64: elsewhere they would hide that no
    kernel works.
    """
    order: tuple[type[AttentionBackend], ...] = (AtenCpu,)
    if problem.capability is not None:
        major, _ = problem.capability
        order = _OLDER if major < 9 else _HOPPER if major == 9 else _NEWER
    if problem.varies:
        order = tuple(sorted(order, key=lambda backend: not backend.packs))
    is_rare = problem.softcap or (problem.capability is not None and problem.dtype is torch.float64)
    return (*order, BlockAttention) if is_rare else order


@cache
def choose(name: str, problem: AttentionProblem) -> Choice:
    """Choose a backend, once per problem: every candidate runs forward and backward on a tiny input.

    Args:
        name: of a backend or of a family, which then has to work, or ``auto``.
        problem: what it is for.

    Raises:
        ValueError: an unknown name, a named backend that does not work, or none that does.
    """
    if name not in (AUTO, *FAMILIES, *BACKENDS):
        known = ", ".join((AUTO, *FAMILIES, *BACKENDS))
        raise ValueError(f"attention backend {name!r} is not known; choose one of {known}")
    passed_over: dict[str, str] = {}
    for backend in _candidates(name, problem):
        try:
            return Choice(_tried(backend, problem), passed_over)
        except _Unusable as error:
            passed_over[backend.name] = str(error)
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed_over.items())
    if name != AUTO:
        raise ValueError(
            f"--attention-backend {name} cannot be used: {passed_over.get(name, reasons)}; "
            "choose another, or leave it out to get the fastest that works"
        )
    raise ValueError(f"no attention backend works ({reasons}); install one of them")


def _candidates(name: str, problem: AttentionProblem) -> Sequence[type[AttentionBackend]]:
    """The backends to try, in order; of a family also those that this device is not for, to say why."""
    if name in BACKENDS:
        return (BACKENDS[name],)
    order = order_of(problem)
    if name == AUTO:
        return order
    family = FAMILIES[name]
    return [backend for backend in order if backend in family] or family


def place() -> tuple[torch.device, tuple[int, int] | None]:
    """The device of this rank, and its compute capability if it is a GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), None
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_capability(device)


def problem_of(config: TransformerConfig, *, varies: bool = False) -> AttentionProblem:
    """What this rank's layers need attention for."""
    tensor_parallel = config.tensor_model_parallel_size
    return AttentionProblem(
        *place(),
        dtype=config.params_dtype,
        head_size=config.kv_channels,
        heads=config.num_attention_heads // tensor_parallel,
        groups=max(1, config.num_query_groups // tensor_parallel),
        varies=varies,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        softcap=variants_of(config).attention_softcap,
    )


def problem_with(query: Tensor, key: Tensor) -> AttentionProblem:
    """Attention of one query [b, heads, s, d] over one key [b, groups, t, d]."""
    is_cuda = query.is_cuda
    return AttentionProblem(
        query.device,
        torch.cuda.get_device_capability(query.device) if is_cuda else None,
        query.dtype,
        query.shape[3],
        query.shape[1],
        key.shape[1],
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def markdown_table() -> str:
    """The backends for people, in the order of choice on Hopper."""
    names = ("`--attention-backend`", "needs", "types", "head sizes", "packed sequences", "soft cap")
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for backend in BACKENDS.values():
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        sizes = "any"
        if backend.head_multiple > 1:
            sizes = f"multiples of {backend.head_multiple}, to {backend.largest_head}"
        launches = "one launch" if backend.packs else "one launch each"
        caps = "yes" if backend.caps else "no"
        rows.append(f"| `{backend.name}` | {backend.needs} | {types} | {sizes} | {launches} | {caps} |")
    return "\n".join(rows)


class _Unusable(Exception):
    """Says why a backend is passed over."""


def _tried(backend: type[AttentionBackend], problem: AttentionProblem) -> AttentionBackend:
    reason = backend.why_not(problem)
    if reason:
        raise _Unusable(reason)
    try:
        made = backend()
    except ModuleNotFoundError as error:
        raise _Unusable(f"is not installed ({error})") from error
    # A broken package may raise anything, and must not end the run.
    except Exception as error:
        raise _Unusable(f"cannot be imported ({_described(error)})") from error
    made.softcap = problem.softcap
    try:
        wrong = run_trial(made, problem)
    except Exception as error:
        raise _Unusable(f"fails in a trial run ({_described(error)})") from error
    if wrong:
        raise _Unusable(f"computes wrong {wrong} in a trial run")
    return made


def _described(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
