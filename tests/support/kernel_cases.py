"""Inputs for kernels, and what they must compute: used with the loops of the processor and on a GPU.

``run(name, *arguments)`` is called with an operator's name. Results may be about as wrong as the reference's
own in the same type, which are rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helixpipe.kernels import reference

TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around the vectors of 4 and 8 elements, and of 16 for copies.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 127, 128, 1000)
# Elements by which a buffer misses 16-byte alignment.
SHIFTS = (0, 1, 2, 4)

Run = Callable[..., Any]


class Buffers:
    """Tensors within larger ones, so that writing past an end is seen.

    Args:
        device: of all of them.
        seed: of their contents.
    """

    GUARD = 32

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._wholes: list[tuple[Tensor, Tensor, int, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
        """A contiguous tensor of NaN, ``shift`` elements beyond an aligned address."""
        size = math.prod(shape)
        whole = torch.full((size + 2 * self.GUARD + shift,), math.nan, dtype=dtype, device=self.device)
        first = self.GUARD + shift
        self._wholes.append((whole, whole.clone(), first, first + size))
        return whole[first : first + size].view(shape)

    def random(self, *shape: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
        """The same with normally distributed values."""
        tensor = self.empty(*shape, dtype=dtype, shift=shift)
        drawn = torch.randn(shape, generator=self._generator, device=self.device)
        return tensor.copy_(drawn.to(dtype) * 2)

    def assert_guards_untouched(self) -> None:
        """Nothing before or after any tensor has changed."""
        for whole, before, first, last in self._wholes:
            for part in (slice(first), slice(last, None)):
                assert torch.equal(whole[part].isnan(), before[part].isnan())


def assert_as_exact(found: Tensor, exact: Tensor, rounded: Tensor, what: object) -> None:
    """The error against fp64 is at most twice the reference's in the same type, plus one rounding of fp32.

    Of few numbers the reference may have rounded all the right way: then four roundings.
    """
    assert not found.isnan().any(), what
    if not exact.numel():
        return
    norm = exact.double().norm()
    error, own = (
        float((value.double() - exact.double()).norm() / norm) if norm else float(value.norm())
        for value in (found, rounded)
    )
    roundings = 1 if exact.numel() > 500 else 4
    assert error <= 2 * own + roundings * 2**-23, (what, error, own)


def check_activation(
    run: Run, buffers: Buffers, name: str, dtype: torch.dtype, rows: int, length: int,
    shifts: tuple[int, ...], *, with_bias: bool, in_place: bool, **form: str,
) -> None:  # fmt: skip
    """Forward and backward of ``swiglu`` or ``gelu`` on [rows, length]; ``shifts`` of out, input and grad."""
    what = (name, form, dtype, rows, length, shifts, with_bias)
    factor = 2 if name == "swiglu" else 1
    out_shift, input_shift, grad_shift = shifts
    input = buffers.random(rows, factor * length, dtype=dtype, shift=input_shift)
    grad = buffers.random(rows, length, dtype=dtype, shift=grad_shift)
    bias = buffers.random(factor * length, dtype=dtype, shift=input_shift) if with_bias else None
    out = buffers.empty(rows, length, dtype=dtype, shift=out_shift)
    arguments = (input, bias, *form.values())
    run(name, out, *arguments)
    assert_as_exact(out, *_wanted(name, (rows, length), (), *arguments), what)
    backward = _wanted(f"{name}_backward", input.shape, (grad,), *arguments)
    grad_input = input if in_place else buffers.empty(rows, factor * length, dtype=dtype, shift=out_shift)
    run(f"{name}_backward", grad_input, grad, *arguments)
    assert_as_exact(grad_input, *backward, what)


def _wanted(name: str, shape: Any, grads: tuple[Tensor, ...], *arguments: Any) -> tuple[Tensor, Tensor]:
    """What the reference gives in fp64 and in the arguments' type."""
    like = arguments[0]
    results = []
    for dtype in (torch.float64, like.dtype):
        result = torch.empty(shape, dtype=dtype, device=like.device)
        cast = [a.to(dtype) if isinstance(a, Tensor) else a for a in (*grads, *arguments)]
        getattr(reference, name)(result, *cast)
        results.append(result)
    return results[0], results[1]


LAYOUTS = {"bhsd": (0, 1, 2), "sbhd": (2, 0, 1), "bshd": (0, 2, 1)}


