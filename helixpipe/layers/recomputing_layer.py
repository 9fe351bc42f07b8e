"""Megatron's transformer layer with less kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from helixpipe.kernels.choice import activate, fused_form
from helixpipe.layers.documents import Documents
from helixpipe.layers.experts import check_saving, recomputing, sliced, unsupported_experts
from helixpipe.layers.products import without_products
from helixpipe.layers.recompute import Tensors, recompute
from helixpipe.layers.rotary import is_rotated, rotate
from helixpipe.layers.slices import SlicedFunction, in_slices, slice_mlp
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.cost_model.levels import LEVELS
from helixpipe.refusals import refuse


@dataclass(frozen=True)
class MemorySaving:
    """What a model does to keep less.

    Attributes:
        recompute: what backward passes compute again, in every layer or in each: ``NONE``; ``PRODUCTS``:
            norms, rotary positions and activation functions; ``WITHOUT_ATTENTION``: QKV and fc1 besides.
        mlp_chunk_size: tokens of the sequence for which norm2 and MLP run at a time; None: all.
        loss_chunk_size: tokens of the sequence whose logits exist at a time; None: all.
    """

    recompute: Recompute | tuple[Recompute, ...] = Recompute.NONE
    mlp_chunk_size: int | None = None
    loss_chunk_size: int | None = None

    def __post_init__(self) -> None:
        assert set(self.levels) <= set(LEVELS)

    @property
    def levels(self) -> tuple[Recompute, ...]:
        """The levels that occur: one for all layers, or one for each."""
        return (self.recompute,) if isinstance(self.recompute, Recompute) else self.recompute

    @property
    def recomputes(self) -> bool:
        """True if some layer computes something again."""
        return set(self.levels) != {Recompute.NONE}

    def level(self, layer: int) -> Recompute:
        """What layer ``layer`` of the whole model, from 0, computes again."""
        return self.recompute if isinstance(self.recompute, Recompute) else self.recompute[layer]

    def changes_layer(self, layer: int) -> bool:
        """True if that layer runs otherwise than Megatron's."""
        return self.level(layer) is not Recompute.NONE or self.mlp_chunk_size is not None


NOTHING_SAVED = MemorySaving()


