"""Megatron's core attention by one of the backends, without the s x s score matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from helixpipe.layers.attention.choice import AUTO, choose, problem_of, problem_with
from helixpipe.layers.attention.context_parallel import context_attention
from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult, Spans
from helixpipe.layers.attention.sinks import merge_sink, sink_gradient
from helixpipe.layers.attention.windows import WindowAttention, window_of
from helixpipe.layers.documents import Documents
from helixpipe.refusals import refuse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        scale: float,
        backend: AttentionBackend,
    ) -> Tensor:
        ctx.backend, ctx.scale = backend, scale
        result = backend.forward(query, key, value, scale)
        ctx.extra = result.extra
        output, log_sum_exp = merge_sink(result.output, result.log_sum_exp, sink)
        ctx.save_for_backward(query, key, value, output, log_sum_exp, sink)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp, sink = ctx.saved_tensors
        result = ForwardResult(output, log_sum_exp, ctx.extra)
        gradients = ctx.backend.backward(grad, query, key, value, result, ctx.scale)
        return (*gradients, sink_gradient(grad, output, log_sum_exp, sink), None, None)


class _DocumentAttention(torch.autograd.Function):
    """Sequence by sequence, for documents lie elsewhere in each; one launch each where kernels pack."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        scale: float,
        backend: AttentionBackend,
        rows: tuple[Spans, ...],
    ) -> Tensor:
        ctx.backend, ctx.scale, ctx.rows = backend, scale, rows
        results = []
        for row, spans in enumerate(rows):
            own_query, own_key, own_value = (tensor[row : row + 1] for tensor in (query, key, value))
            results.append(backend.forward(own_query, own_key, own_value, scale, spans=spans))
        ctx.extra = [result.extra for result in results]
        output = _stacked([result.output for result in results])
        log_sum_exp = _stacked([result.log_sum_exp for result in results])
        output, log_sum_exp = merge_sink(output, log_sum_exp, sink)
        ctx.save_for_backward(query, key, value, output, log_sum_exp, sink)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = []
        *saved, sink = ctx.saved_tensors
        for row, (spans, extra) in enumerate(zip(ctx.rows, ctx.extra, strict=True)):
            own_grad, query, key, value, output, log_sum_exp = (
                tensor[row : row + 1] for tensor in (grad, *saved)
            )
            result = ForwardResult(output, log_sum_exp, extra)
            gradients.append(
                ctx.backend.backward(own_grad, query, key, value, result, ctx.scale, spans=spans)
            )
        of_sink = sink_gradient(grad, saved[3], saved[4], sink)
        return (*(_stacked(parts) for parts in zip(*gradients, strict=True)), of_sink, None, None, None)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    backend: AttentionBackend | None = None,
    documents: Documents | None = None,
    sink: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Causal attention over a whole sequence, or within each of its documents.

    Args:
        query: [s, b, heads, d].
        key: [s, b, groups, d]; groups divides heads.
        value: like ``key``.
        scale: factor of the scores, ``1/sqrt(d)`` if None.
        backend: what computes it; None: the fastest that works.
        documents: of the sequences; None: each is one.
        sink: scores of the heads' attention sinks, [heads]; None for no sinks.
        group: of context parallelism, whose ranks share each sequence; None: it is whole here.

    Returns:
        [s, b, heads * d].
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    if backend is None:
        backend = choose(AUTO, problem_with(query, key)).backend
    output: Tensor
    if group is not None:
        assert sink is None, "refused where layers are built"
        output = context_attention(query, key, value, scale, backend, group)
    elif documents is None:
        output = _Attention.apply(query, key, value, sink, scale, backend)
    else:
        output = _DocumentAttention.apply(query, key, value, sink, scale, backend, documents.rows)
    return output.permute(2, 0, 1, 3).flatten(2)


class FlashCoreAttention(MegatronModule):
    """Megatron's core-attention slot, filled with :func:`causal_attention`.

    The backend is chosen here and not at the first use: it is tried, and a pipeline that already runs must
    not wait for that.

    Args:
        backend: name of the attention backend, or ``auto``.
        documents: attention ends at documents, which lie elsewhere in every batch.
        pg_collection: Megatron's groups, of which that of context parallelism is used.

    Attributes:
        window: how many tokens a token sees, its own included; 0 for all before it.
        softmax_offset: scores of the heads' attention sinks, as Megatron calls them, [heads of this rank],
            where they are learned (``softmax_type`` ``learnable``); else None.

    Raises:
        ValueError: attention dropout, which these kernels do not have, a backend that does not work, or what
            does not go with context parallelism.
    """

    # Lengths of sequences are those of the configuration.
    _varies = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        backend: str = AUTO,
        documents: bool = False,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(
                f"--attention-backend {backend} has no dropout ({dropout}); use unfused, or "
                "--attention-dropout 0"
            )
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError("only causal self-attention is supported")
        self.window = window = window_of(config, layer_number)
        self._group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            unsupported = {
                "--window-size": bool(window),
                f"--softmax-type {config.softmax_type}": config.softmax_type != "vanilla",
                "--reset-attention-mask": documents,
                "a schedule that cuts sequences": self._varies,
            }
            refuse(unsupported, "{} does not go with --context-parallel-size above 1; leave one out")
            self._group = pg_collection.cp
        if config.apply_query_key_layer_scaling:
            raise ValueError("query-key layer scaling is not supported; it only serves fp16 softmax")
        self.scale = softmax_scale
        self.backend = choose(backend, problem_of(config, varies=self._varies or documents)).backend
        if window and not self._varies:
            self.backend = WindowAttention(self.backend, window)
        self.softmax_offset = _sinks_of(config) if config.softmax_type == "learnable" else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """[s, b, heads, d], [s, b, groups, d] twice -> [s, b, heads * d].

        The mask argument exists for Megatron's calling convention: the mask is causal by construction, and
        where there are :class:`Documents`, given as packed-sequence parameters, ends with each of them.
        ``sink`` stands for the module's own ``softmax_offset``.
        """
        if attention_bias is not None or not isinstance(packed_seq_params, Documents | None):
            raise ValueError("attention bias and Megatron's packed sequences are not supported")
        sink = self.sink_for(query, sink)
        return causal_attention(
            query, key, value, self.scale, self.backend, packed_seq_params, sink, self._group
        )

    def sink_for(self, query: Tensor, given: Tensor | None) -> Tensor | None:
        """Scores of the sinks of this rank's heads, if the model has sinks."""
        if self.config.softmax_type == "off-by-one":
            return query.new_zeros(query.shape[2])
        return self.softmax_offset if given is None else given

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks, which tensor-parallel ranks share like heads."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return state


def _sinks_of(config: TransformerConfig) -> torch.nn.Parameter:
    """Of this rank's heads, with the marks of a weight that tensor-parallel ranks share."""
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    sinks = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device))
    set_tensor_model_parallel_attributes(sinks, True, 0, 1)
    if config.perform_initialization:
        config.init_method(sinks)
    return sinks
