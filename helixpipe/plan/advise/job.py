"""What advice is asked for: a model on a machine, so many GPUs, so much memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from helixpipe.json_input import read_json
from helixpipe.plan.cost_model import HARDWARE, Hardware, Pieces, Workload, predict_pieces, read_hardware
from helixpipe.plan.cost_model.analytic import pipeline_network
from helixpipe.plan.cost_model.machines import hardware_from
from helixpipe.plan.cost_model.pieces import FORMAT
from helixpipe.plan.simulation.network import Network

GIB = 2**30
# CUDA's context, NCCL's buffers and what the allocator loses to fragments.
RESERVED_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and on how many GPUs.

    Attributes:
        pieces_for: costs of the model's pieces for a micro batch size; None where they are not known.
        num_ranks: pipeline-parallel size p.
        num_microbatches: per replica and iteration, of ``micro_batch_size`` sequences.
        micro_batch_size: sequences; candidates may use multiples of it with fewer micro batches.
        memory_limit_bytes: of one GPU.
        peak_tflops: of one GPU, for the model's share of it; 0 if unknown.
        context_network: links between the ranks that share a sequence, for context parallelism, which
            Megatron numbers before the replicas; None if it is not to be looked at.
    """

    pieces_for: Callable[[int], Pieces | None]
    num_ranks: int
    num_microbatches: int
    micro_batch_size: int = 1
    memory_limit_bytes: int
    peak_tflops: float = 0.0
    context_network: Network | None = None

    def pieces(self) -> Pieces:
        """Pieces at the job's own micro batch size."""
        found = self.pieces_for(self.micro_batch_size)
        assert found is not None
        return found

    @property
    def workload(self) -> Workload:
        """The model and how it is cut, at the job's own micro batch size."""
        return self.pieces().workload

    @property
    def exchanges_otherwise(self) -> bool:
        """True if GPUs share sequences in another way than training, which gathers keys and values."""
        workload = self.workload
        return workload.context_parallel > 1 and not workload.gathers_keys

    @property
    def num_gpus(self) -> int:
        """GPUs of the whole job."""
        return self.num_ranks * self.workload.stage_gpus

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of a global batch."""
        workload = self.workload
        replicas = workload.context_parallel * workload.data_parallel
        return workload.tokens * self.num_microbatches * replicas


def read_machine(source: str) -> Hardware | Pieces:
    """Hardware by name or from a file of rates, or a profile that was measured.

    Raises:
        ValueError: neither; the message lists the known names.
    """
    path = Path(source)
    if source in HARDWARE or not path.is_file():
        return read_hardware(source)
    found = read_json(path, "hardware")
    if isinstance(found, dict) and found.get("format") == FORMAT:
        return Pieces.from_object(found)
    return hardware_from(found, source)


def make_job(
    machine: Hardware | Pieces,
    workload: Workload,
    *,
    num_ranks: int,
    num_microbatches: int,
    memory_limit_gib: float | None = None,
) -> Job:
    """The job of running ``workload`` on ``machine``.

    Args:
        machine: rates, or a profile measured for the workload's sizes.
        workload: model and how it is cut.
        num_ranks: pipeline-parallel size.
        num_microbatches: per replica and iteration.
        memory_limit_gib: of one GPU; the hardware's memory less ``RESERVED_GIB`` if None.

    Raises:
        ValueError: sizes below 1, or no memory limit where none is known.
    """
    sizes = {"pipeline-parallel size": num_ranks, "number of micro batches": num_microbatches}
    for what, value in sizes.items():
        if value < 1:
            raise ValueError(f"the {what} must be at least 1, not {value}")

    @cache
    def pieces_for(micro_batch_size: int) -> Pieces | None:
        if isinstance(machine, Hardware):
            return predict_pieces(replace(workload, micro_batch_size=micro_batch_size), machine)
        # What was measured holds for one size.
        return replace(machine, workload=workload) if micro_batch_size == workload.micro_batch_size else None

    alone = replace(workload, data_parallel=1)
    return Job(
        pieces_for=pieces_for,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        micro_batch_size=workload.micro_batch_size,
        memory_limit_bytes=memory_limit(machine, memory_limit_gib),
        peak_tflops=machine.tflops if isinstance(machine, Hardware) else 0.0,
        context_network=pipeline_network(alone, machine) if isinstance(machine, Hardware) else None,
    )


def memory_limit(machine: Hardware | Pieces, memory_limit_gib: float | None) -> int:
    """Bytes of a GPU that a plan may fill: those asked for, or the hardware's less ``RESERVED_GIB``.

    Raises:
        ValueError: no limit where none is known, or none above 0.
    """
    if memory_limit_gib is None:
        if isinstance(machine, Pieces):
            raise ValueError("a profile does not know how much memory there is; add --memory-limit-gib")
        memory_limit_gib = machine.memory_gib - RESERVED_GIB
    if memory_limit_gib <= 0:
        raise ValueError(f"--memory-limit-gib must be above 0, not {memory_limit_gib:g}")
    return int(memory_limit_gib * GIB)
