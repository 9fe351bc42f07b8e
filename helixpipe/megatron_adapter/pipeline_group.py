"""The pipeline ranks as a group: what they must agree on, and how messages travel between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from helixpipe.plan import Plan
from helixpipe.runtime.communicator import Communicator, TorchCommunicator

# NCCL needs two to four to fill a network card, which is what a message between pipeline ranks has.
MAX_BLOCKS_OF_A_MESSAGE = 4


def agree_on_plan(plan: Plan, size: tuple[Any, ...], dtype: torch.dtype, group: dist.ProcessGroup) -> None:
    """Compare plan and message sizes over the pipeline ranks before the first message.

    Raises:
        ValueError: on every rank if one differs; gloo would deliver garbage without an error.
    """
    names = (
        "plan", "dtype", "micro batches", "sequence length", "micro batch size", "forward only",
        "elements over all edges",
    )  # fmt: skip
    agree(dict(zip(names, (plan.fingerprint[:16], str(dtype), *size), strict=True)), group)


def agree(mine: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Compare values by name over the ranks of a group.

    Raises:
        ValueError: on every rank if one differs.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, tuple(mine.values()), group=group)
    if len(set(everyone)) > 1:
        shown = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(everyone))
        raise ValueError(
            f"pipeline ranks disagree on ({', '.join(mine)}): {shown}. Start every rank with the same "
            "arguments"
        )


def check_groups(pg_collection: object | None, p2p_communicator: Any, schedule: str) -> None:
    """``ValueError`` unless groups that a caller passes are those of ``parallel_state``, which are used here.

    Args:
        pg_collection: Megatron's ``ProcessGroupCollection``, or None.
        p2p_communicator: its ``P2PCommunicator``, of which only the pipeline group counts, or None.
        schedule: for the message.
    """
    given = {}
    if pg_collection is not None:
        fields = [field.name for field in dataclasses.fields(ProcessGroupCollection)]
        given = {name: getattr(pg_collection, name, None) for name in fields}
    own = ProcessGroupCollection.use_mpu_process_groups() if given or p2p_communicator is not None else None
    pairs = [(f"pg_collection.{name}", group, getattr(own, name, None)) for name, group in given.items()]
    if p2p_communicator is not None:
        pairs.append(("p2p_communicator", p2p_communicator.pp_group, getattr(own, "pp", None)))
    for name, group, known in pairs:
        if group is not None and group is not known and _ranks(group) != _ranks(known):
            raise ValueError(
                f"the {schedule} schedule uses the groups of parallel_state, and {name} has other ranks: "
                f"{_ranks(group)}, not {_ranks(known)}; initialize parallel_state with the same sizes"
            )


def _ranks(group: Any) -> Any:
    """Global ranks of a group, or of a list of groups."""
    if group is None:
        return None
    if isinstance(group, list):
        return [_ranks(each) for each in group]
    return dist.get_process_group_ranks(group)


def make_communicator(group: dist.ProcessGroup, *, has_two_ways: bool | None = None) -> Communicator:
    """Messages between the pipeline ranks of ``group``. Every rank of the job must call it, in any pipeline.

    Over NCCL they travel in two groups of their own, one for messages to higher ranks and one for messages to
    lower ranks, so that collectives of the pipeline group never stand between them.

    Args:
        group: this rank's pipeline-parallel group.
        has_two_ways: True makes the two groups whatever the transport is; None makes them for NCCL.
    """
    backend = dist.get_backend(group)
    if backend == "nccl" if has_two_ways is None else has_two_ways:
        return TorchCommunicator(*(_new_group_per_pipeline(group, backend) for _ in range(2)))
    if torch.cuda.is_available():
        raise ValueError(
            f"pipeline messages of GPUs need NCCL, and the pipeline's group is over {backend}; "
            "use --distributed-backend nccl"
        )
    return TorchCommunicator(group)


def message_options(backend_class: Any, timeout: timedelta) -> Any:
    """Options of a process group for messages, as far as this torch has them; None where it has none.

    Messages run on a high-priority stream: one that is ready must not queue behind blocks of a long kernel.
    A receive that waits occupies one streaming multiprocessor for each of its blocks, so there are few.

    Args:
        backend_class: ``torch.distributed.ProcessGroupNCCL``, or None where torch was built without it.
        timeout: of the group; torch warns where options have another.
    """
    if backend_class is None or not hasattr(backend_class, "Options"):
        return None
    options = backend_class.Options()
    if hasattr(options, "_timeout"):
        options._timeout = timeout
    if hasattr(options, "is_high_priority_stream"):
        options.is_high_priority_stream = True
    if hasattr(options, "config") and hasattr(options.config, "max_ctas"):
        options.config.max_ctas = MAX_BLOCKS_OF_A_MESSAGE
    return options


def _new_group_per_pipeline(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """Make a group of the ranks of every pipeline, on all ranks in one order; the one that this rank is in.

    ``use_local_synchronization`` would spare ranks the groups of others, but names a group by how many its
    process has: Megatron's embedding groups make that differ within a pipeline, and its ranks never meet.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    mine = tuple(dist.get_process_group_ranks(group))
    dist.all_gather_object(everyone, mine)
    backend_class = getattr(dist, "ProcessGroupNCCL", None) if backend == "nccl" else None
    timeout = _timeout_of(group)
    made: dict[tuple[int, ...], dist.ProcessGroup] = {
        ranks: dist.new_group(
            list(ranks),
            timeout=timeout,
            backend=backend,
            # Of its own: torch writes the group's name and ranks into it.
            pg_options=message_options(backend_class, timeout),
            group_desc="PIPELINE_MESSAGES",
        )
        for ranks in sorted(set(everyone))
    }
    return made[mine]


def _timeout_of(group: dist.ProcessGroup) -> timedelta:
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout
