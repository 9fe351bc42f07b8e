"""One step of the optimizer, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import get_model_config
from torch import Tensor

from helixpipe.layers.experts import is_of_expert
from helixpipe.megatron_adapter.schedule import device
from megatron.pretrain.metrics import StepResult
from megatron.pretrain.model import TrainingState
from megatron.pretrain.router_losses import take_router_losses
from megatron.pretrain.settings.job import JobSettings


def take_step(settings: JobSettings, state: TrainingState) -> StepResult:
    """Let the optimizer change the weights, unless scaled gradients have overflowed; collective."""
    scale = float(state.optimizer.get_loss_scale()) if settings.precision.is_scaled else None
    has_stepped, grad_norm, num_zeros = state.optimizer.step()
    router_losses = take_router_losses(settings)
    return StepResult(
        grad_norm=grad_norm,
        num_zeros_in_grad=None if num_zeros is None else int(num_zeros),
        params_norm=params_norm(state.model) if settings.output.log_params_norm else None,
        loss_scale=scale,
        is_skipped=not has_stepped,
        load_balancing_loss=router_losses.load_balancing,
        router_z_loss=router_losses.z,
    )


@torch.no_grad()
def params_norm(chunks: Sequence[torch.nn.Module]) -> float:
    """L2 norm of all weights of the model, each counted once; collective.

    Of 16-bit weights the optimizer's fp32 copy counts, as in Megatron-LM's ``calc_params_l2_norm``.

    Args:
        chunks: of this rank, as Megatron's ``DistributedDataParallel``.
    """
    _gather(chunks)
    shared, experts = _Weights([], []), _Weights([], [])
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        if not (param_is_not_tensor_parallel_duplicate(parameter) and param_is_not_shared(parameter)):
            continue
        whole, sharded = experts if is_of_expert(parameter) else shared
        copy = getattr(parameter, "main_param", None)
        if getattr(parameter, "main_param_sharded", False):
            # The part that this rank of them steps, if any.
            sharded += [] if copy is None else [copy]
        else:
            whole.append(parameter if copy is None else copy)
    total = shared.sum_of_squares(
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_model_parallel_group(),
    )
    if get_model_config(chunks[0]).num_moe_experts is not None:
        total += experts.sum_of_squares(
            parallel_state.get_expert_data_parallel_group(),
            parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        )
    return float(total.sqrt())


def _gather(chunks: Sequence[torch.nn.Module]) -> None:
    """Bring weights that other ranks have stepped, for which else the next forward pass waits; collective.

    16-bit ones are not read.
    """
    for chunk in chunks:
        is_read = any(parameter.dtype == torch.float32 for parameter in chunk.parameters())
        if is_read and chunk.ddp_config.overlap_param_gather:  # type: ignore[union-attr]
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator]


class _Weights(NamedTuple):
    """Weights of which every data-parallel rank has all, and those of which it has a part."""

    whole: list[Tensor]
    sharded: list[Tensor]

    def sum_of_squares(self, replicas: dist.ProcessGroup, model: dist.ProcessGroup) -> Tensor:
        """Over the ranks that have the model together; collective.

        Args:
            replicas: the ranks that have the other parts.
            model: the ranks that have the other weights.
        """
        squares = torch.stack([_sum_of_squares(self.whole), _sum_of_squares(self.sharded)])
        dist.all_reduce(squares[1:], group=replicas)
        dist.all_reduce(squares, group=model)
        return squares.sum()


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """In fp32."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device=device())
    norms = [torch.linalg.vector_norm(tensor.data, dtype=torch.float32) for tensor in tensors]
    return torch.stack(norms).square().sum()
