"""LayerNorm and RMSNorm in plain PyTorch, usable under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class TorchNorm:
    """Builds ``torch.nn.LayerNorm`` or ``RMSNorm`` from a config, as Megatron's specs expect of a norm class.

    Megatron's own wrapper refuses sequence parallelism, although all it needs is that the partial weight
    gradients be summed over the tensor-parallel ranks, which the ``sequence_parallel`` mark asks for.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """The norm over the last dimension of size ``hidden_size``; ``ValueError`` if it is not known."""
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization {config.normalization!r}; choose one of {', '.join(kinds)}")
        if config.layernorm_zero_centered_gamma:
            raise ValueError("zero-centered norm weights need Transformer Engine")
        norm: torch.nn.Module = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
