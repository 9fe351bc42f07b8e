"""What models of 2024 and later have that Megatron's GPTModel lacks, for that model and for segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from helixpipe.layers.attention.windows import window_of
from helixpipe.layers.documents import Documents
from helixpipe.layers.elastic.positions import angles_at
from helixpipe.layers.module_specs import class_of, submodules_of
from helixpipe.layers.norm import TorchNorm
from helixpipe.layers.rotary import angles_of, build_rotary


@dataclass(frozen=True)
class Variants:
    """Differences from Megatron's GPTModel.

    Attributes:
        embedding_scale: factor of what the embedding gives.
        sandwich_norm: attention and MLP end with a norm, before the residual addition.
        rotary_base_local: of rotary positions in layers with windows; None for the same in all layers.
        attention_softcap: c in c * tanh(x / c), of attention's scaled scores; 0 for none.
        final_softcap: of the logits.
    """

    embedding_scale: float = 1.0
    sandwich_norm: bool = False
    rotary_base_local: int | None = None
    attention_softcap: float = 0.0
    final_softcap: float = 0.0


def variants_of(config: TransformerConfig) -> Variants:
    """The variants of a model; ``config.variants`` is ours, and not there in configurations of others."""
    found: Variants = getattr(config, "variants", Variants())
    return found


def check_local(config: TransformerConfig) -> None:
    """``ValueError`` for variants that only Megatron's local linear layers have."""
    if variants_of(config).sandwich_norm:
        raise ValueError(
            "norms after attention and MLP need Megatron's own layers; use --transformer-impl local"
        )


class NormedRowParallelLinear(RowParallelLinear):
    """A row-parallel layer whose result is normalized: [s, b, in/tp] -> [s, b, out], or a part of s."""

    def __init__(self, *args: Any, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__(*args, config=config, **arguments)
        self.post_layernorm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """See Megatron's layer."""
        output, bias = super().forward(input_)
        return self.post_layernorm(output), bias


def add_sandwich_norms(layer: ModuleSpec) -> None:
    """Let the last linear layers of attention and MLP normalize their results.

    Raises:
        ValueError: a mixture of experts.
    """
    mlp = layer.submodules.mlp
    if class_of(mlp) is not MLP:
        raise ValueError("norms after attention and MLP do not go with experts; leave one out")
    layer.submodules.self_attention.submodules.linear_proj = NormedRowParallelLinear
    submodules_of(mlp).linear_fc2 = NormedRowParallelLinear


def scale_embedding(embedding: torch.nn.Module, config: TransformerConfig) -> None:
    """Multiply what the embedding gives."""
    scale = variants_of(config).embedding_scale
    if scale != 1.0:
        embedding.register_forward_hook(
            lambda module, given, output: output * torch.tensor(scale, dtype=output.dtype)
        )


def cap_logits(head: torch.nn.Module, config: TransformerConfig) -> None:
    """Cap what the head gives, where a loss over slices asks for it, too."""
    cap = variants_of(config).final_softcap
    if cap:
        head.register_forward_hook(
            lambda module, given, output: (cap * torch.tanh(output[0] / cap), output[1])
        )


def output_scale(config: TransformerConfig) -> float:
    """By what muP multiplies logits; megatron-core has it since 0.17."""
    return float(config.mup_output_mult) if getattr(config, "use_mup", False) else 1.0


def scale_logits(head: torch.nn.Module, config: TransformerConfig) -> None:
    """Scale what the head gives, where a loss over slices asks for it, too."""
    scale = output_scale(config)
    if scale != 1.0:
        head.register_forward_hook(lambda module, given, output: (output[0] * scale, output[1]))


def build_local_rotary(config: TransformerConfig, group: Any) -> RotaryEmbedding | None:
    """What gives the angles in layers with windows, if they have a base of their own."""
    base = variants_of(config).rotary_base_local
    return None if base is None else build_rotary("rope", config, group, rotary_base=base)


def apply_variants(model: GPTModel, *, gives_angles: bool = True) -> None:
    """Make Megatron's model, or a stage of it, have what its configuration says.

    Args:
        model: changed in place.
        gives_angles: layers get rotary angles from it; else they make their own.
    """
    config = model.config
    if model.pre_process:
        scale_embedding(model.embedding, config)
    if model.post_process:
        cap_logits(model.output_layer, config)
    local = build_local_rotary(config, model.pg_collection.cp)
    if local is None or not gives_angles:
        return

    of_documents: WeakKeyDictionary[Documents, Tensor] = WeakKeyDictionary()

    def use_local_angles(
        layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        documents = kwargs.get("packed_seq_params")
        if isinstance(documents, Documents):
            # Of a micro batch, kept for the backward pass by all layers alike.
            if documents not in of_documents:
                of_documents[documents] = angles_at(local, documents.positions)
            angles = of_documents[documents]
        else:
            angles = angles_of(local, kwargs["rotary_pos_emb"].shape[0])
        return args, {**kwargs, "rotary_pos_emb": angles}

    for layer in model.decoder.layers:
        if window_of(config, layer.layer_number):
            layer.register_forward_pre_hook(use_local_angles, with_kwargs=True)
