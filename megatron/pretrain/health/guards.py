"""Keep numbers that are not finite out of the weights, and say where they came from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from helixpipe.contact_points import replace
from helixpipe.megatron_adapter.schedule import ForwardBackward
from helixpipe.plan.operation import Kind
from helixpipe.reliability.exit_codes import NumericsError
from megatron.pretrain.checkpoint.parameter_names import canonical_names, layer_of
from megatron.pretrain.health.diagnosis import Finding, LayerSums, Probe, is_finite, origin
from megatron.pretrain.model import TrainingState
from megatron.pretrain.settings.job import ParallelSettings

Losses = list[dict[str, torch.Tensor]]

# How long a rank that has found the gradient norm not finite waits for the others to find it, too.
_MEETING_S = 10.0
_POLL_S = 0.02


class NotFinite(Exception):
    """The optimizer must not step."""


def watch_gradient_norm(optimizer: Any) -> None:
    """Raise :class:`NotFinite` from the optimizer's step where it has the norm and has changed nothing."""
    original = optimizer.get_grad_norm

    def finite_norm() -> Any:
        norm = original()
        if not math.isfinite(norm):
            raise NotFinite(f"gradient norm {norm}")
        return norm

    replace("megatron.core.optimizer.optimizer:MegatronOptimizer", "get_grad_norm", finite_norm, on=optimizer)


