"""Base of Transformer Engine's modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TransformerEngineBaseModule(torch.nn.Module):
    """Every module has a state of fp8 in its checkpoint, empty without fp8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set."""


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """What stands for a gradient that was added to ``main_grad``: uninitialized, here not a number."""
    return torch.full(shape, 0.0 if zero else float("nan"), dtype=dtype)
