"""One launch of every kernel on tiny tensors, held against the torch references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helixpipe.kernels import launch, reference

Arguments = tuple[Any, ...]
_ROWS, _WIDTH = 3, 16


def run(module: Any, device: torch.device) -> str:
    """What does not work on ``device``; empty if all kernels do.

    Args:
        module: the extension.
        device: where its kernels run.
    """
    for name, kernel, expected, arguments in _cases(module, device):
        found = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
        wanted = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
        try:
            kernel(*found)
            expected(*wanted)
            # Reading a result is what waits for a launch, and shows its error.
            is_right = all(
                torch.allclose(a, b, rtol=1e-3, atol=1e-5)
                for a, b in zip(found, wanted, strict=True)
                if isinstance(a, Tensor)
            )
        # A driver that is too old, another GPU, a broken library: whatever it is, torch takes over.
        except Exception as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            return f"{name}: {type(error).__name__}: {first_line}"
        if not is_right:
            return f"{name} computes wrong values"
    return ""


def _cases(
    module: Any, device: torch.device
) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], Arguments]]:
    """Name, kernel, reference, and the arguments of both."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    heads = (1, 2, _ROWS)
    merged = (random(*heads, _WIDTH), random(*heads), random(*heads, _WIDTH), random(*heads))
    yield "merge_attention", partial(launch.merge_attention, module), reference.merge_attention, merged
    narrow, wide, bias = random(_ROWS, _WIDTH), random(_ROWS, 2 * _WIDTH), random(2 * _WIDTH)
    activation: Callable[..., None] = partial(launch.activation, module)
    backward: Callable[..., None] = partial(launch.activation_backward, module)
    yield (
        "swiglu",
        lambda *tensors: activation(*tensors, launch.SWIGLU),
        reference.swiglu,
        (torch.empty_like(narrow), wide, bias),
    )
    yield (
        "swiglu_backward",
        lambda *tensors: backward(*tensors, launch.SWIGLU),
        reference.swiglu_backward,
        (torch.empty_like(wide), narrow, wide, bias),
    )
    for form, code in launch.GELU.items():
        gelu = (torch.empty_like(narrow), narrow, bias[:_WIDTH].contiguous())
        yield (
            f"gelu ({form})",
            lambda *tensors, code=code: activation(*tensors, code),
            partial(reference.gelu, approximate=form),
            gelu,
        )
        yield (
            f"gelu_backward ({form})",
            lambda *tensors, code=code: backward(*tensors, code),
            partial(reference.gelu_backward, approximate=form),
            (torch.empty_like(narrow), random(_ROWS, _WIDTH), narrow, gelu[2]),
        )
    parts = (random(_ROWS, 4).t(), random(5))
    yield (
        "pack",
        lambda buffer, *tensors: launch.pack(module, buffer, tensors),
        lambda buffer, *tensors: reference.pack(buffer, tensors),
        (random(4 * _ROWS + 5), *parts),
    )
    yield (
        "accumulate",
        partial(launch.accumulate, module),
        reference.accumulate,
        (random(_ROWS, _WIDTH), random(_ROWS, _WIDTH)),
    )