def spread_to_gradients(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """A forward step whose loss, if it is not finite, makes its gradients so.

    An infinite loss can have finite gradients. This way the gradient norm, which all ranks have to agree on
    anyhow, tells every rank, at no more than one product of scalars.
    """

    def spreading(data_iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        output, loss_func = forward_step(data_iterator, model)

        def spread_loss(*arguments: Any, **options: Any) -> Any:
            loss, *rest = loss_func(*arguments, **options)
            # One for a finite loss, else NaN.
            return loss * (1 + 0 * loss.detach()), *rest

        return output, spread_loss

    return spreading


class KeptBatches:
    """An iterator that can give an iteration's batches once more."""

    def __init__(self, data: Iterator[Any]) -> None:
        self._data = data
        self._batches: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._data)
        self._batches.append(batch)
        return batch

    def skip(self) -> None:
        """Pass over a micro batch that this rank does not read."""
        self._data.skip()  # type: ignore[attr-defined]

    def forget(self) -> None:
        """A new iteration begins."""
        self._batches.clear()

    def again(self) -> Iterator[Any]:
        """The batches since :meth:`forget`."""
        return KeptAgain(self._batches)


class KeptAgain(Iterator[Any]):
    """Batches that were read before; the ones that were not are not here either."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = iter(list(batches))

    def __next__(self) -> Any:
        return next(self._batches)

    def skip(self) -> None:
        """Pass over a micro batch that this rank does not read."""


class _Report(NamedTuple):
    """What one rank knows about a step."""

    stage: int
    losses: list[tuple[int, float]]
    gradients: list[tuple[float, str]]
    findings: list[Finding]

    @property
    def is_finite(self) -> bool:
        return not (self.losses or self.gradients or self.findings)


def explain(
    parallel: ParallelSettings,
    state: TrainingState,
    forward_backward: ForwardBackward,
    iteration: int,
    losses: Losses,
    sums: LayerSums,
    run_again: Callable[[], Losses],
) -> NumericsError:
    """Say which rank and micro batch made the gradients of a step not finite; collective.

    Args:
        parallel: this rank's place.
        state: with the step's gradients.
        forward_backward: with the plan and the trace of the step.
        iteration: number of the iteration.
        losses: of the step, as it returned them.
        sums: of the step's layers.
        run_again: computes the step once more, from the same weights and batches.

    Returns:
        the error to raise, the same on every rank unless only some of them saw the fault.
    """
    mine = _report(state, forward_backward, losses, sums.findings)
    stands = f"the optimizer has not stepped, the weights are those of iteration {iteration - 1}"
    if not _all_ranks_met(iteration, parallel.world_size):
        what = _what([(parallel.rank, mine)])
        return NumericsError(f"iteration {iteration}: {what}, but not on every rank; {stands}")
    first = _gathered(mine)
    probe = Probe(state.model, forward_backward.trace)
    with probe.watching():
        losses = run_again()
    second = _gathered(_report(state, forward_backward, losses, probe.findings))
    if all(report.is_finite for _, report in second):
        began = _first_met(first, ", which began at {}")
        fate = f"computed once more the step is finite: a transient fault, as of memory or a processor{began}"
    else:
        begins = _first_met(second, " and begins at {}")
        fate = f"computed once more it is the same{begins}: lower --lr or check the data"
    return NumericsError(f"iteration {iteration}: {_what(first)}; {fate}; {stands}")


def _report(
    state: TrainingState, forward_backward: ForwardBackward, losses: Losses, findings: list[Finding]
) -> _Report:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    plan = forward_backward.plan
    assert plan is not None, "the step has run"
    order = [
        operation.micro_batch
        for operation in plan.orders[stage]
        if operation.kind is Kind.F and operation.segment == plan.num_segments - 1
    ]
    if plan.slices and len(losses) == plan.num_sequences:
        # One loss for each sequence, whose slices the plan's micro batches are.
        order = list(range(plan.num_sequences))
    bad = [
        (micro_batch, float(entry["lm loss"][0]))
        for micro_batch, entry in zip(order, losses, strict=False)
        if not is_finite(entry["lm loss"])
    ]
    gradients = [
        (_depth(name, parameter), name)
        for chunk in state.model
        for name, parameter in canonical_names(chunk)
        if not is_finite(parameter.main_grad)
    ]
    return _Report(stage, bad, gradients, findings)


def _all_ranks_met(iteration: int, world_size: int) -> bool:
    """True if every rank is here: a fault of one replica alone is not seen by the others."""
    store = dist.distributed_c10d._get_default_store()
    key, end = f"not-finite/{iteration}", time.monotonic() + _MEETING_S
    count = store.add(key, 1)
    while count < world_size and time.monotonic() < end:
        time.sleep(_POLL_S)
        count = store.add(key, 0)
    return bool(count >= world_size)


def _gathered(mine: _Report) -> list[tuple[int, _Report]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return list(enumerate(everyone))


def _what(reports: list[tuple[int, _Report]]) -> str:
    """The loss of a micro batch, or the gradient nearest to the loss."""
    losses = [
        f"the loss of micro batch {micro_batch} is {value} on rank {rank} (stage {report.stage})"
        for rank, report in reports
        for micro_batch, value in report.losses
    ]
    if losses:
        more = f" (and {len(losses) - 1} more)" if len(losses) > 1 else ""
        return losses[0] + more
    gradients = [(*entry, rank, report.stage) for rank, report in reports for entry in report.gradients]
    if not gradients:
        return "the gradient norm is not finite, though every gradient is"
    _, name, rank, stage = max(gradients)
    return f"the gradient of {name} is not finite on rank {rank} (stage {stage})"


def _depth(name: str, parameter: Any) -> float:
    """Where a parameter stands between the input (-1) and the loss (infinity)."""
    layer = layer_of(name)
    if layer is not None:
        return layer
    # Tied weights have the sum of the gradients at both ends, which says little about either.
    is_tied = getattr(parameter, "shared_embedding", False)
    return -1 if is_tied or name.startswith("embedding") else math.inf


def _first_met(reports: list[tuple[int, _Report]], words: str) -> str:
    found = origin([(rank, finding) for rank, report in reports for finding in report.findings])
    if found is None:
        return ""
    rank, finding = found
    direction = "backward" if finding.is_backward else "forward"
    return words.format(
        f"{finding.where} ({direction}, rank {rank}, stage {reports[rank][1].stage}, "
        f"micro batch {finding.micro_batch})"
    )
