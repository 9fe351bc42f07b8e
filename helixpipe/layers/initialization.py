"""Weights that depend on the seed and the parameter's name, not on how the model is laid out.

Megatron draws initial weights rank by rank, so another pipeline size or schedule starts from another
model. Here each parameter has a random stream of its own: the same command under 1f1b, interleaved and
helix starts from the same numbers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_layer import TransformerLayer

_EXPERT = re.compile(r"^(.*\.local_experts\.)(\d+)(\..*)$")
# Of experts in one product, whose number ends the name.
_GROUPED = re.compile(r"^(.*\.)(linear_fc[12]\.(?:weight|bias))(\d+)$")
_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def canonical_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in the whole model, parameter) for a GPTModel of any stage or a SegmentedGPTModel."""
    layer_names = {
        f"{name}.": f"decoder.layers.{module.layer_number - 1}."
        for name, module in model.named_modules()
        if isinstance(module, TransformerLayer)
    }
    # Each rank counts its own experts from 0.
    first_experts = {
        f"{name}.local_experts.": module.num_local_experts * module.ep_group.rank()
        for name, module in model.named_modules()
        if isinstance(module, (SequentialMLP, TEGroupedMLP))
    }
    for name, parameter in model.named_parameters():
        if getattr(parameter, "shared_embedding", False):
            # A tied head on the last stage is a copy of the embedding.
            yield "embedding.word_embeddings.weight", parameter
            continue
        grouped = _GROUPED.match(name)
        if grouped is not None and f"{grouped[1]}local_experts." in first_experts:
            name = f"{grouped[1]}local_experts.{grouped[3]}.{grouped[2]}"
        expert = _EXPERT.match(name)
        if expert is not None:
            name = f"{expert[1]}{first_experts[expert[1]] + int(expert[2])}{expert[3]}"
        for local, canonical in layer_names.items():
            if name.startswith(local):
                name = canonical + name[len(local) :]
                break
        yield name, parameter


@contextmanager
def deferred_initialization(config: TransformerConfig) -> Iterator[None]:
    """Build a model without drawing its weights, which :func:`initialize_weights` does afterwards.

    Megatron's own switch for this, ``perform_initialization``, also leaves out the marks that tell which
    parameters are split over tensor-parallel ranks.
    """
    names = ("init_method", "output_layer_init_method", "embedding_init_method")
    methods = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, lambda weight: weight)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(config, name, method)


@torch.no_grad()
def initialize_weights(model: torch.nn.Module, config: TransformerConfig, seed: int) -> None:
    """Draw every weight matrix of ``model`` anew and set biases to zero.

    Args:
        model: an unwrapped GPTModel or SegmentedGPTModel.
        config: its configuration, whose init methods are used.
        seed: the job's seed.
    """
    for name, parameter in canonical_parameters(model):
        if name.endswith("bias"):
            parameter.zero_()
            continue
        if parameter.dim() < 2 and not name.endswith("softmax_offset"):
            continue  # norm weights start at one
        initialize = config.init_method
        if name.endswith(_OUTPUT_PROJECTIONS):
            initialize = config.output_layer_init_method
        elif name.startswith("embedding.") and config.embedding_init_method is not None:
            initialize = config.embedding_init_method
        group, cut = _tensor_parallel_group(name), _cut_of(name, parameter, config)
        shape = list(parameter.shape)
        if cut is not None:
            shape[cut.dim] *= group.size()
        whole = torch.empty(shape, dtype=torch.float32, device="cpu")
        with torch.random.fork_rng(devices=[]):
            # One number from both: torch's CPU generator uses only 32 bits of its seed.
            torch.random.default_generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            initialize(whole)
        parameter.copy_(whole if cut is None else _shard(whole, cut, group))


class _Cut(NamedTuple):
    """How tensor-parallel ranks share a parameter: each of ``stride`` stacked blocks is cut along ``dim``."""

    dim: int
    stride: int


def _cut_of(name: str, parameter: Any, config: TransformerConfig) -> _Cut | None:
    """As the parameter's marks say; None for one that every rank has whole.

    Experts of Transformer Engine's layers have no marks: Megatron hides from these that they are shared.
    """
    if getattr(parameter, "tensor_model_parallel", False):
        return _Cut(parameter.partition_dim, parameter.partition_stride)
    if _EXPERT.match(name) and name.endswith("linear_fc1.weight"):
        return _Cut(0, 2 if config.gated_linear_unit else 1)
    if _EXPERT.match(name) and name.endswith("linear_fc2.weight"):
        return _Cut(1, 1)
    return None


def _tensor_parallel_group(name: str) -> dist.ProcessGroup:
    """The ranks that share a parameter; those of experts are others."""
    found: dist.ProcessGroup = (
        parallel_state.get_expert_tensor_parallel_group()
        if _EXPERT.match(name)
        else parallel_state.get_tensor_model_parallel_group()
    )
    return found


def _shard(whole: torch.Tensor, cut: _Cut, group: dist.ProcessGroup) -> torch.Tensor:
    """This tensor-parallel rank's part; stacked blocks (SwiGLU's two) are split each."""
    blocks = whole.chunk(cut.stride, dim=cut.dim)
    return torch.cat([block.chunk(group.size(), dim=cut.dim)[group.rank()] for block in blocks], dim=cut.dim)
