"""Compare what data-parallel ranks must have in common, bit by bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from helixpipe.layers.experts import is_of_expert
from helixpipe.megatron_adapter.schedule import device
from helixpipe.reliability.exit_codes import NumericsError
from megatron.pretrain.checkpoint.parameter_names import canonical_names
from megatron.pretrain.checkpoint.sums import bit_sum


def check_replicas(chunks: list[torch.nn.Module], iteration: int, *, with_gradients: bool) -> None:
    """Refuse to go on if weights, or reduced gradients, differ between data-parallel ranks; collective.

    Call it between the gradients' reduction and the optimizer's step.

    Args:
        chunks: this rank's model chunks, wrapped by Megatron's DistributedDataParallel.
        iteration: for the message.
        with_gradients: False with the distributed optimizer, where each rank has reduced another part.

    Raises:
        NumericsError: on every rank; names the first tensor and the ranks that differ from most others.
    """
    named = [pair for chunk in chunks for pair in canonical_names(chunk)]
    shared = [(name, parameter) for name, parameter in named if not is_of_expert(parameter)]
    experts = [(name, parameter) for name, parameter in named if is_of_expert(parameter)]
    everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = _difference(shared, with_gradients, everyone)
    if experts:
        # Of the others only some have the same ones.
        found = _difference(experts, with_gradients, parallel_state.get_expert_data_parallel_group()) or found
    is_wrong = torch.tensor(bool(found), dtype=torch.int, device=device())
    dist.all_reduce(is_wrong, op=dist.ReduceOp.MAX)
    if is_wrong:
        texts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, found)
        raise NumericsError(
            f"iteration {iteration}: {next(filter(None, texts))}; the optimizer has not stepped"
        )


def _difference(named: Sequence[tuple[str, Any]], with_gradients: bool, group: dist.ProcessGroup) -> str:
    """What differs first between the ranks of a group, in words; empty if nothing does; collective."""
    names, sums = _checksums(named, with_gradients)
    ranks = dist.get_process_group_ranks(group)
    everyone = [torch.empty_like(sums) for _ in ranks]
    dist.all_gather(everyone, sums, group=group)
    table = torch.stack(everyone).cpu()  # [data-parallel ranks, tensors]
    differing = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
    return _describe(names[differing[0]], ranks, table[:, differing[0]].tolist()) if differing else ""


def _checksums(named: Sequence[tuple[str, Any]], with_gradients: bool) -> tuple[list[str], torch.Tensor]:
    """Names of tensors, and the sum of each one's bit patterns as integers, [tensors]."""
    names, sums = [], []
    for name, parameter in named:
        names.append(f"the weight {name}")
        sums.append(bit_sum(parameter))
        if with_gradients:
            names.append(f"the gradient of {name}")
            sums.append(bit_sum(parameter.main_grad))
    return names, torch.stack(sums)


def _describe(name: str, ranks: list[int], sums: list[int]) -> str:
    common, count = Counter(sums).most_common(1)[0]
    others = [rank for rank, value in zip(ranks, sums, strict=True) if value != common]
    if 2 * count <= len(sums):
        return f"{name} differs between the data-parallel ranks {', '.join(map(str, ranks))}"
    return f"{name} on rank {', '.join(map(str, others))} differs from the other data-parallel ranks'"