def local_size(chunk_size: int, config: TransformerConfig) -> int:
    """Positions of a slice of the residual: with sequence parallelism each rank has its share of them."""
    return max(1, chunk_size // (config.tensor_model_parallel_size if config.sequence_parallel else 1))


def check_supported(config: TransformerConfig, level: Recompute) -> None:
    """``ValueError`` for options that a :class:`SavingTransformerLayer` would ignore or get wrong."""
    recompute_of_mlp = config.recompute_granularity == "selective" and {"mlp", "moe"}.intersection(
        config.recompute_modules or ()
    )
    unsupported = {
        **unsupported_experts(config),
        "multi-latent attention": config.multi_latent_attention,
        "output-gated attention": config.attention_output_gate,
        "fused QKV rotary positions": config.fused_single_qkv_rope,
        "fp8 or fp4": bool(config.fp8 or config.fp4),
        "CPU offloading": config.cpu_offloading or config.fine_grained_activation_offloading,
        "CUDA graphs": config.cuda_graph_impl != "none",
        "Megatron's recomputation of the MLP": bool(recompute_of_mlp),
        "Megatron's activation recomputation": level is not Recompute.NONE
        and config.recompute_granularity is not None,
    }
    refuse(unsupported, "layers that recompute, or chunk their MLP, do not support {}; leave one out")


class SavingTransformerLayer(TransformerLayer):
    """Computes what Megatron's layer computes.

    Between forward and backward a layer keeps its input, attention output with log-sum-exp, and the input of
    norm2: 3 units of 17. Where matrix products are kept, it keeps the results of QKV and fc1, too. Masks of
    hidden dropout are kept; nothing that is computed again draws random numbers.

    Args:
        level: what the backward pass computes again.
        mlp_chunk_size: tokens of the sequence for which norm2 and MLP run at a time; None: all.
        arguments: Megatron's.

    Raises:
        ValueError: options that do not go with it, or an MLP that cannot run in slices.
    """

    def __init__(self, *, level: Recompute, mlp_chunk_size: int | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        check_supported(self.config, level)
        self.level = level
        self.mlp_chunk_size = mlp_chunk_size
        if self.is_moe_layer:
            check_saving(self.mlp, self.config, level, mlp_chunk_size)
        elif mlp_chunk_size is not None and hasattr(self.mlp, "linear_fc1"):
            slice_mlp((self.mlp.linear_fc1, self.mlp.linear_fc2))

    def query_key_value(self, hidden: Tensor) -> Tensors:
        """norm1 and QKV; [s, b, h] -> query [s, b, heads, d], key and value [s, b, groups, d]."""
        return query_key_value(self, self.level, hidden)

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Megatron's, with the core attention as the consumer of recomputed queries, keys and values."""
        if self.level is Recompute.NONE or not torch.is_grad_enabled():
            result: tuple[Tensor, None] = super()._forward_attention(hidden_states, *args, **kwargs)
            return result
        mask = args[0] if args else kwargs.pop("attention_mask", None)
        angles = kwargs.pop("rotary_pos_emb", None)
        documents = kwargs.pop("packed_seq_params", None)
        unknown = [name for name, value in kwargs.items() if value is not None]
        if len(args) > 1 or unknown:
            named = ", ".join(unknown) or "cross-attention"
            raise ValueError(f"recomputation without attention does not support {named}; leave it out")
        attention = self.self_attention

        def rotated(query: Tensor, key: Tensor, value: Tensor) -> Tensors:
            if angles is not None and is_rotated(self.config, self.layer_number):
                group = attention.pg_collection.cp
                query, key = (rotate(tensor, angles, self.config, group) for tensor in (query, key))
            return query, key, value

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = attention.attn_mask_type
            output: Tensor = attention.core_attention(
                query, key, value, mask, attn_mask_type=kind, packed_seq_params=documents
            )
            return output

        output = attend_to(self, self.level, hidden_states, rotated, attend)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(attention.linear_proj(output), hidden_states, self.hidden_dropout), None

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        padding_mask: Tensor | None = None,
        **later: Any,
    ) -> Tensor:
        """Megatron's, with fc2 as the consumer of a recomputed activation, or in slices.

        ``later`` takes what newer releases pass, like 0.19's ``packed_seq_params``, which is for attention.
        """
        result: Tensor
        if isinstance(later.get("packed_seq_params"), Documents):
            del later["packed_seq_params"]
        if any(value is not None for value in (inference_context, padding_mask, *later.values())):
            result = super()._forward_mlp(hidden_states, inference_context, padding_mask, **later)
            return result
        if self.is_moe_layer:
            return self._forward_experts(hidden_states)
        if self.mlp_chunk_size is not None:
            output = self._sliced_mlp(hidden_states, self.mlp_chunk_size)
        elif self.level is Recompute.PRODUCTS:
            (wide,) = recompute(
                lambda hidden: (self.pre_mlp_layernorm(hidden),),
                lambda normed: (self.mlp.linear_fc1(normed)[0],),
                hidden_states,
            )
            output = self._second_half(self._activation, wide)
        elif self.level is Recompute.WITHOUT_ATTENTION:
            output = self._second_half(self._first_half, hidden_states)
        else:
            result = super()._forward_mlp(hidden_states)
            return result
        # fc2 leaves its bias to the addition that follows; Transformer Engine's is never None.
        bias = self.mlp.linear_fc2.bias if self.config.add_bias_linear else None
        result = self._forward_post_mlp((output, bias), hidden_states)
        return result

    def _forward_experts(self, hidden: Tensor) -> Tensor:
        """norm2 and a mixture of experts, with the residual addition; [s, b, h] -> [s, b, h]."""
        result: Tensor
        if self.mlp_chunk_size is not None:
            size = local_size(self.mlp_chunk_size, self.config)
            output = in_slices(sliced(self.pre_mlp_layernorm, self.mlp, size), hidden)
        elif self.level is not Recompute.NONE:
            output = recomputing(self.pre_mlp_layernorm, self.mlp, self.level, hidden)
        else:
            result = super()._forward_mlp(hidden)
            return result
        # Experts have added their biases.
        result = self._forward_post_mlp((output, None), hidden)
        return result

    def _first_half(self, hidden: Tensor) -> Tensor:
        """norm2, fc1 and the activation function; [s, b, h] -> [s, b, ffn]."""
        return self._activation(self.mlp.linear_fc1(self.pre_mlp_layernorm(hidden))[0])

    def _activation(self, wide: Tensor) -> Tensor:
        """What stands between the products of fc1 and fc2, fc1's bias included; [s, b, .] -> [s, b, ffn]."""
        # Transformer Engine's bias is never None.
        bias = self.mlp.linear_fc1.bias if self.config.add_bias_linear else None
        form = fused_form(self.mlp, wide)
        if form is not None:
            return activate(wide, bias, form)
        output: Tensor = without_products(self.mlp, linear_fc1=bias, linear_fc2=None)(wide)[0]
        return output

    def _second_half(self, produce: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """fc2, as the consumer of an activation that is computed again."""
        (output,) = recompute(
            lambda given: (produce(given),),
            lambda activation: (self.mlp.linear_fc2(activation)[0],),
            input,
        )
        return output

    def _sliced_mlp(self, hidden: Tensor, chunk_size: int) -> Tensor:
        linear = self.mlp.linear_fc2
        parameters = (
            *self.pre_mlp_layernorm.parameters(),
            *self.mlp.linear_fc1.parameters(),
            linear.weight,
        )
        function = SlicedFunction(
            forward=lambda part: linear(self._first_half(part))[0],
            again=lambda part: _BackwardOfLinear.apply(self._first_half(part), linear.weight, linear),
            parameters=parameters,
            size=local_size(chunk_size, self.config),
        )
        return in_slices(function, hidden)


def query_key_value(layer: TransformerLayer, level: Recompute, hidden: Tensor) -> Tensors:
    """norm1 and QKV, of which the backward pass computes the norm again unless everything is kept.

    Args:
        layer: norm1 and QKV are its own, or have borrowed weights.
        level: of the layer that they belong to.
        hidden: [s, b, h].

    Returns:
        Query [s, b, heads, d], key and value [s, b, groups, d].
    """
    project, norm = layer.self_attention.get_query_key_value_tensors, layer.input_layernorm
    if level is Recompute.NONE:
        output: Tensors = project(norm(hidden))
        return output
    # QKV's weight gradient needs the norm's output; QKV's own is sent away.
    return recompute(lambda hidden: (norm(hidden),), project, hidden)


def attend_to(
    layer: TransformerLayer,
    level: Recompute,
    hidden: Tensor,
    rotated: Callable[[Tensor, Tensor, Tensor], Tensors],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """norm1, QKV, rotary positions and the core attention, of which the backward pass computes some again.

    Args:
        layer: norm1 and QKV are its own, or have borrowed weights.
        level: ``PRODUCTS`` or ``WITHOUT_ATTENTION``.
        hidden: [s, b, h].
        rotated: query, key and value with their positions.
        attend: the core attention.

    Returns:
        Attention's output, [s, b, heads * d].
    """
    attention, norm = layer.self_attention, layer.input_layernorm

    def consume(*values: Tensor) -> Tensors:
        return (attend(*values),)

    if level is Recompute.WITHOUT_ATTENTION:
        project = attention.get_query_key_value_tensors
        (output,) = recompute(lambda hidden: rotated(*project(norm(hidden))), consume, hidden)
        return output
    (mixed,) = recompute(
        lambda hidden: (norm(hidden),), lambda normed: (attention.linear_qkv(normed)[0],), hidden
    )
    split = without_products(attention, linear_qkv=None).get_query_key_value_tensors
    (output,) = recompute(lambda mixed: rotated(*split(mixed)), consume, mixed)
    return output


class _BackwardOfLinear(torch.autograd.Function):
    """A row-parallel layer whose result nobody needs any more; [s, b, in/tp] -> [s, b, out].

    In sequence parallelism the result is this rank's part, [s/tp, b, out].
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, linear: RowParallelLinear) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.linear = linear
        length = input.shape[0] // (linear.tp_group.size() if linear.sequence_parallel else 1)
        return input.new_empty((length, *input.shape[1:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        input, weight = ctx.saved_tensors
        if ctx.linear.sequence_parallel:
            grad = tensor_parallel.gather_from_sequence_parallel_region(grad, group=ctx.linear.tp_group)
        grad_weight = grad.flatten(0, -2).t().matmul(input.flatten(0, -2))
        return grad.matmul(weight), grad_weight, None
