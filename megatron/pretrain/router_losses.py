"""What the routers of experts add to the loss: read from Megatron's log of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)

from helixpipe.megatron_adapter.schedule import device
from megatron.pretrain.settings.job import JobSettings


class RouterLosses(NamedTuple):
    """Means over micro batches and layers with experts, without weights; None where there is no such loss.

    Attributes:
        load_balancing: 1 if all experts of a layer get as many tokens, and more the less evenly they do.
        z: mean square of the logits' log-sum-exp.
    """

    load_balancing: float | None = None
    z: float | None = None


def take_router_losses(settings: JobSettings) -> RouterLosses:
    """Those of an iteration, on every rank; the log is emptied. Collective, if the model has any."""
    experts = settings.experts
    has_balancing, has_z = experts.moe_aux_loss_coeff > 0, experts.moe_z_loss_coeff is not None
    if not (has_balancing or has_z):
        return RouterLosses()
    sums = torch.zeros(2, dtype=torch.float64, device=device())
    for name, logged in get_moe_layer_wise_logging_tracker().items():
        # Ranks that share tokens log parts of the one, and means over their own tokens of the other.
        shared = parallel_state.get_tensor_model_parallel_world_size() if name == "z_loss" else 1
        sums[int(name == "z_loss")] += logged["values"].sum() / shared
    clear_aux_losses_tracker()
    dist.all_reduce(sums)
    model = settings.workload.model
    count = (
        sum(map(model.has_experts, range(model.num_layers)))
        * settings.training.num_microbatches
        * parallel_state.get_data_parallel_world_size()
    )
    load_balancing, z = (sums / count).tolist()
    return RouterLosses(load_balancing if has_balancing else None, z if has_z else None)
