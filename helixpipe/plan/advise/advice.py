"""Evaluate candidates: plan, check memory, simulate, rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from helixpipe.plan.advise.candidates import Candidate, candidates
from helixpipe.plan.advise.context_parallel import Exchange, predict_context_parallel
from helixpipe.plan.advise.job import GIB, Job
from helixpipe.plan.advise.messages import peak_with_messages
from helixpipe.plan.advise.no_cycles import without_cycle_collection
from helixpipe.plan.advise.plans import costs_of, peak_of, plan_of, with_layers_apart
from helixpipe.plan.cost_model import Recompute, costs_of_plan
from helixpipe.plan.operation import Kind
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.schedules.request import KnownCosts
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.simulate import Simulation, simulate, simulate_until

# What fitting an order to costs may gain where layers are alike, and where keys alone do not know them.
_FITTING_GAINS, _FITTING_GAINS_OF_KINDS = 1.02, 1.2
# In how many of the fastest memory that is left is filled.
_FILLED_UP = 6
# Of how many of the fastest the buffers of messages are counted: they need a plan with its messages.
_WITH_MESSAGES = 10
_NEVER = float("inf")
# What computes less again than a recomputation, and keeps more.
LIGHTER = {
    Recompute.PRODUCTS: Recompute.NONE,
    Recompute.WITHOUT_ATTENTION: Recompute.PRODUCTS,
    Recompute.FULL: Recompute.WITHOUT_ATTENTION,
}


@dataclass(frozen=True)
class Option:
    """A candidate that fits, with what is predicted for it.

    Attributes:
        candidate: how to run.
        iteration_ms: the whole iteration.
        bubble: share of the ranks' time without compute; for context parallelism that of exposed messages.
        peak_bytes: on the worst rank, without buffers of messages.
        message_bytes: what those add to the peak; None where they were not looked at: beyond the fastest.
        tokens_per_second_per_gpu: throughput.
        mfu: model FLOPs over what the GPUs could do, 0 to 1; 0 if their peak is unknown.
        plan: what was simulated, without messages; of one sequence where sequences follow one another; None
            for context parallelism.
        costs: with which; None for context parallelism.
    """

    candidate: Candidate
    iteration_ms: float
    bubble: float
    peak_bytes: int
    tokens_per_second_per_gpu: float
    mfu: float
    plan: Plan | None = None
    costs: Costs | None = None
    message_bytes: int | None = None


@dataclass(frozen=True)
class Rejection:
    """A candidate that cannot be used.

    Attributes:
        candidate: what was tried.
        reason: why not.
        excess_bytes: by how much memory falls short; 0 if that is not the reason.
        is_late: an iteration takes longer than what was asked for.
    """

    candidate: Candidate
    reason: str
    excess_bytes: int = 0
    is_late: bool = False


@dataclass(frozen=True)
class Advice:
    """What came out.

    Attributes:
        options: what fits, the fastest first: of each schedule and its options the best recomputation and
            micro batch size that can be executed, and the best one that cannot, if it is faster.
        rejections: one for each schedule and options of which nothing fits.
        num_candidates: how many were looked at.
    """

    options: list[Option]
    rejections: list[Rejection]
    num_candidates: int

    @property
    def best(self) -> Option | None:
        """The fastest that can be executed, or None."""
        return next((option for option in self.options if not option.candidate.why_not_runnable), None)


def advise(job: Job, accept: Callable[[Candidate], bool] = lambda candidate: True) -> Advice:
    """Try every schedule, option, recomputation and micro batch size for ``job``.

    A recomputation that computes more is tried only if nothing that computes less fits and can be executed.
    What comes close to the fastest is improved: orders are fitted to the costs, and memory that the fastest
    leave is filled by computing less again in some of the layers.

    Args:
        job: what is to be trained.
        accept: which candidates may be tried.
    """
    with without_cycle_collection():
        return _advise(job, accept)


def _advise(job: Job, accept: Callable[[Candidate], bool]) -> Advice:
    groups = ([candidate for candidate in group if accept(candidate)] for group in candidates(job))
    outcomes = [outcome for group in groups for outcome in _first_that_fits(job, group)]
    outcomes += _context_parallel(job)
    best: dict[tuple[str, str], Option] = {}
    closest: dict[str, Rejection] = {}
    for outcome in outcomes:
        label = outcome.candidate.label
        if isinstance(outcome, Rejection):
            if label not in closest or _closeness(outcome) < _closeness(closest[label]):
                closest[label] = outcome
        else:
            key = label, outcome.candidate.why_not_runnable
            if key not in best or outcome.iteration_ms < best[key].iteration_ms:
                best[key] = outcome
    fitting = {label for label, _ in best}
    shown = [
        option
        for (label, why_not), option in best.items()
        # What cannot be executed is of interest only if it would be faster.
        if not why_not or (label, "") not in best or option.iteration_ms < best[label, ""].iteration_ms
    ]
    improved = sorted(_improved(job, shown, accept), key=lambda option: option.iteration_ms)
    with_messages = _with_messages(job, improved, accept, fits_order=True)
    return Advice(
        sorted(with_messages, key=lambda option: option.iteration_ms),
        [rejection for label, rejection in closest.items() if label not in fitting],
        len(outcomes),
    )


def _improved(
    job: Job, options: list[Option], accept: Callable[[Candidate], bool], *, fits_order: bool = True
) -> Iterator[Option]:
    """The options, the fastest of them with what a second look makes of them."""
    ranked = sorted(options, key=lambda option: option.iteration_ms)
    gains = _FITTING_GAINS_OF_KINDS if any(job.workload.model.layer_kinds) else _FITTING_GAINS
    for number, option in enumerate(ranked):
        is_close = option.iteration_ms <= gains * ranked[0].iteration_ms
        yield _fitted(job, option) if is_close and fits_order else option
        if option.plan is None or number >= _FILLED_UP:
            continue
        mixture = _mixture(job, option.candidate)
        if not isinstance(mixture, Option) or not accept(mixture.candidate):
            continue
        mixture = _fitted(job, mixture) if fits_order else mixture
        if mixture.iteration_ms < option.iteration_ms:
            yield mixture


def _with_messages(
    job: Job, ranked: list[Option], accept: Callable[[Candidate], bool], *, fits_order: bool
) -> Iterator[Option]:
    """The options; the fastest with their messages, and with more computed again where these do not fit."""
    for number, option in enumerate(ranked):
        if option.plan is None or number >= _WITH_MESSAGES:
            yield option
            continue
        counted = _counted(job, option)
        if _has_room(job, counted):
            yield counted
            continue
        yield from _heavier(job, counted, accept, fits_order=fits_order)


def _heavier(
    job: Job, option: Option, accept: Callable[[Candidate], bool], *, fits_order: bool
) -> Iterator[Option]:
    """What computes more again than an option that has no room for its buffers, until one that runs has."""
    candidate, levels = option.candidate, list(Recompute)
    heavier: list[Callable[[], Option | Rejection | None]] = []
    if candidate.lighter is not None:
        less = _without(job, option.message_bytes or 0)
        heavier = [partial(_mixture, less, replace(candidate, lighter=None))]
    # A mixture falls back to its heavier level.
    for level in levels[levels.index(candidate.recompute) + (candidate.lighter is None) :]:
        heavier.append(partial(_pipeline, job, replace(candidate, recompute=level, lighter=None)))
    for outcome in (found() for found in heavier):
        if not isinstance(outcome, Option) or not accept(outcome.candidate):
            continue
        counted = _fitted_and_counted(job, outcome) if fits_order else _counted(job, outcome)
        if _has_room(job, counted):
            yield from _filled_beside_messages(job, counted, accept, fits_order=fits_order)
            if outcome.candidate.why_not_runnable != "recompute":
                return


def _filled_beside_messages(
    job: Job, counted: Option, accept: Callable[[Candidate], bool], *, fits_order: bool
) -> Iterator[Option]:
    """The option, and with lighter layers in what it and its messages leave."""
    yield counted
    mixture = _mixture(_without(job, counted.message_bytes or 0), counted.candidate)
    if isinstance(mixture, Option) and accept(mixture.candidate):
        filled = _fitted_and_counted(job, mixture) if fits_order else _counted(job, mixture)
        if _has_room(job, filled):
            yield filled


def _fitted_and_counted(job: Job, option: Option) -> Option:
    """The option with its order fitted to the costs, and with its buffers."""
    fitted = _fitted(job, option)
    counted = _counted(job, fitted)
    if fitted is option or _has_room(job, counted):
        return counted
    # An order that is fitted to all memory may leave too little for the buffers.
    assert counted.message_bytes is not None
    return _counted(job, _fitted(_without(job, counted.message_bytes), option))


def _without(job: Job, num_bytes: int) -> Job:
    """The same job with less memory."""
    return replace(job, memory_limit_bytes=job.memory_limit_bytes - num_bytes)


def _counted(job: Job, option: Option) -> Option:
    """The option of a plan with what the buffers of its messages add to its peak."""
    assert option.plan is not None
    assert option.costs is not None
    peak = peak_with_messages(option.plan, option.costs, job.workload.tensor_parallel)
    return replace(option, message_bytes=peak - option.peak_bytes)


def _has_room(job: Job, option: Option) -> bool:
    """True if an option's counted buffers have room."""
    assert option.message_bytes is not None
    return option.peak_bytes + option.message_bytes <= job.memory_limit_bytes


