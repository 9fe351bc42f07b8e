"""LayerNorm and RMSNorm in plain PyTorch, usable under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional


class TorchNorm:
    """Builds ``torch.nn.LayerNorm`` or ``RMSNorm`` from a config, as Megatron's specs expect of a norm class.

    Megatron's own wrapper refuses sequence parallelism, although all it needs is that the partial weight
    gradients be summed over the tensor-parallel ranks, which the ``sequence_parallel`` mark asks for.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """The norm over the last dimension of size ``hidden_size``; ``ValueError`` if it is not known."""
        kinds: dict[str, type[torch.nn.Module]] = {
            "LayerNorm": torch.nn.LayerNorm,
            "RMSNorm": torch.nn.RMSNorm,
        }
        if config.layernorm_zero_centered_gamma:
            kinds = {"LayerNorm": ZeroCenteredLayerNorm, "RMSNorm": ZeroCenteredRMSNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization {config.normalization!r}; choose one of {', '.join(kinds)}")
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """Multiplies by 1 + weight; the weight starts at zero."""

    def reset_parameters(self) -> None:
        """Zeros."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """The norm over the last dimension."""
        return functional.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """Multiplies by 1 + weight; the weight starts at zero."""

    def reset_parameters(self) -> None:
        """Zeros."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """The norm over the last dimension."""
        return functional.rms_norm(input, self.normalized_shape, self.weight + 1, self.eps)
