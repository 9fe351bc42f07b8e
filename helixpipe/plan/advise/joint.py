"""The joint search: every layout with every schedule, the most promising first, until nothing can be better.

Best-first with lower bounds: a layout's bound is below those of its candidates, and a candidate's below its
time. What is left when bounds exceed the best found is never planned, let alone simulated.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from itertools import count
from typing import NamedTuple

from helixpipe.plan.advise.advice import LIGHTER, Option, Rejection, evaluate, fits, improve, mixed
from helixpipe.plan.advise.bounds import Outlook, least_bytes, least_ms, least_ms_in_memory
from helixpipe.plan.advise.candidates import Candidate, candidates, micro_batch_factors
from helixpipe.plan.advise.job import GIB, Job
from helixpipe.plan.advise.layouts import Layout, layout_job, layouts
from helixpipe.plan.advise.no_cycles import without_cycle_collection
from helixpipe.plan.cost_model import Hardware, Pieces, Workload
from helixpipe.plan.schedules import SCHEDULES

# How many are shown, each with a layout and schedule of its own.
SHOWN = 10
# Larger micro batches are looked at where their kernels gain so much.
_WORTHWHILE = 0.01
# Orders are fitted to costs, which takes seconds, for those that are as close to the fastest.
_CLOSE = 1.03
# What is shown may get slower by as much before anything is simulated again.
_SOON = 1.02
_NEVER = float("inf")


@dataclass(frozen=True)
class Finding:
    """A layout and the best way found to run on it with one schedule.

    Attributes:
        layout: sizes.
        job: what is trained with it.
        option: schedule, options and prediction.
    """

    layout: Layout
    job: Job
    option: Option

    @property
    def family(self) -> str:
        """Kind of schedule, and whether sequences are shared."""
        return _family(self.layout, self.option.candidate)

    @property
    def key(self) -> tuple[Layout, str]:
        """Of those with the same, one is shown."""
        return self.layout, self.option.candidate.schedule

    @property
    def iteration_ms(self) -> float:
        """Predicted."""
        return self.option.iteration_ms

    @property
    def peak_bytes(self) -> int:
        """On the worst GPU, with buffers of messages where these were looked at."""
        return self.option.peak_bytes + (self.option.message_bytes or 0)


@dataclass(frozen=True)
class JointAdvice:
    """What came out of a joint search.

    Attributes:
        findings: what was simulated, the fastest first, one for each layout and schedule. Those that could
            be shown had a second look at their orders, memory that is left, and buffers of messages.
        simulated: everything that was simulated, in the order of that, without plans.
        num_layouts: that were looked at.
        num_rejected: of them, those that cannot be used, by reason.
        num_candidates: schedules with options and recomputation, of all layouts that were opened.
        bound_ms: what no layout and schedule takes less than, for the given costs.
    """

    findings: list[Finding]
    simulated: list[Finding]
    num_layouts: int
    num_rejected: dict[str, int]
    num_candidates: int
    bound_ms: float

    @property
    def num_simulated(self) -> int:
        """How many candidates were simulated."""
        return len(self.simulated)

    @property
    def shown(self) -> list[Finding]:
        """The best."""
        return self.findings[:SHOWN]

    @property
    def best_of_families(self) -> list[Finding]:
        """The fastest of each family, the fastest first."""
        best: dict[str, Finding] = {}
        for finding in self.findings:
            best.setdefault(finding.family, finding)
        return list(best.values())

    @property
    def best_that_runs(self) -> Finding | None:
        """The fastest that ``pretrain_gpt.py`` executes, or None."""
        return next((f for f in self.findings if not f.option.candidate.why_not_runnable), None)


class _Step(Enum):
    """What is next to be done with a group of candidates, or with the first of it.

    Attributes:
        BOUND: make its outlook.
        FIT: hold the first against memory.
        MIX: simulate it with some layers computing less again.
        ALONE: simulate it with all layers alike.
    """

    BOUND = auto()
    FIT = auto()
    MIX = auto()
    ALONE = auto()


class _Item(NamedTuple):
    """A layout to open, or a group of candidates that differ in what they recompute.

    Attributes:
        layout, job: what it belongs to.
        group: lightest recomputation first; empty for a layout.
        step: what is to be done with it.
        outlook: of the group; None as long as only its layout's bound is known.
        is_known: it was simulated, and something was faster.
    """

    layout: Layout
    job: Job
    group: tuple[Candidate, ...] = ()
    step: _Step = _Step.BOUND
    outlook: Outlook | None = None
    is_known: bool = False


def search(
    machine: Hardware | Pieces,
    workload: Workload,
    *,
    num_gpus: int,
    global_batch: int,
    memory_limit_gib: float | None = None,
    accept: Callable[[Layout, Candidate], bool] = lambda layout, candidate: True,
    exhaustive: bool = False,
) -> JointAdvice:
    """Search layouts and schedules together.

    Args:
        machine: rates, or a profile.
        workload: model, sequence length and precision; how it is cut is searched.
        num_gpus: of the job.
        global_batch: sequences of an iteration.
        memory_limit_gib: of one GPU; what is left of the hardware's if None.
        accept: which candidates may be tried.
        exhaustive: simulate everything that fits, whatever the bounds say.

    Raises:
        ValueError: no layout of so many GPUs can train such batches.
    """
    found = _Search(accept, exhaustive)
    with without_cycle_collection():
        for layout in layouts(machine, workload, num_gpus, global_batch):
            found.add_layout(machine, workload, layout, global_batch, memory_limit_gib)
        if not found.num_layouts:
            raise ValueError(
                f"no layout of {num_gpus} GPUs can train batches of {global_batch} sequences: sizes must "
                f"divide {num_gpus}, the {workload.model.num_layers} layers and the batch"
            )
        found.run()
    return found.advice()


class _Limits(NamedTuple):
    """What takes less than these is of interest.

    Attributes:
        shown_ms: of the last that is shown.
        families_ms: of the best of each family.
        runs_ms: of the fastest that ``pretrain_gpt.py`` runs.
    """

    shown_ms: float
    families_ms: dict[str, float]
    runs_ms: float

    @classmethod
    def of(cls, best: Collection[Finding]) -> _Limits:
        times = sorted(finding.iteration_ms for finding in best)[:SHOWN]
        families: dict[str, float] = {}
        for finding in best:
            known_ms = families.get(finding.family, _NEVER)
            families[finding.family] = min(known_ms, finding.iteration_ms)
        running = [f.iteration_ms for f in best if not f.option.candidate.why_not_runnable]
        return cls(times[-1] if len(times) == SHOWN else _NEVER, families, min(running, default=_NEVER))

    def of_family(self, family: str, *, runs: bool) -> float:
        """For a candidate of a family that runs or does not."""
        limit_ms = max(self.shown_ms, self.families_ms.get(family, _NEVER))
        return max(limit_ms, self.runs_ms) if runs else limit_ms


_STAGES, _APART, _SLICES = "stages", "attention apart", "slices"


def _family(layout: Layout, candidate: Candidate) -> str:
    entry = SCHEDULES[candidate.schedule]
    kind = _APART if "attention_range" in entry.options else _STAGES
    return _family_of(layout, _SLICES if entry.slices_sequences else kind)


def _family_of(layout: Layout, kind: str) -> str:
    if layout.pipeline == 1:
        return "context parallel alone" if layout.context > 1 else "no pipeline"
    return f"{kind}, context parallel" if layout.context > 1 else kind


@dataclass
class _Search:
    accept: Callable[[Layout, Candidate], bool]
    exhaustive: bool
    num_layouts: int = 0
    num_candidates: int = 0
    simulated: list[Finding] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    bound_ms: float = float("inf")
    best: dict[tuple[Layout, str], Finding] = field(default_factory=dict)
    heap: list[tuple[float, int, _Item]] = field(default_factory=list)
    order: Iterable[int] = field(default_factory=count)
    left: list[tuple[float, int, _Item]] = field(default_factory=list)
    improved: set[tuple[Layout, str]] = field(default_factory=set)
    items: dict[tuple[Layout, str], _Item] = field(default_factory=dict)
    _limits: _Limits | None = None

    def add_layout(
        self,
        machine: Hardware | Pieces,
        workload: Workload,
        layout: Layout,
        batch: int,
        limit_gib: float | None,
    ) -> None:
        """Put a layout on the heap, unless it cannot be used."""
        self.num_layouts += 1
        try:
            job = layout_job(machine, workload, layout, batch, limit_gib)
        except ValueError as error:
            self._reject(str(error))
            return
        pieces = job.pieces()
        least = least_bytes(pieces, layout.pipeline)
        if least > job.memory_limit_bytes:
            limit = job.memory_limit_bytes / GIB
            self._reject(f"weights, gradients and optimizer states alone exceed {limit:.0f} GiB")
            return
        bound_ms = least_ms(pieces, layout.pipeline, job.num_microbatches)
        self.bound_ms = min(self.bound_ms, bound_ms)
        self._push(bound_ms, _Item(layout, job))

    def _reject(self, reason: str) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def _push(self, bound_ms: float, item: _Item) -> None:
        heapq.heappush(self.heap, (bound_ms, next(self.order), item))  # type: ignore[call-overload]

    def run(self) -> None:
        """Take what is most promising until nothing can change what is shown."""
        while True:
            self._take()
            if not self._look_again():
                return
            # What was shown got slower, and what was left may now come before it.
            self.heap, self.left = self.left, []
            heapq.heapify(self.heap)

    def _take(self) -> None:
        while self.heap:
            entry = heapq.heappop(self.heap)
            bound_ms, _, item = entry
            is_wanted = self.exhaustive and not item.is_known
            if not is_wanted and bound_ms >= self._deadline_ms(item):
                self.left.append(entry)
            elif not item.group:
                self._open(item)
            else:
                self._look_at(item)

    def _look_again(self) -> bool:
        """Improve what is shown, with its buffers of messages, until something gets slower or falls out."""
        while (found := self._next_to_improve()) is not None:
            key, finding = found
            self.improved.add(key)
            fits_order = finding.iteration_ms <= _CLOSE * min(f.iteration_ms for f in self.best.values())
            accept = partial(self.accept, finding.layout)
            option = improve(finding.job, finding.option, accept, fits_order=fits_order)
            self._limits = None
            if option is None:
                del self.best[key]
            else:
                self.best[key] = replace(finding, option=option)
            if option is None or option.iteration_ms > finding.iteration_ms:
                return True
        return False

    def _next_to_improve(self) -> tuple[tuple[Layout, str], Finding] | None:
        ranked = sorted(self.best.items(), key=lambda item: item[1].iteration_ms)
        families: set[str] = set()
        runs = False
        for number, (key, finding) in enumerate(ranked):
            is_first_to_run = not runs and not finding.option.candidate.why_not_runnable
            is_shown = number < SHOWN or finding.family not in families or is_first_to_run
            families.add(finding.family)
            runs = runs or is_first_to_run
            if is_shown and key not in self.improved:
                return key, finding
        return None

    def _open(self, item: _Item) -> None:
        """Put a layout's candidates on the heap, by the bound of their micro batch size and memory."""
        job, ranks = item.job, item.layout.pipeline
        bounds: dict[int, tuple[float, float]] = {}
        for factor in micro_batch_factors(job):
            pieces = job.pieces_for(job.micro_batch_size * factor)
            assert pieces is not None
            m = job.num_microbatches // factor
            in_memory_ms = least_ms_in_memory(pieces, ranks, m, job.memory_limit_bytes)
            bounds[job.micro_batch_size * factor] = least_ms(pieces, ranks, m), in_memory_ms
        worthwhile_ms = (1 - _WORTHWHILE) * bounds[job.micro_batch_size][0]
        for group in candidates(job):
            first = group[0]
            any_ms, in_memory_ms = bounds[first.micro_batch_size]
            if first.micro_batch_size > job.micro_batch_size and any_ms > worthwhile_ms:
                continue
            accepted = tuple(c for c in group if self.accept(item.layout, c))
            if accepted:
                is_sliced = SCHEDULES[first.schedule].slices_sequences
                self._push(any_ms if is_sliced else in_memory_ms, item._replace(group=accepted))

    def _deadline_ms(self, item: _Item) -> float:
        """What takes less would be shown, or be the best of its family, or of what runs."""
        if self._limits is None:
            self._limits = _Limits.of(self.best.values())
        limits = self._limits
        if not item.group:
            # Slices are not shared once more.
            kinds = (_STAGES, _APART) + (_SLICES,) * (item.layout.context == 1)
            families = {_family_of(item.layout, kind) for kind in kinds}
            runs = not item.job.exchanges_otherwise
            return max(limits.of_family(family, runs=runs) for family in families)
        candidate = item.group[0]
        known = self.best.get((item.layout, candidate.schedule))
        # Another recomputation may run where this one does not.
        runs = candidate.why_not_runnable in ("", "recompute")
        limit_ms = limits.of_family(_family(item.layout, candidate), runs=runs)
        return limit_ms if known is None else min(limit_ms, known.iteration_ms)

    def _look_at(self, item: _Item) -> None:
        if item.step is _Step.BOUND:
            self._look_ahead(item)
        elif item.step is _Step.FIT:
            self._hold_against_memory(item)
        elif item.step is _Step.MIX:
            self._simulate(item, mixed)
        else:
            self._simulate(item, evaluate)

    def _hold_against_memory(self, item: _Item) -> None:
        """Of what fits, simulate first what computes less again in some layers: it is mostly faster."""
        candidate, outlook = item.group[0], item.outlook
        assert outlook is not None
        is_fitting = fits(item.job, candidate)
        if is_fitting:
            self._push(self._least_ms(outlook, candidate, item.job), item._replace(step=_Step.MIX))
            self._push(outlook.least_ms(candidate.recompute), item._replace(step=_Step.ALONE))
        # Another recomputation may be executed where this one cannot; otherwise it only computes more.
        if not is_fitting or candidate.why_not_runnable == "recompute":
            self._push_first_that_may_fit(item._replace(group=item.group[1:]))

    def _simulate(
        self, item: _Item, how: Callable[[Job, Candidate, float], Option | Rejection | None]
    ) -> None:
        """Simulate a candidate in one of two ways, until it takes too long to be of interest soon."""
        deadline_ms = _NEVER if self.exhaustive else _SOON * self._deadline_ms(item)
        outcome = how(item.job, item.group[0], deadline_ms)
        if isinstance(outcome, Option):
            if self.accept(item.layout, outcome.candidate):
                self._simulated(item, outcome)
        elif outcome is not None and outcome.is_late:
            self._leave(deadline_ms, item)

    def _leave(self, bound_ms: float, item: _Item) -> None:
        """Put aside what may be looked at again when what is shown gets slower."""
        self.left.append((bound_ms, next(self.order), item))  # type: ignore[call-overload]

    @staticmethod
    def _least_ms(outlook: Outlook, candidate: Candidate, job: Job) -> float:
        """What a candidate takes at least, some layers with the next lighter recomputation."""
        lighter = LIGHTER.get(candidate.recompute)
        if lighter is None:
            return outlook.least_ms(candidate.recompute)
        return outlook.least_mixed_ms(candidate.recompute, lighter, job.memory_limit_bytes)

    def _simulated(self, item: _Item, option: Option) -> None:
        finding = Finding(item.layout, item.job, option)
        if not item.is_known:
            self.simulated.append(replace(finding, option=replace(option, plan=None, costs=None)))
        key, item = finding.key, item._replace(is_known=True)
        known = self.best.get(key)
        if known is not None and known.iteration_ms <= finding.iteration_ms:
            self._leave(finding.iteration_ms, item)
            return
        if known is not None:
            self._leave(known.iteration_ms, self.items[key])
        self.best[key], self.items[key] = finding, item
        self.improved.discard(key)
        self._limits = None

    def _look_ahead(self, item: _Item) -> None:
        self.num_candidates += len(item.group)
        try:
            outlook = Outlook(item.job, item.group[0])
        except ValueError:
            return
        # The last computes most again, and keeps least.
        if outlook.least_bytes(item.group[-1].recompute) <= item.job.memory_limit_bytes:
            self._push_first_that_may_fit(item._replace(step=_Step.FIT, outlook=outlook))

    def _push_first_that_may_fit(self, item: _Item) -> None:
        assert item.outlook is not None
        for number, candidate in enumerate(item.group):
            if item.outlook.least_bytes(candidate.recompute) <= item.job.memory_limit_bytes:
                self._push(
                    self._least_ms(item.outlook, candidate, item.job),
                    item._replace(group=item.group[number:]),
                )
                return

    def advice(self) -> JointAdvice:
        """What was found."""
        return JointAdvice(
            sorted(self.best.values(), key=lambda finding: finding.iteration_ms),
            self.simulated,
            self.num_layouts,
            self.rejected,
            self.num_candidates,
            self.bound_ms,
        )