def evaluate(job: Job, candidate: Candidate, deadline_ms: float = _NEVER) -> Option | Rejection:
    """Plan a candidate, hold it against memory, and simulate it if it fits, until it takes too long.

    Its plan has a name for every layer, so that others can share it.
    """
    return _pipeline(job, candidate, layers_apart=True, deadline_ms=deadline_ms)


def fits(job: Job, candidate: Candidate) -> bool:
    """True if a candidate can be planned, and has enough memory."""
    try:
        return _peak(job, candidate) <= job.memory_limit_bytes
    except ValueError:
        return False


def mixed(job: Job, candidate: Candidate, deadline_ms: float = _NEVER) -> Option | Rejection | None:
    """A candidate that fits with as many layers as memory allows computing less again; None if none can."""
    return _mixture(job, candidate, layers_apart=True, deadline_ms=deadline_ms)


def improve(
    job: Job, option: Option, accept: Callable[[Candidate], bool], *, fits_order: bool
) -> Option | None:
    """What a second look makes of an option: memory that is left, buffers of messages, perhaps its order.

    None if nothing of it fits with its buffers.
    """
    named = _planned(job, option.candidate, fits_order=False, layers_apart=False)
    assert isinstance(named, _Planned)
    option = replace(option, plan=named.plan, costs=named.costs)
    improved = _improved(job, [option], accept, fits_order=False)
    best = min(improved, key=lambda found: found.iteration_ms)
    counted = _fitted_and_counted(job, best) if fits_order else _counted(job, best)
    if _has_room(job, counted):
        return counted
    heavier = _heavier(job, counted, accept, fits_order=fits_order)
    return min(heavier, key=lambda found: found.iteration_ms, default=None)


