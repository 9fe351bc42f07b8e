"""Whether a job trains by elastic 1F1B or by elastic helix, and what its model is built by.

The two place layers on other ranks, so a model is built for one of them, on given stages or with a given
attention range and recomputation. Chunks, slices, pipelines and rounds are left to each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from helixpipe.elastic import chunk_schedule, round_schedule
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.elastic.round_schedule import cut_of
from helixpipe.elastic.search.choice import SCHEDULES
from helixpipe.elastic.search.planner import SLICE_COUNTS, estimate_batch
from helixpipe.elastic.search.round_planner import plan_rounds
from helixpipe.elastic.search.stage_balance import balanced_stage_layers

Batches = Sequence[Sequence[int]]

# Every rank chooses at a job's start: few numbers of slices tell well enough how fast 1F1B is.
_SLICE_COUNTS = SLICE_COUNTS[::3]


@dataclass(frozen=True)
class Family:
    """What a model is built by, and what was predicted for it.

    Attributes:
        job: of the model, whose schedule is not open any more.
        reason: in one line what was chosen, and why.
    """

    job: ElasticJob
    reason: str


@dataclass(frozen=True)
class _Found:
    time_ms: float
    job: ElasticJob

    @property
    def label(self) -> str:
        job = self.job
        if job.attention_range is not None:
            return f"{job.schedule} (range {job.attention_range}, recompute {job.recompute})"
        if job.stage_layers:
            return f"{job.schedule} (stages of {', '.join(map(str, job.stage_layers))} layers)"
        return job.schedule


def choose_family(batches: Batches, job: ElasticJob, schedules: Sequence[str] = SCHEDULES) -> Family:
    """The family that is predicted to take the shortest for some batches, of those that fit all of them.

    The same on every rank: times of 1F1B are the search's estimates, see :func:`.planner.estimate_batch`.

    Args:
        batches: tokens of every sequence, batch by batch.
        job: what they are planned for; its schedule, stages, attention range and recomputation are chosen.
        schedules: those that the model can be trained by.

    Raises:
        ValueError: nothing fits; the message says what lacks.
    """
    searches: dict[str, Callable[[Batches, ElasticJob], _Found]] = {
        chunk_schedule.SCHEDULE: _of_pipelines,
        round_schedule.SCHEDULE: _of_rounds,
    }
    found: list[_Found] = []
    reasons: dict[str, str] = {}
    for name in schedules:
        try:
            found.append(searches[name](batches, replace(job, schedule=name)))
        except ValueError as error:
            reasons[name] = str(error)
    if not found:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    best, *others = sorted(found, key=lambda entry: entry.time_ms)
    told = [f"{other.label} {other.time_ms / 1e3:.4g} s" for other in others]
    told += [f"no plan for {name}: {reason}" for name, reason in reasons.items()]
    count = f"the first {len(batches)} batches" if len(batches) > 1 else "the first batch"
    chosen = f"chose {best.label}: predicted {best.time_ms / 1e3:.4g} s for {count}"
    return Family(best.job, "; ".join([chosen, *told]))


def _of_pipelines(batches: Batches, job: ElasticJob) -> _Found:
    """1F1B on even stages, or on those that balance the head."""
    lengths = [length for batch in batches for length in batch]
    balanced = balanced_stage_layers(lengths, job.costs, job.num_layers, job.num_stages)
    found: list[_Found] = []
    failure = ValueError()
    for stage_layers in dict.fromkeys([(), balanced]):
        own = replace(job, stage_layers=stage_layers)
        try:
            times = [estimate_batch(batch, own, slice_counts=_SLICE_COUNTS) for batch in batches]
            found.append(_Found(sum(times), own))
        except ValueError as error:
            failure = error
    if not found:
        raise failure
    return min(found, key=lambda entry: entry.time_ms)


def _of_rounds(batches: Batches, job: ElasticJob) -> _Found:
    """Helix with the range that is best for the longest batch, and as little recomputed as fits all.

    The others are tried with as many chunks of a slot as that batch.
    """
    longest = max(batches, key=lambda batch: sum(job.costs.layer_ms(n * n, n) for n in batch))
    first = plan_rounds(longest, job).recipe
    assert isinstance(first, RoundRecipe)
    cut = cut_of(job.costs, first.attention_range)
    levels = [level.recompute for level in cut.levels]
    folds = (max(map(max, first.rounds)),)
    failure = ValueError()
    for level in levels[levels.index(first.recompute) :]:
        own = replace(job, attention_range=first.attention_range, recompute=level)
        try:
            plans = [plan_rounds(batch, own, folds=folds) for batch in batches]
            return _Found(sum(plan.prediction.time_ms for plan in plans), own)
        except ValueError as error:
            failure = error
    raise failure