def check_merge(
    run: Run, buffers: Buffers, dtype: torch.dtype, part_dtype: torch.dtype, size: tuple[int, int, int, int],
    layouts: tuple[str, str], shift: int = 0,
) -> None:  # fmt: skip
    """Outputs [b, h, s, d] of which some rows, on either side or both, saw no key."""
    what = (dtype, part_dtype, size, layouts, shift)
    output, part = (
        _laid_out(buffers, size, kind, layout, shift)
        for kind, layout in zip((dtype, part_dtype), layouts, strict=True)
    )
    sums = [buffers.random(*size[:3], dtype=torch.float32, shift=shift).mul_(3) for _ in range(2)]
    # By rows: own key missing, the part's, both, as FlashAttention-2 says it; far apart.
    for sum, marks in zip(sums, ((0, 2, 3), (1, 2, 4)), strict=True):
        flat = sum.view(-1)
        for row in marks:
            flat[row::11] = math.inf if row in (3, 4) else -math.inf
        flat[5::11] += 200 if sum is sums[0] else -200
    output[sums[0].isinf()] = math.nan
    part[sums[1].isinf()] = math.nan
    wide = [tensor.double() for tensor in (output, sums[0], part, sums[1])]
    own = [tensor.clone() for tensor in (output, sums[0], part, sums[1])]
    reference.merge_attention(*wide)
    reference.merge_attention(*own)
    run("merge_attention", output, sums[0], part, sums[1])
    assert_as_exact(output, wide[0], own[0], what)
    assert torch.equal(sums[0].isinf(), wide[1].isinf())
    finite = wide[1].isfinite()
    assert_as_exact(sums[0][finite], wide[1][finite], own[1][finite], what)


def _laid_out(buffers: Buffers, size: Any, dtype: torch.dtype, layout: str, shift: int) -> Tensor:
    axes = LAYOUTS[layout]
    dense = buffers.random(*(size[axis] for axis in axes), size[3], dtype=dtype, shift=shift)
    return dense.permute(*(axes.index(axis) for axis in range(3)), 3)


def check_accumulate(
    run: Run, buffers: Buffers, dtype: torch.dtype, count: int, shifts: tuple[int, int]
) -> None:
    """The sum is the one that torch rounds, too, to the bit."""
    total = buffers.random(count, dtype=torch.float32, shift=shifts[0])
    gradient = buffers.random(count, dtype=dtype, shift=shifts[1])
    expected = total + gradient.float()
    run("accumulate", total, gradient)
    assert torch.equal(total, expected), (dtype, count, shifts)


def messages(buffers: Buffers, dtype: torch.dtype) -> list[list[Tensor]]:
    """Messages of dense, odd, misaligned, strided, transposed and empty tensors, some of them many."""

    def dense(*shape: int, shift: int = 0) -> Tensor:
        return buffers.random(*shape, dtype=dtype, shift=shift)

    mixed = dense(24, 2, 3, 4 * 16)
    query, key, value = (mixed[..., i * 16 : (i + 1) * 16] for i in range(3))
    return [
        [dense(64, 2, 32), dense(64, 2, 16), dense(64, 2, 16), dense(64, 2, 32)],
        [query, key, value, dense(24, 2, 48)],
        *([dense(n, shift=shift)] for n in LENGTHS for shift in SHIFTS),
        [dense(3, shift=1), dense(0), dense(33, shift=3), dense(), dense(5, 7).t(), dense(130)[1:]],
        [dense(6, 10)[:, ::2], dense(4, 5, 6).permute(2, 0, 1), dense(3, 1, 5).expand(3, 4, 5)],
        [dense(2, 3, 4, 5, 6).permute(4, 2, 0, 3, 1), dense(17)],
        [dense(n % 5 + 1, 9) for n in range(37)],
        [],
    ]


def check_message(run: Run, buffers: Buffers, tensors: list[Tensor], dtype: torch.dtype, shift: int) -> None:
    """Bytes arrive where they belong."""
    count = sum(tensor.numel() for tensor in tensors)
    buffer = buffers.empty(count, dtype=dtype, shift=shift)
    run("pack", buffer, tensors)
    expected = torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else buffer
    assert torch.equal(buffer, expected), ([t.shape for t in tensors], shift)
