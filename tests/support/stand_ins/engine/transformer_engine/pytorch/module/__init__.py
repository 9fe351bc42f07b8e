"""Norms and linear layers of Transformer Engine, without tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, get_dummy_wgrad

# Shapes of gradients that were added to ``main_grad``.
fused: list[torch.Size] = []


class _LinearFunction(torch.autograd.Function):
    """Adds the weight's gradient to ``main_grad`` if it is told to; then what it returns means nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Parameter,
        input: Tensor,
        fuse_wgrad_accumulation: bool,
        is_first_microbatch: bool | None,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.weight = weight
        # The gradient of the first micro batch replaces what is there; None: none is the first.
        ctx.accumulate = not is_first_microbatch
        # Read before the backward pass, as the package does: a weight without it cannot be fused.
        ctx.main_grad = weight.main_grad if fuse_wgrad_accumulation and weight.requires_grad else None
        return input @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        input, weight = ctx.saved_tensors
        wgrad = grad.flatten(0, -2).t() @ input.flatten(0, -2)
        if ctx.main_grad is not None:
            if ctx.accumulate:
                ctx.main_grad.add_(wgrad)
            else:
                ctx.main_grad.copy_(wgrad)
            fused.append(wgrad.shape)
            assert hasattr(ctx.weight, "grad_added_to_main_grad"), "Megatron's wrapper marks its weights"
            ctx.weight.grad_added_to_main_grad = True
            zero = getattr(ctx.weight, "zero_out_wgrad", False)
            wgrad = get_dummy_wgrad(list(weight.shape), weight.dtype, zero)
        return wgrad, grad @ weight, None, None


class _Linear(TransformerEngineBaseModule):
    """What both linear layers share."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype | None,
        parallel_mode: str | None,
        device: str,
    ) -> None:
        super().__init__()
        if tp_size > 1 or sequence_parallel:
            raise NotImplementedError("the stand-in has no tensor parallelism")
        self.in_features, self.out_features = in_features, out_features
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.sequence_parallel, self.tp_group, self.tp_size = sequence_parallel, tp_group, tp_size
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        if bias:
            self.bias = Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))
        else:
            # Never None.
            self.bias = torch.empty(0, dtype=params_dtype)
        self._mark_parallel()

    def _mark_parallel(self) -> None:
        if self.parallel_mode is None:
            return
        is_row = self.parallel_mode == "row"
        marks = {"tensor_model_parallel": True, "partition_dim": int(is_row), "partition_stride": 1}
        vars(self.weight).update(marks)
        if self.use_bias and not is_row:
            vars(self.bias).update(marks)

    def _linear(self, input: Tensor, is_first_microbatch: bool | None) -> Any:
        fuse = self.fuse_wgrad_accumulation
        output = _LinearFunction.apply(self.weight, input, fuse, is_first_microbatch)
        if self.use_bias and not self.return_bias:
            output = output + self.bias
        return (output, self.bias) if self.return_bias else output

    def backward_dw(self) -> None:
        raise NotImplementedError


class Linear(_Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: str = "cuda",
        delay_wgrad_compute: bool = False,
    ) -> None:
        super().__init__(
            in_features, out_features, sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation, tp_group=tp_group, tp_size=tp_size, bias=bias,
            return_bias=return_bias, params_dtype=params_dtype, parallel_mode=parallel_mode, device=device,
        )  # fmt: skip

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._linear(inp, is_first_microbatch)


class LayerNormLinear(_Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: str = "cuda",
        delay_wgrad_compute: bool = False,
    ) -> None:
        super().__init__(
            in_features, out_features, sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation, tp_group=tp_group, tp_size=tp_size, bias=bias,
            return_bias=return_bias, params_dtype=params_dtype, parallel_mode=parallel_mode, device=device,
        )  # fmt: skip
        assert not return_layernorm_output
        assert not zero_centered_gamma
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.layer_norm_bias: Parameter | None = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = Parameter(torch.zeros(in_features, dtype=params_dtype, device=device))
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = sequence_parallel

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        size = (self.in_features,)
        if self.normalization == "LayerNorm":
            normed = functional.layer_norm(inp, size, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        else:
            normed = functional.rms_norm(inp, size, self.layer_norm_weight, self.eps)
        return self._linear(normed, is_first_microbatch)


def _one_of(size: int | None, old_name: int | None) -> int:
    """The size of a norm, which has had two names; megatron-core takes the new one since 0.17."""
    (given,) = (value for value in (size, old_name) if value is not None)
    return given


class LayerNorm(torch.nn.LayerNorm):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: str = "cuda",
    ) -> None:
        size = _one_of(normalized_shape, hidden_size)
        super().__init__(size, eps=eps, dtype=params_dtype, device=device)
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel


class RMSNorm(torch.nn.RMSNorm):
    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: str = "cuda",
    ) -> None:
        size = _one_of(normalized_shape, hidden_size)
        super().__init__(size, eps=eps, dtype=params_dtype, device=device)
        self.weight.sequence_parallel = sequence_parallel


class GroupedLinear(TransformerEngineBaseModule):
    """Of mixtures of experts."""