def _fitted(job: Job, option: Option) -> Option:
    """The option with its order fitted to the costs, if its schedule can do that."""
    if not option.candidate.fits_order_to_costs:
        return option
    fitted = _pipeline(job, option.candidate, fits_order=True)
    if isinstance(fitted, Option) and fitted.iteration_ms < option.iteration_ms:
        return fitted
    return option


def _mixture(
    job: Job,
    candidate: Candidate,
    *,
    layers_apart: bool = False,
    deadline_ms: float = _NEVER,
) -> Option | Rejection | None:
    """As many layers with the next lighter recomputation as memory allows; None if there is none such."""
    lighter = LIGHTER.get(candidate.recompute)
    if lighter is None or candidate.lighter is not None:
        return None
    num_layers = job.workload.model.num_layers
    peaks = [_peak(job, replace(candidate, recompute=level)) for level in (candidate.recompute, lighter)]
    room, growth = job.memory_limit_bytes - peaks[0], peaks[1] - peaks[0]
    if room < 0 or growth <= room:
        return None
    # Memory grows by about as much with every layer.
    for count in range(num_layers * room // growth, 0, -1):
        mixture = replace(candidate, lighter=(count, lighter))
        if fits(job, mixture):
            return _pipeline(job, mixture, layers_apart=layers_apart, deadline_ms=deadline_ms)
    return None


def _peak(job: Job, candidate: Candidate) -> int:
    pieces = job.pieces_for(candidate.micro_batch_size)
    assert pieces is not None
    request = with_layers_apart(candidate.schedule, candidate.request(job))
    return peak_of(pieces, candidate.schedule, request, _recompute(job, candidate))


def _recompute(job: Job, candidate: Candidate) -> Recompute | tuple[Recompute, ...]:
    if candidate.lighter is None:
        return candidate.recompute
    return tuple(candidate.levels(job.workload.model.num_layers))


def _closeness(rejection: Rejection) -> tuple[bool, int]:
    """Too little memory comes closer than sizes that do not divide."""
    return rejection.excess_bytes == 0, rejection.excess_bytes


def _first_that_fits(job: Job, group: list[Candidate]) -> Iterator[Option | Rejection]:
    for candidate in group:
        outcome = _pipeline(job, candidate)
        yield outcome
        # Another recomputation may be executed where this one cannot; nothing else changes in the group.
        if isinstance(outcome, Option) and candidate.why_not_runnable != "recompute":
            return


class _Planned(NamedTuple):
    """A plan that fits, what it costs, and its peak bytes on the worst rank."""

    plan: Plan
    costs: Costs
    peak_bytes: int


def _planned(job: Job, candidate: Candidate, *, fits_order: bool, layers_apart: bool) -> _Planned | Rejection:
    pieces = job.pieces_for(candidate.micro_batch_size)
    assert pieces is not None
    recompute = _recompute(job, candidate)
    try:
        if fits_order:
            known = KnownCosts(lambda plan: costs_of_plan(pieces, plan, recompute), job.memory_limit_bytes)
            plan = SCHEDULES[candidate.schedule].plan(candidate.request(job, known))
            costs = known.of(plan)
        else:
            request = candidate.request(job)
            if layers_apart:
                request = with_layers_apart(candidate.schedule, request)
            plan = plan_of(candidate.schedule, request)
            costs = costs_of(pieces, candidate.schedule, request, recompute)
    except ValueError as error:
        return Rejection(candidate, str(error))
    peak = _peak(job, candidate) if layers_apart else max(peak_bytes(plan, costs))
    return _Planned(plan, costs, peak) if peak <= job.memory_limit_bytes else _too_large(job, candidate, peak)


def _pipeline(
    job: Job,
    candidate: Candidate,
    *,
    fits_order: bool = False,
    layers_apart: bool = False,
    deadline_ms: float = _NEVER,
) -> Option | Rejection:
    planned = _planned(job, candidate, fits_order=fits_order, layers_apart=layers_apart)
    if isinstance(planned, Rejection):
        return planned
    plan, costs, peak = planned
    simulation = simulate_until(plan, costs, _end_by(candidate, costs, deadline_ms))
    if simulation is None:
        return Rejection(candidate, f"takes longer than {deadline_ms:.0f} ms", is_late=True)
    found = _option(job, candidate, iteration_ms(candidate, simulation), simulation.bubble_ratio, peak)
    return replace(found, plan=plan, costs=costs)


def _end_by(candidate: Candidate, costs: Costs, iteration_ms: float) -> float:
    """When the last computation of what is simulated must have ended, for an iteration to take no longer."""
    repeats = SCHEDULES[candidate.schedule].repeats_sequences
    return (iteration_ms - costs.least_finish_ms) / (candidate.num_microbatches if repeats else 1)


def iteration_ms(candidate: Candidate, simulation: Simulation) -> float:
    """Milliseconds of an iteration of ``candidate``, whose request is what was simulated."""
    if not SCHEDULES[candidate.schedule].repeats_sequences:
        return simulation.iteration_ms
    repeated = candidate.num_microbatches - 1
    return simulation.iteration_ms + repeated * simulation.makespan_ms


def _context_parallel(job: Job) -> Iterator[Option | Rejection]:
    if job.context_network is None:
        return
    for exchange in Exchange:
        for recompute in Recompute:
            m = job.num_microbatches
            candidate = Candidate(exchange.value, recompute, job.micro_batch_size, m)
            try:
                found = predict_context_parallel(
                    job.pieces(), exchange, job.num_ranks, m, recompute, job.context_network
                )
            except ValueError as error:
                yield Rejection(candidate, str(error))
                continue
            if found.peak_bytes > job.memory_limit_bytes:
                yield _too_large(job, candidate, found.peak_bytes)
                continue
            exposed = found.exposed_ms / found.iteration_ms
            yield _option(job, candidate, found.iteration_ms, exposed, found.peak_bytes)


def _too_large(job: Job, candidate: Candidate, peak: int) -> Rejection:
    excess = peak - job.memory_limit_bytes
    return Rejection(
        candidate,
        f"needs {peak / GIB:.1f} GiB, {excess / GIB:.1f} GiB over the limit, recomputing "
        f"{candidate.recompute_label}",
        excess,
    )


def _option(job: Job, candidate: Candidate, iteration_ms: float, bubble: float, peak: int) -> Option:
    workload = job.workload
    sequences = workload.micro_batch_size * job.num_microbatches * workload.data_parallel
    # A backward pass has twice the forward's products.
    flops = 3 * workload.model.forward_flops(workload.seq_length) * sequences
    available = job.num_gpus * job.peak_tflops * 1e9 * iteration_ms
    return Option(
        candidate,
        iteration_ms,
        bubble,
        peak,
        job.tokens_per_iteration / iteration_ms * 1e3 / job.num_gpus,
        flops / available if available else 0.0,
    )


def efficiency(plan: Plan, costs: Costs) -> float:
    """Time of an ideal without bubble and recomputation over that of ``plan``, between 0 and 1.

    The ideal spreads the plan's own work evenly over its ranks: matrix products, attention and
    tensor-parallel communication at the rates of ``costs``, each computed once.
    """
    timeline = simulate(plan, costs).timeline
    again = sum(
        costs.segments[plan.cost_name(op.segment, op.micro_batch)].recompute
        for order in plan.orders
        for op in order
        if op.kind is Kind.B
    )
    return (sum(timeline.busy_ms) - again) / plan.num_ranks / timeline.makespan_ms
