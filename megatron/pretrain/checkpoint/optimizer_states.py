"""States of optimizers in checkpoints, with the counts of steps that Megatron loses or cannot load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# Stands for a weight where an optimizer has none; torch keeps states under any key.
_NO_WEIGHT = "no weight"


def sharded_states(
    optimizer: Any, models: Mapping[str, Any], metadata: dict[str, Any], *, is_loading: bool
) -> dict[Any, Any]:
    """An optimizer's states as Megatron's ``dist_checkpointing`` takes them.

    Experts have an optimizer of their own, which has no weights on a rank whose layers have no experts. A
    checkpoint takes the count of steps from rank 0, for all ranks.

    Args:
        optimizer: Megatron's, for one kind of weights or for several.
        models: sharded states of the model chunks, by the chunks' names.
        metadata: the form of the states.
        is_loading: the result is to be loaded into.
    """
    if is_loading:
        for part in _distributed_torch_adams(optimizer).values():
            _start_steps(part)
    with _counting_without_weights(optimizer):
        found: dict[Any, Any] = optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    return found


def load_states(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Load the states of an optimizer, or of those of shared weights and of experts."""
    parts = _parts(optimizer)
    torch_adams = _distributed_torch_adams(optimizer)
    if torch_adams:
        for number in range(len(parts)):
            _load_with_steps(torch_adams[number], loaded if len(parts) == 1 else loaded[number])
    else:
        optimizer.load_state_dict(loaded)
    for part in parts:
        part.optimizer.state.pop(_NO_WEIGHT, None)


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _distributed_torch_adams(optimizer: Any) -> dict[int, DistributedOptimizer]:
    """Distributed optimizers that shard torch's Adam, whose step counts Megatron cannot load, by number.

    Apex and Transformer Engine bring an Adam that keeps one count for all parameters.
    """
    return {
        number: part
        for number, part in enumerate(_parts(optimizer))
        if isinstance(part, DistributedOptimizer)
        and isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))
    }


@contextmanager
def _counting_without_weights(optimizer: Any) -> Iterator[None]:
    """While it lasts, what has no weights has counted as many steps as the others."""
    states = [part.optimizer.state for part in _parts(optimizer)]
    steps = [state["step"] for of_part in states for state in of_part.values() if "step" in state]
    groups = [group for part in _parts(optimizer) for group in part.optimizer.param_groups]
    fused_steps = [group["step"] for group in groups if group["params"] and "step" in group]
    for of_part in states:
        if steps and not of_part:
            of_part[_NO_WEIGHT] = {"step": steps[0]}
    for group in groups:
        # Apex and Transformer Engine count by group.
        if fused_steps and not group["params"]:
            group["step"] = fused_steps[0]
    try:
        yield
    finally:
        for part in _parts(optimizer):
            part.optimizer.state.pop(_NO_WEIGHT, None)


def _start_steps(optimizer: DistributedOptimizer) -> None:
    """Megatron reads the step counts even to prepare for loading, when there are none yet."""
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    for state in optimizer.optimizer.state.values():
        state["step"] = torch.zeros(())


def _load_with_steps(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """Load, keeping the step counts out of Megatron's way.

    It would look for them among the sharded tensors, where they are not, and it gives all parameters one
    tensor, which every one of them would count up.
    """
    sharded = loaded.pop("param_state", {})  # which is not there where there are no weights
    optimizer.load_state_dict(loaded)
    states = optimizer.optimizer.state
    steps = {parameter: state.pop("step").clone() for parameter, state in states.items()}
    optimizer.load_parameter_state_from_fully_reshardable(sharded)
    for parameter, step in steps.items():
        states[parameter]["step"] = step
