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
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_layer import TransformerLayer

_EXPERT = re.compile(r"^(.*\.local_experts\.)(\d+)(\..*)$")
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
        if isinstance(module, SequentialMLP)
    }
    for name, parameter in model.named_parameters():
        if getattr(parameter, "shared_embedding", False):
            # A tied head on the last stage is a copy of the embedding.
            yield "embedding.word_embeddings.weight", parameter
            continue
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
        group = _tensor_parallel_group(name)
        whole = torch.empty(_whole_shape(parameter, group), dtype=torch.float32, device="cpu")
        with torch.random.fork_rng(devices=[]):
            # One number from both: torch's CPU generator uses only 32 bits of its seed.
            torch.random.default_generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            initialize(whole)
        parameter.copy_(_shard(whole, parameter, group))


def _is_sharded(parameter: Any) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _tensor_parallel_group(name: str) -> dist.ProcessGroup:
    """The ranks that share a parameter; those of experts are others."""
    found: dist.ProcessGroup = (
        parallel_state.get_expert_tensor_parallel_group()
        if _EXPERT.match(name)
        else parallel_state.get_tensor_model_parallel_group()
    )
    return found


def _whole_shape(parameter: Any, group: dist.ProcessGroup) -> list[int]:
    shape = list(parameter.shape)
    if _is_sharded(parameter):
        shape[parameter.partition_dim] *= group.size()
    return shape


def _shard(whole: torch.Tensor, parameter: Any, group: dist.ProcessGroup) -> torch.Tensor:
    """This tensor-parallel rank's part; ``stride`` stacked blocks (SwiGLU's two) are split each."""
    if not _is_sharded(parameter):
        return whole
    rank, size = group.rank(), group.size()
    dim, stride = parameter.partition_dim, parameter.partition_stride
    return torch.cat([block.chunk(size, dim=dim)[rank] for block in whole.chunk(stride, dim=dim)], dim=dim)
