"""Run a function over slices of the sequence, forward and backward, and keep only its input.

What the function computes in between exists for one slice at a time (HelixPipe, section "chunked MLP").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Parameter

from helixpipe.kernels.choice import add_gradient
from helixpipe.layers.borrowed_modules import with_same_weights


class SlicedFunction(NamedTuple):
    """A function of every position for itself.

    Attributes:
        forward: a slice [n, …] of the input, and of what goes with it -> [n, …]; draws no random numbers.
        again: what the backward pass runs in its place to get a graph. Its gradients are those of
            ``forward``, its result is not used.
        parameters: those that it differentiates; each is used by no other function.
        size: positions of a slice; the last one may be shorter.
    """

    forward: Callable[..., Tensor]
    again: Callable[..., Tensor]
    parameters: tuple[Parameter, ...]
    size: int


def in_slices(function: SlicedFunction, input: Tensor, *constants: Tensor) -> Tensor:
    """``function.forward(input, *constants)``, slice by slice along the first dimension.

    Args:
        function: see there.
        input: [s, …]; kept for the backward pass.
        constants: [s, …] each, not differentiated.

    Returns:
        [s, …], with what follows as ``function`` returns it.
    """
    function = function._replace(again=with_same_weights(function.again))
    output: Tensor = _InSlices.apply(function, input, len(constants), *constants, *function.parameters)
    return output


class _InSlices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: SlicedFunction, input: Tensor, num_constants: int, *tensors: Tensor
    ) -> Tensor:
        constants = tensors[:num_constants]
        ctx.function = function
        ctx.save_for_backward(input, *constants)
        result = None
        for part in _parts(input.shape[0], function.size):
            output = function.forward(input[part], *(constant[part] for constant in constants))
            if result is None:
                result = output.new_empty((input.shape[0], *output.shape[1:]))
            result[part] = output
        assert result is not None
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        function: SlicedFunction = ctx.function
        input, *constants = ctx.saved_tensors
        grad_input = torch.empty_like(input)
        wanted = [parameter for parameter in function.parameters if parameter.requires_grad]
        sums = [_GradientSum(parameter) for parameter in wanted]
        for part in _parts(input.shape[0], function.size):
            own = input[part].detach().requires_grad_()
            with torch.enable_grad():
                output = function.again(own, *(constant[part] for constant in constants))
            # Not backward(): a parameter's hooks are for its whole gradient.
            grad_own, *grads = torch.autograd.grad(output, [own, *wanted], grad[part].contiguous())
            grad_input[part] = grad_own
            for total, grad_parameter in zip(sums, grads, strict=True):
                total.add(grad_parameter)
        found = {id(total.parameter): total.result() for total in sums}
        of_parameters = [found.get(id(parameter)) for parameter in function.parameters]
        return None, grad_input, None, *(None for _ in constants), *of_parameters


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class _GradientSum:
    """A parameter's gradient over slices, summed in fp32 or better.

    Under Megatron's data-parallel wrapper it is summed in ``main_grad``, as fused weight-gradient
    accumulation does: the mark ``grad_added_to_main_grad`` tells the wrapper's hook, which runs once, to add
    nothing.
    """

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter
        main_grad: Tensor | None = getattr(parameter, "main_grad", None)
        self._in_place = main_grad is not None and main_grad.dtype in (torch.float32, torch.float64)
        if main_grad is not None and self._in_place:
            self._sum = main_grad
        else:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._sum = torch.zeros_like(parameter, dtype=dtype)

    def add(self, grad: Tensor) -> None:
        """Add one slice's share."""
        add_gradient(self._sum, grad)

    def result(self) -> Tensor:
        """What goes on to the parameter."""
        if not self._in_place:
            return self._sum.to(self.parameter.dtype)
        self.parameter.grad_added_to_main_grad = True
        # Zeros: the hook of a weight that is embedding and head adds them all the same.
        return torch.zeros_like(self.parameter)


def slice_mlp(linears: Sequence[Any]) -> None:
    """Mark the linear layers of an MLP that runs in slices.

    Raises:
        ValueError: they are not Megatron's own.
    """
    forwards = {type(linear).forward for linear in linears}
    if not forwards <= {ColumnParallelLinear.forward, RowParallelLinear.forward}:
        raise ValueError("a chunked MLP needs Megatron's own linear layers; use --transformer-impl local")
    mark_sliced(linears)


def mark_sliced(linears: Sequence[Any]) -> None:
    """Let Megatron's linear layers return their weight gradients, to be summed over slices.

    They neither add them to ``main_grad`` themselves nor leave them for later, see
    :func:`helixpipe.layers.weight_gradient.defer_weight_gradients`.
    """
    for linear in linears:
        linear.gradient_accumulation_fusion = False
        linear.runs_in_slices = True


def is_sliced(linear: Any) -> bool:
    """True for a layer that was marked."""
    return getattr(linear, "runs_in_slices", False)
