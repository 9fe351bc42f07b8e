"""One step of the optimizer, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from helixpipe.megatron_adapter.schedule import device
from megatron.pretrain.metrics import StepResult
from megatron.pretrain.model import TrainingState
from megatron.pretrain.settings.job import JobSettings


def take_step(settings: JobSettings, state: TrainingState) -> StepResult:
    """Let the optimizer change the weights, unless scaled gradients have overflowed; collective."""
    scale = float(state.optimizer.get_loss_scale()) if settings.precision.is_scaled else None
    has_stepped, grad_norm, num_zeros = state.optimizer.step()
    return StepResult(
        grad_norm=grad_norm,
        num_zeros_in_grad=None if num_zeros is None else int(num_zeros),
        params_norm=params_norm(state.model) if settings.output.log_params_norm else None,
        loss_scale=scale,
        is_skipped=not has_stepped,
    )


@torch.no_grad()
def params_norm(chunks: Iterable[torch.nn.Module]) -> float:
    """L2 norm of all weights of the model, each counted once; collective.

    Of 16-bit weights the optimizer's fp32 copy counts, as in Megatron-LM's ``calc_params_l2_norm``.

    Args:
        chunks: of this rank.
    """
    whole, sharded = [], []
    for chunk in chunks:
        for parameter in chunk.parameters():
            if not (param_is_not_tensor_parallel_duplicate(parameter) and param_is_not_shared(parameter)):
                continue
            copy = getattr(parameter, "main_param", None)
            if getattr(parameter, "main_param_sharded", False):
                # The part that this rank of them steps, if any.
                sharded += [] if copy is None else [copy]
            else:
                whole.append(parameter if copy is None else copy)
    squares = torch.stack([_sum_of_squares(whole), _sum_of_squares(sharded)])
    dist.all_reduce(squares[1:], group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return float(squares.sum().sqrt())


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """In fp32."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device=device())
    norms = [torch.linalg.vector_norm(tensor.data, dtype=torch.float32) for tensor in tensors]
    return torch.stack(norms).square().sum()
