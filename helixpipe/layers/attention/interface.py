"""What every attention backend does: a forward with the log-sum-exp, and a backward that takes both results.

So attention never has to run twice (HelixPipe, arXiv 2507.00394, section "recomputation without attention"),
and results over parts of the keys can be merged (InfiniPipe, arXiv 2509.21275).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class ForwardResult(NamedTuple):
    """Output [b, heads, s, d], log-sum-exp [b, heads, s], and what the backend's backward also needs.

    The log-sum-exp is natural, of the scaled scores, in float32 (float64 for float64 on a CPU).
    """

    output: Tensor
    log_sum_exp: Tensor
    extra: tuple[Any, ...] = ()


Gradients = tuple[Tensor, Tensor, Tensor]


class Spans:
    """Where packed sequences lie within [1, heads, T, d], one after the other.

    Attributes:
        bounds: first and last token (exclusive) of each, without gaps.
        longest: tokens of the longest.
    """

    def __init__(self, bounds: Sequence[tuple[int, int]]) -> None:
        self.bounds = tuple(bounds)
        self.longest = max(last - first for first, last in self.bounds)
        self._offsets: Tensor | None = None

    def offsets(self, device: torch.device) -> Tensor:
        """Where each begins, and the end, [n + 1] in int32; uploaded once, without waiting."""
        if self._offsets is None:
            starts = [0, *(last for _, last in self.bounds)]
            on_host = torch.tensor(starts, dtype=torch.int32, pin_memory=device.type == "cuda")
            self._offsets = on_host.to(device, non_blocking=True)
        return self._offsets


@dataclass(frozen=True)
class AttentionProblem:
    """What attention is needed for, on one rank.

    Attributes:
        device: where.
        capability: the GPU's compute capability, (9, 0) for Hopper; None on a CPU.
        dtype: of query, key and value.
        head_size: d.
        heads, groups: of queries, and of keys and values.
        varies: packed sequences and slices, whose lengths differ from batch to batch.
        deterministic: gradients must have the same bits every time.
        softcap: see :class:`AttentionBackend`.
    """

    device: torch.device
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_size: int
    heads: int = 1
    groups: int = 1
    varies: bool = False
    deterministic: bool = False
    softcap: float = 0.0


class AttentionBackend(ABC):
    """Attention of query [b, heads, s, d] over key and value [b, groups, t, d], of any strides.

    With ``causal``, s = t and a query sees the keys up to its own; without, all of them. With ``spans``,
    b = 1, s = t, and each span is a sequence of its own, causal. With a ``softcap`` c, scaled scores x become
    c * tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2).

    Attributes:
        name: as ``--attention-backend`` takes it.
        needs: what must be installed, for people.
        dtypes: of query, key and value.
        head_multiple, largest_head: of head sizes.
        on_cpu, on_gpu: where it runs.
        packs: all spans take one launch; otherwise one each.
        is_deterministic: it can give the same bits every time.
        caps: it can cap scores.
        softcap: the cap; 0 for none.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    head_multiple: ClassVar[int] = 8
    largest_head: ClassVar[int] = 256
    on_cpu: ClassVar[bool] = False
    on_gpu: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    is_deterministic: ClassVar[bool] = True
    caps: ClassVar[bool] = False

    softcap: float = 0.0

    @classmethod
    def why_not(cls, problem: AttentionProblem) -> str:
        """Why it is not made for ``problem``; empty if it is."""
        if not (cls.on_cpu if problem.capability is None else cls.on_gpu):
            return "runs on CPUs only" if cls.on_cpu else "runs on GPUs only"
        if problem.dtype not in cls.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in cls.dtypes)
            return f"takes {names}, not {str(problem.dtype).removeprefix('torch.')}"
        if problem.head_size % cls.head_multiple:
            return f"takes head sizes that are multiples of {cls.head_multiple}, not {problem.head_size}"
        if problem.head_size > cls.largest_head:
            return f"takes head sizes up to {cls.largest_head}, not {problem.head_size}"
        if problem.deterministic and not cls.is_deterministic:
            return "is not deterministic"
        if problem.softcap and not cls.caps:
            return "cannot cap scores"
        return ""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        causal: bool = True,
        spans: Spans | None = None,
    ) -> ForwardResult:
        """Compute the output and the log-sum-exp."""
        if spans is None or len(spans.bounds) == 1:
            return self.forward_whole(query, key, value, scale, causal)
        if self.packs:
            return self.forward_packed(query, key, value, scale, spans)
        parts = []
        for first, last in spans.bounds:
            q, k, v = (tensor[:, :, first:last] for tensor in (query, key, value))
            parts.append(self.forward_whole(q, k, v, scale, True))
        outputs, sums, extra = zip(*parts, strict=True)
        return ForwardResult(_join(outputs), torch.cat(sums, dim=2), extra)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        *,
        causal: bool = True,
        spans: Spans | None = None,
    ) -> Gradients:
        """Gradients of query, key and value; new tensors.

        Output and log-sum-exp in ``result`` may be those over more keys: then these are the gradients
        through this part of them.
        """
        if spans is None or len(spans.bounds) == 1:
            return self.backward_whole(grad, query, key, value, result, scale, causal)
        if self.packs:
            return self.backward_packed(grad, query, key, value, result, scale, spans)
        parts = []
        for (first, last), extra in zip(spans.bounds, result.extra, strict=True):
            own = ForwardResult(result.output[:, :, first:last], result.log_sum_exp[..., first:last], extra)
            g, q, k, v = (tensor[:, :, first:last] for tensor in (grad, query, key, value))
            parts.append(self.backward_whole(g, q, k, v, own, scale, True))
        grad_query, grad_key, grad_value = zip(*parts, strict=True)
        return _join(grad_query), _join(grad_key), _join(grad_value)

    @abstractmethod
    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :meth:`forward`, without spans."""

    @abstractmethod
    def backward_whole(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        causal: bool,
    ) -> Gradients:
        """See :meth:`backward`, without spans."""

    def forward_packed(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans
    ) -> ForwardResult:
        """See :meth:`forward`, with several spans; of backends that pack."""
        raise NotImplementedError

    def backward_packed(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        spans: Spans,
    ) -> Gradients:
        """See :meth:`backward`, with several spans; of backends that pack."""
        raise NotImplementedError


def packed(tensor: Tensor) -> Tensor:
    """[1, heads, T, d] as [T, heads, d], a view."""
    return tensor[0].transpose(0, 1)


def unpacked(tensor: Tensor) -> Tensor:
    """[T, heads, d] as [1, heads, T, d], a view."""
    return tensor.transpose(0, 1)[None]


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Parts [1, heads, t, d] as one [1, heads, T, d], which lies in memory as [T, 1, heads, d]."""
    return torch.cat([part.permute(2, 0, 1, 3) for part in parts]).permute(1, 2, 0, 3)
