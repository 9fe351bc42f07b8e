"""Layouts: how many GPUs share a layer, a sequence, the layers and the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

from helixpipe.plan.advise.context_parallel import Exchange, share_sequence
from helixpipe.plan.advise.job import Job, memory_limit
from helixpipe.plan.cost_model import Hardware, ModelShape, Pieces, Workload, predict_pieces
from helixpipe.plan.cost_model.analytic import group_gb_per_s, pipeline_network


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes whose product is the number of GPUs.

    Attributes:
        tensor: GPUs that share a layer, t.
        context: GPUs that share a sequence, c.
        exchange: how their attention reaches all of it; None if c is 1.
        pipeline: ranks that share the layers, p.
        data: replicas, d.
        expert: GPUs of a stage that share experts; part of t times d.
    """

    tensor: int = 1
    context: int = 1
    exchange: Exchange | None = None
    pipeline: int = 1
    data: int = 1
    expert: int = 1

    @property
    def label(self) -> str:
        """For a table: the sizes above 1."""
        sizes = {"t": self.tensor, "c": self.context, "p": self.pipeline, "d": self.data, "e": self.expert}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.exchange is not None:
            words.append(self.exchange.value.removeprefix("context-parallel "))
        return " ".join(words) or "1 GPU"


def layouts(machine: Hardware | Pieces, workload: Workload, num_gpus: int, batch: int) -> Iterator[Layout]:
    """Every layout of ``num_gpus`` that can train batches of ``batch`` sequences.

    Tensor parallelism stays within a node and cuts whole key/value heads. Each GPU of a sequence has an early
    and a late part of it. A profile holds for its own tensor-parallel size, and tells nothing about sequences
    that are shared.

    Args:
        machine: rates, or a profile.
        workload: model and sequence length.
        num_gpus: of the job.
        batch: sequences of an iteration.
    """
    model = workload.model
    if isinstance(machine, Pieces):
        tensors = [machine.workload.tensor_parallel]
    else:
        tensors = [t for t in _divisors(min(num_gpus, machine.gpus_per_node)) if model.num_kv_heads % t == 0]
    for t in tensors:
        if num_gpus % t:
            continue
        for c in _divisors(num_gpus // t) if isinstance(machine, Hardware) else [1]:
            if c > 1 and workload.seq_length % (2 * c * t):
                continue
            for p in _divisors(num_gpus // (t * c)):
                d = num_gpus // (t * c * p)
                if model.num_layers % p or batch % d:
                    continue
                for e in _expert_sizes(model, t * d):
                    for exchange in Exchange if c > 1 else [None]:
                        yield Layout(tensor=t, context=c, exchange=exchange, pipeline=p, data=d, expert=e)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _expert_sizes(model: ModelShape, gpus: int) -> list[int]:
    if model.experts is None:
        return [1]
    return [size for size in _divisors(model.experts.count) if gpus % size == 0]


def layout_job(
    machine: Hardware | Pieces,
    workload: Workload,
    layout: Layout,
    batch: int,
    memory_limit_gib: float | None = None,
) -> Job:
    """The job of training with ``layout``; its optimizer is distributed where weights have several holders.

    Args:
        machine: rates, or a profile.
        workload: model, sequence length and precision; the layout's sizes take the place of its own.
        layout: one of :func:`layouts`.
        batch: sequences of an iteration.
        memory_limit_gib: of one GPU; what is left of the hardware's if None.

    Raises:
        ValueError: sizes that the model or its sequences cannot be cut into.
    """
    is_shared = layout.context * layout.data > 1
    alone = replace(
        workload,
        micro_batch_size=workload.micro_batch_size if isinstance(machine, Pieces) else 1,
        tensor_parallel=layout.tensor,
        data_parallel=layout.data,
        expert_parallel=layout.expert,
        distributed_optimizer=is_shared if isinstance(machine, Hardware) else workload.distributed_optimizer,
    )
    job = Job(
        pieces_for=cache(partial(_pieces, machine, alone, layout)),
        num_ranks=layout.pipeline,
        num_microbatches=batch // layout.data // alone.micro_batch_size,
        micro_batch_size=alone.micro_batch_size,
        memory_limit_bytes=memory_limit(machine, memory_limit_gib),
        peak_tflops=machine.tflops if isinstance(machine, Hardware) else 0.0,
    )
    job.pieces()
    return job


def _pieces(
    machine: Hardware | Pieces, alone: Workload, layout: Layout, micro_batch_size: int
) -> Pieces | None:
    if isinstance(machine, Pieces):
        return replace(machine, workload=alone) if micro_batch_size == alone.micro_batch_size else None
    whole = replace(alone, micro_batch_size=micro_batch_size)
    if layout.exchange is None:
        return predict_pieces(whole, machine)
    return _shared_pieces(machine, whole, layout.exchange, layout.context)


def shared_pieces(machine: Hardware, workload: Workload) -> Pieces:
    """Pieces of a workload whose sequences are shared as training does it: keys and values are gathered.

    Raises:
        ValueError: sequences that cannot be divided, or windows.
    """
    whole = replace(workload, context_parallel=1, gathers_keys=False)
    return _shared_pieces(machine, whole, Exchange.ALL_GATHER, workload.context_parallel)


def _shared_pieces(machine: Hardware, whole: Workload, exchange: Exchange, size: int) -> Pieces:
    # GPUs that share a sequence are numbered before the replicas.
    between = pipeline_network(replace(whole, data_parallel=1, expert_parallel=1), machine)
    shared = share_sequence(predict_pieces(whole, machine), exchange, size, between)
    of_holders = group_gb_per_s(machine, shared.workload.stage_gpus)
    return replace(
        shared,
        network=pipeline_network(shared.workload, machine),
        reduction_gb_per_s=min(shared.reduction_gb_per_s, of_holders),
    )
