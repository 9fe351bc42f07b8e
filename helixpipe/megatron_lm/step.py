"""One step of Megatron-LM's training loop, carried out by a schedule of ours.

The loop expects of a step what a stock schedule does: it reads data on the first and the last stage, and
gives back losses on the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor

from helixpipe.megatron_adapter.forward_backward import (
    PlannedForwardBackward,
    SegmentForwardBackward,
    SlicedSegmentForwardBackward,
    SliceForwardBackward,
    StageForwardBackward,
)
from helixpipe.megatron_adapter.plan_source import PlanOnDemand
from helixpipe.megatron_lm.chunks import as_own_stage, iterators_of
from helixpipe.megatron_lm.options import Options
from helixpipe.megatron_lm.view import as_one_stage
from helixpipe.plan import Plan
from helixpipe.plan.execution import Execution
from helixpipe.reliability.record import Progress

Report = list[dict[str, Tensor]]
# Names, shapes and types of what a loss function reports.
_Form = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


class Watch(Protocol):
    """Told of every step."""

    def step(self, *, forward_only: bool) -> AbstractContextManager[None]:
        """Around a step, or one of an evaluation."""


class Step:
    """Megatron's ``forward_backward_func``.

    Attributes:
        options: as given.
        count: steps and evaluations that were made.
        forward_backward: what carries out the plan.
        is_segmented: the model is cut at its attention.
        is_another_model: GPTModel itself does not compute it: it is cut at its attention or into slices.
        is_in_chunks: a rank has several of its stages.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.count = 0
        execution = options.entry.execution
        assert execution is not None
        self.is_segmented = execution.cuts_layers
        self.is_another_model = execution.cuts_layers or execution.has_slices
        self.is_in_chunks = options.chunks_per_rank > 1
        self.reads_on_all_ranks = options.plan.get("head_placement", "first") != "first"
        kinds = {
            Execution.STAGES: StageForwardBackward,
            Execution.SEGMENTS: SegmentForwardBackward,
            Execution.SLICES: SliceForwardBackward,
            Execution.SLICED_SEGMENTS: SlicedSegmentForwardBackward,
        }
        plans = PlanOnDemand(options.schedule, options.plan, options.chunks_per_rank)
        self.forward_backward: PlannedForwardBackward = kinds[execution](plans)
        self._forms: dict[bool, _Form] = {}
        self._watch: Watch | None = None

    def __str__(self) -> str:
        return str(self.forward_backward)

    def watch(self, watch: Watch, progress: Progress) -> None:
        """Tell of every step and operation; to be called before the first step."""
        self._watch = watch
        self.forward_backward.report_to(progress)

    def get(self, pp_size: int | None = None, vp_size: int | None = None, *groups: Any, **more: Any) -> Step:
        """Stands for Megatron's ``get_forward_backward_func``, with the arguments of every version."""
        size = parallel_state.get_pipeline_model_parallel_world_size()
        chunks = self.forward_backward.chunks_per_rank
        if pp_size not in (None, size) or vp_size not in (None, chunks):
            raise ValueError(
                f"the {self.forward_backward.name} schedule runs on the pipeline of parallel_state, {size} "
                f"ranks with {'one model chunk' if chunks == 1 else 'two model chunks'} each, not on "
                f"{pp_size} ranks with {vp_size or 1}"
            )
        execution = self.options.entry.execution
        assert execution is not None
        if execution.cuts_sequences and parallel_state.get_context_parallel_world_size() > 1:
            raise ValueError(
                f"the {self.forward_backward.name} schedule cuts sequences itself; leave "
                "--context-parallel-size out"
            )
        return self

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: torch.nn.Module | list[torch.nn.Module],
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        **arguments: Any,
    ) -> list[Any]:
        """Run one iteration; Megatron's arguments and return value, losses on the last pipeline rank."""
        moves_losses = self.is_segmented or self.is_in_chunks
        if (self.is_another_model or moves_losses) and collect_non_loss_data:
            raise ValueError(
                f"the {self.forward_backward.name} schedule does not collect data that is no loss; leave "
                "process_non_loss_data_func out"
            )
        chunks = model if isinstance(model, list) else [model]
        config = get_model_config(chunks[0])
        if config.num_moe_experts is not None:
            raise ValueError(
                f"the {self.forward_backward.name} schedule does not support experts in this program; leave "
                "--num-experts out, or train with HelixPipe's pretrain_gpt.py"
            )
        if self.is_in_chunks:
            data_iterator = iterators_of(data_iterator, chunks)
        seen = self._watch.step(forward_only=forward_only) if self._watch is not None else nullcontext()
        with seen, _timed(config):
            report = self.forward_backward(
                forward_step_func=self._seeing_its_ends(forward_step_func),
                data_iterator=data_iterator,
                model=model,
                forward_only=forward_only,
                collect_non_loss_data=collect_non_loss_data,
                **arguments,
            )
            if moves_losses:
                assert self.forward_backward.plan is not None
                report = self._on_last_rank(report, self.forward_backward.plan, forward_only)
        self.count += 1
        return report

    def _seeing_its_ends(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The forward step, which asks its rank whether to read tokens and labels."""
        if self.is_another_model:
            return as_one_stage(function)
        return as_own_stage(function) if self.is_in_chunks else function

    def _on_last_rank(self, report: Report, plan: Plan, forward_only: bool) -> Report:
        """What the loss functions reported, by micro batch; empty on all ranks but the last."""
        group = parallel_state.get_pipeline_model_parallel_group()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        own = plan.reported_by(rank)
        if forward_only not in self._forms:
            self._forms[forward_only] = _agree_on_form(report, group)
        form = self._forms[forward_only]
        if any(_form_of(entry) != form for entry in report):
            raise ValueError(
                "the loss function reports other names or shapes than in the first step; under "
                f"{plan.schedule} they must stay the same"
            )
        # Every micro batch is in one rank's rows, and zero in those of the others: the sum is exact.
        width = sum(torch.Size(shape).numel() for _, shape, _ in form)
        device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
        rows = torch.zeros(plan.num_sequences, width, dtype=torch.float64, device=device)
        if own:
            mine = torch.stack(
                [torch.cat([entry[name].reshape(-1).double() for name, _, _ in form]) for entry in report]
            )
            rows[list(own)] = mine.to(device)
        dist.all_reduce(rows, group=group)
        if rank != size - 1:
            return []
        rows = rows.to(torch.cuda.current_device())
        return [_entry(row, form) for row in rows]


def _form_of(entry: dict[str, Tensor]) -> _Form:
    return tuple((name, tuple(value.shape), value.dtype) for name, value in entry.items())


def _agree_on_form(report: Report, group: dist.ProcessGroup) -> _Form:
    """The form that all ranks with losses report in; collective."""
    forms: list[_Form | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(forms, _form_of(report[0]) if report else None, group=group)
    found = {form for form in forms if form is not None}
    if len(found) != 1:
        raise ValueError(
            "the loss function reports other names or shapes on some pipeline ranks than on others"
        )
    return found.pop()


def _entry(row: Tensor, form: _Form) -> dict[str, Tensor]:
    parts = row.split([torch.Size(shape).numel() for _, shape, _ in form])
    return {
        name: part.reshape(shape).to(dtype) for part, (name, shape, dtype) in zip(parts, form, strict=True)
    }


@contextmanager
def _timed(config: Any) -> Iterator[None]:
    """Under the timer that stock schedules have."""
    if config.timers is None:
        yield
        return
    config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    yield
    config.timers("forward-backward").stop()
