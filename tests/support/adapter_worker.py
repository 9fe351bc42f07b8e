"""What each rank does in the tests of the Megatron adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from models import VOCABULARY, Case, initialize
from stages import gpt_stage, segmented_share

from helixpipe.megatron_adapter.forward_backward import HelixForwardBackward
from helixpipe.megatron_adapter.tracing import TracingTimers
from helixpipe.plan import Kind, Operation, Plan, ScheduleRequest, build_plan
from helixpipe.runtime.trace import HostClock, Trace

SEQ_LENGTH = 8


class Iteration(NamedTuple):
    """Operations of one rank in one iteration, in order."""

    planned: list[str]
    traced: list[str]
    ran: list[str]


def request_of(case: Case, num_microbatches: int, virtual_stages: int | None) -> ScheduleRequest:
    return ScheduleRequest(
        num_layers=case.num_layers,
        num_ranks=case.pp,
        num_microbatches=num_microbatches,
        virtual_stages=virtual_stages,
    )


def trace_megatron(case: Case, runs: list[tuple[int, int | None]]) -> list[list[Iteration]]:
    """For each (micro batches, virtual stages): two training iterations and an evaluation of Megatron's."""
    initialize(case)
    return [_trace(case, *run) for run in runs]


def _trace(case: Case, num_microbatches: int, virtual_stages: int | None) -> list[Iteration]:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual_stages)
    chunks = [
        gpt_stage(
            case,
            vp_stage,
            virtual_pipeline_model_parallel_size=virtual_stages,
            microbatch_group_size_per_vp_stage=case.pp,
            finalize_model_grads_func=None,
        )
        for vp_stage in (range(virtual_stages) if virtual_stages else [None])
    ]
    name = "interleaved" if virtual_stages else "1f1b"
    plan = build_plan(name, request_of(case, num_microbatches, virtual_stages))
    return [
        _run_megatron(case, plan.forward_only() if forward_only else plan, rank, chunks, forward_only)
        for forward_only in (False, False, True)
    ]


def _run_megatron(
    case: Case, plan: Plan, rank: int, chunks: list[torch.nn.Module], forward_only: bool
) -> Iteration:
    ran: list[Operation] = []
    trace = Trace(HostClock())
    # Megatron takes the timers from the first chunk's configuration.
    chunks[0].config.timers = TracingTimers(plan, rank, trace)
    schedules.get_forward_backward_func()(
        forward_step_func=_recording_step(chunks, case.pp, rank, ran),
        data_iterator=[iter(range(plan.num_microbatches)) for _ in chunks],
        model=chunks,
        num_microbatches=plan.num_microbatches,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return Iteration(
        [str(op) for op in plan.orders[rank] if op.kind.is_compute],
        [str(span.operation) for span in trace.spans()],
        [str(op) for op in ran],
    )


def _recording_step(chunks: list[torch.nn.Module], pp: int, rank: int, ran: list[Operation]) -> Any:
    """A forward step that notes which chunk runs which micro batch, without any help from timers."""

    def step(data_iterator: Iterator[int], model: torch.nn.Module) -> Any:
        micro_batch = next(data_iterator)
        segment = chunks.index(model) * pp + rank
        ran.append(Operation(segment, Kind.F, micro_batch))
        tokens = torch.full((1, SEQ_LENGTH), micro_batch % VOCABULARY)
        positions = torch.arange(SEQ_LENGTH)[None]
        output = model(tokens, positions, None, labels=tokens)
        if output.requires_grad:
            output.register_hook(lambda grad: ran.append(Operation(segment, Kind.B, micro_batch)))
        return output, lambda losses: (losses.mean(), {})

    return step


class Refusal(NamedTuple):
    """How a call that ranks disagree about has ended."""

    message: str
    seconds: float
    messages_sent: int


# What rank 1 is given instead of what everyone else has.
DISAGREEMENTS: dict[str, dict[str, Any]] = {
    "sequence length": {"seq_length": 2 * SEQ_LENGTH},
    "micro batch size": {"micro_batch_size": 2},
    "micro batches": {"num_microbatches": 8},
    "evaluation": {"forward_only": True},
    "fold": {"num_fold": 1},
    "dtype": {"dtype": torch.float64},
}


def disagree() -> dict[str, Refusal | None]:
    """Call the schedule with arguments that differ between ranks; None where nothing was raised."""
    case = Case(pp=2)
    initialize(case)
    sent: list[object] = []
    for name in ("isend", "irecv", "send", "recv", "batch_isend_irecv"):
        setattr(dist, name, lambda *args, **kwargs: sent.append(args))
    refusals: dict[str, Refusal | None] = {}
    for name, changes in DISAGREEMENTS.items():
        mine = changes if dist.get_rank() == 1 else {}
        start = time.monotonic()
        try:
            _call_helix(case, **mine)
            refusals[name] = None
        except ValueError as error:
            refusals[name] = Refusal(str(error), time.monotonic() - start, len(sent))
    return refusals


def _call_helix(
    case: Case, *, num_fold: int = 2, dtype: torch.dtype = torch.float32, **arguments: Any
) -> None:
    HelixForwardBackward(num_fold=num_fold, clock=HostClock())(
        **{
            "forward_step_func": None,
            "data_iterator": None,
            "model": [segmented_share(case, pipeline_dtype=dtype)],
            "num_microbatches": 4,
            "seq_length": SEQ_LENGTH,
            "micro_batch_size": 1,
            **arguments,
        }
    )
