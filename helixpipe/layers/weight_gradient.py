"""Megatron's parallel linear layers with a backward pass in two parts: input now, weight later.

Zero Bubble Pipeline Parallelism (Qi et al. 2023, section 2) splits the backward pass of a linear layer: only
the input gradient is on the pipeline's critical path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from helixpipe.contact_points import replace
from helixpipe.layers.slices import is_sliced
from helixpipe.refusals import refuse

Defer = Callable[[Callable[[], None]], None]


def defer_weight_gradients(model: torch.nn.Module, defer: Defer) -> None:
    """Make the linear layers of ``model`` hand their weight gradients to ``defer``.

    The forward pass is Megatron's. In the backward pass a layer computes (and reduces over tensor-parallel
    ranks) its input gradient, adds up its bias, and calls ``defer`` with the rest of the work. That work adds
    to the weight's gradient through autograd, so every hook on it runs as if it came from the backward pass.
    Norms, biases and embeddings stay with the input gradient: they cost next to nothing. So do layers that
    run in slices, whose inputs and gradients are gone when the slice is done.

    Raises:
        ValueError: layers whose backward pass cannot be split.
    """
    for name, module in model.named_modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            if is_sliced(module):
                continue
            _check(name, module)
            # In the place of the function only: the layer's own forward arranges the communication around it.
            kind = ColumnParallelLinear if isinstance(module, ColumnParallelLinear) else RowParallelLinear
            split = partial(_linear, module._forward_impl, defer)
            replace(f"megatron.core.tensor_parallel:{kind.__name__}", "_forward_impl", split, on=module)
        elif hasattr(module, "backward_dw") and list(module.parameters(recurse=False)):
            raise ValueError(
                f"{name} ({type(module).__name__}) cannot leave its weight gradient for later; "
                "use --transformer-impl local"
            )


def _check(name: str, module: ColumnParallelLinear | RowParallelLinear) -> None:
    config = module.config
    unsupported = {
        "gradient_accumulation_fusion": config.gradient_accumulation_fusion,
        "defer_embedding_wgrad_compute": config.defer_embedding_wgrad_compute,
        "enable_autocast": config.enable_autocast,
    }
    refuse(unsupported, f"{name}: {{}} does not go with split backward passes; switch it off")


class _Layer(NamedTuple):
    """What a backward pass needs beside tensors. The weight is in here, where autograd does not see it."""

    weight: torch.nn.Parameter
    reduces_input_gradient: bool
    sequence_parallel: bool
    group: dist.ProcessGroup | None
    defer: Defer


def _linear(
    unsplit: Callable[..., Tensor],
    defer: Defer,
    input: Tensor,
    weight: torch.nn.Parameter,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None = None,
    grad_output_buffer: None = None,
    wgrad_deferral_limit: int | None = None,
    **later: int,
) -> Tensor:
    """Stands for a layer's ``_forward_impl``, with its signature; ``unsplit`` is Megatron's own.

    ``later`` takes what newer releases pass: since 0.19 over how many ranks a weight is sharded besides.
    """
    refuse(
        {name: value != 1 for name, value in later.items()},
        "{} does not go with split backward passes; leave it out",
    )
    # Without an input gradient there is nothing to split: the backward pass is the weight gradient.
    if torch.is_grad_enabled() and weight.requires_grad and input.requires_grad:
        layer = _Layer(weight, allreduce_dgrad, sequence_parallel, tp_group, defer)
        output: Tensor = _SplitLinear.apply(input, bias, layer)
        return output
    return unsplit(
        input=input,
        weight=weight,
        bias=bias,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        allreduce_dgrad=allreduce_dgrad,
        sequence_parallel=sequence_parallel,
        tp_group=tp_group,
        grad_output_buffer=grad_output_buffer,
        wgrad_deferral_limit=wgrad_deferral_limit,
        **later,
    )


class _SplitLinear(torch.autograd.Function):
    """``input @ weight.t() + bias``; [s, b, in] -> [s, b, out].

    In sequence parallelism the input is this rank's part, [s/tp, b, in], and the output the whole sequence.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        ctx.save_for_backward(input)
        ctx.layer, ctx.has_bias = layer, bias is not None
        output = torch.matmul(_whole_sequence(input, layer), layer.weight.t())
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (input,), layer = ctx.saved_tensors, ctx.layer
        grad_input = grad_output.matmul(layer.weight)
        handle = None
        if layer.reduces_input_gradient:
            handle = dist.all_reduce(grad_input, group=layer.group, async_op=True)
        elif layer.sequence_parallel:
            whole, grad_input = grad_input, input.new_empty(input.shape)
            handle = dist.reduce_scatter_tensor(grad_input, whole, group=layer.group, async_op=True)
        # While the gradient travels. In sequence parallelism only this rank's part of the input is kept.
        layer.defer(partial(_accumulate, layer, input, grad_output))
        grad_bias = grad_output.flatten(0, -2).sum(dim=0) if ctx.has_bias else None
        if handle is not None:
            handle.wait()
        return grad_input, grad_bias, None


def _whole_sequence(input: Tensor, layer: _Layer) -> Tensor:
    """The input of all tensor-parallel ranks, [s, b, in], where each has a part of the sequence."""
    if not layer.sequence_parallel:
        return input
    assert layer.group is not None
    whole: Tensor = parallel_state.get_global_memory_buffer().get_tensor(
        [input.shape[0] * layer.group.size(), *input.shape[1:]], input.dtype, "mpu"
    )
    dist.all_gather_into_tensor(whole, input.contiguous(), group=layer.group)
    return whole


class _WeightGradient(torch.autograd.Function):
    """An empty result, whose backward pass is the weight's gradient and nothing else.

    A gradient given to ``torch.autograd.backward`` would be copied, since its caller still holds it; one that
    a node returns becomes ``weight.grad`` as it is.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        ctx.compute = compute
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, nothing: Tensor) -> tuple[Tensor, None]:
        return ctx.compute(), None


def _accumulate(layer: _Layer, input: Tensor, grad_output: Tensor) -> None:
    """Add ``grad_output.t() @ input`` to the weight's gradient, by a backward pass of one node.

    Megatron's data-parallel wrapper has hooked itself to the weight's accumulation: there it adds to
    ``main_grad`` and counts the gradient as ready.
    """
    with torch.enable_grad():
        start = _WeightGradient.apply(layer.weight, partial(_gradient, layer, input, grad_output))
    torch.autograd.backward(start, start.detach())


def _gradient(layer: _Layer, input: Tensor, grad_output: Tensor) -> Tensor:
    whole = _whole_sequence(input, layer)
    return grad_output.flatten(0, -2).t().matmul(whole.flatten(0, -2))
