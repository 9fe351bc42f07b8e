"""What attention libraries refuse, in their stand-ins' own words; and what a stand-in was called with."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

# By function, the arguments of its last call that results do not show.
seen: dict[str, dict[str, Any]] = {}


def require(condition: bool, message: str) -> None:
    """``RuntimeError``, as PyTorch's own checks raise it."""
    if not condition:
        raise RuntimeError(message)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, *others: Tensor, heads: int) -> None:
    """One 16-bit type, dense heads of a good size, groups that divide the heads of dimension ``heads``."""
    require(query.dtype in HALF, f"query has {query.dtype}")
    for tensor in (query, key, value, *others):
        require(tensor.dtype == query.dtype, "one type is needed")
        require(tensor.stride(-1) == 1, "the last dimension must be contiguous")
        require(tensor.dim() == query.dim(), "one number of dimensions is needed")
    size = query.shape[-1]
    require(size % 8 == 0 and size <= 256, f"head size {size}")
    require(query.shape[heads] % key.shape[heads] == 0, "heads must be a multiple of groups")
    require(key.shape == value.shape, "key and value differ")
    for other in others:
        require(other.shape == query.shape, "outputs and their gradients have the query's shape")


def check_statistics(log_sum_exp: Tensor, shape: tuple[int, ...]) -> None:
    """Dense float32 of exactly this shape."""
    require(log_sum_exp.dtype is torch.float32, f"log-sum-exp has {log_sum_exp.dtype}")
    require(tuple(log_sum_exp.shape) == shape, f"log-sum-exp is {tuple(log_sum_exp.shape)}, not {shape}")
    require(log_sum_exp.is_contiguous(), "log-sum-exp must be contiguous")


def bounds_of(offsets: Tensor, longest: int, total: int) -> list[tuple[int, int]]:
    """First and last tokens of packed sequences, from their offsets."""
    require(offsets.dtype is torch.int32 and offsets.is_contiguous(), "offsets must be dense int32")
    require(type(longest) is int, "the longest length must be a Python number")
    starts = offsets.tolist()
    require(starts[0] == 0 and starts[-1] == total, "offsets must cover all tokens")
    bounds = list(pairwise(starts))
    require(longest == max(last - first for first, last in bounds), "not the longest length")
    return bounds


def check_places(places: tuple[Any, ...], wanted: tuple[Tensor, ...]) -> None:
    """Gradients are written into tensors like those that they are of."""
    for place, tensor in zip(places, wanted, strict=True):
        require(isinstance(place, Tensor), "a place for the gradient is needed")
        require(
            place.shape == tensor.shape and place.dtype == tensor.dtype, "a place has another shape or type"
        )
        require(place.stride(-1) == 1, "the last dimension of a place must be contiguous")
