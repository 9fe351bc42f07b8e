"""From a batch's sequence lengths to a plan of elastic helix."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from helixpipe.elastic.elastic_plan import ElasticPlan, predict
from helixpipe.elastic.job import ElasticJob, check_lengths
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.elastic.round_schedule import costs_of_rounds, cut_of, known_ranges, round_plan
from helixpipe.elastic.search.rounds import make_rounds
from helixpipe.plan.lower import lower
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.helix import DEFAULT_ATTENTION_RANGE
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.validate import validate

# Numbers of rounds that are tried: more keep less, and their chunks are more alike, but shorter.
ROUND_COUNTS = (1, 2, 4, 8, 16, 32, 64)
# Chunks of a slot: one exposes messages, many only shorten chunks.
FOLDS = (2, 3, 4)
# So many further numbers of rounds are tried after one that fits and recomputes nothing.
_FURTHER = 2
_GIB = 2**30


@dataclass(order=True)
class _Candidate:
    """Rounds that fit without messages."""

    time_ms: float
    number: int
    recipe: RoundRecipe = field(compare=False)
    plan: Plan = field(compare=False)
    costs: Costs = field(compare=False)


class _Shortage(ValueError):
    """What a candidate lacks."""

    def __init__(self, recipe: RoundRecipe, rank: int, missing_bytes: int, *, with_messages: bool) -> None:
        self.missing_bytes = missing_bytes
        what = f"{len(recipe.rounds)} rounds of at most {max(map(max, recipe.rounds))} chunks a slot"
        messages = " and messages" if with_messages else ""
        super().__init__(
            f"{what}: rank {rank} is {missing_bytes} bytes ({missing_bytes / _GIB:.2f} GiB) short of memory "
            f"with {recipe.recompute} recomputed{messages}; use a larger tensor-parallel size or a higher "
            "limit"
        )


def plan_rounds(
    lengths: Sequence[int],
    job: ElasticJob,
    *,
    round_counts: Sequence[int] = ROUND_COUNTS,
    folds: Sequence[int] = FOLDS,
) -> ElasticPlan:
    """The fastest plan of elastic helix found for a batch; the same each time.

    Where the attention range is open, the others are tried with the rounds that are best for the first.

    Args:
        lengths: tokens of every sequence.
        job: what it is planned for.
        round_counts: numbers of rounds to try, beside the most that the longest sequence leaves room for.
        folds: chunks of a slot to try.

    Raises:
        ValueError: lengths that are none, costs that do not tell a layer's parts, or nothing fits; the
            message says what lacks and what to change.
    """
    lengths = check_lengths(lengths)
    job.require_even_stages()
    most = most_rounds(lengths)
    counts: Sequence[int] = [*(count for count in round_counts if count < most), most]
    if job.attention_range is not None:
        return _plan_in_range(lengths, job, job.attention_range, counts, folds)
    best: ElasticPlan | None = None
    failure: ValueError | None = None
    for attention_range in known_ranges(job.costs) or [DEFAULT_ATTENTION_RANGE]:
        try:
            found = _plan_in_range(lengths, job, attention_range, counts, folds)
        except ValueError as error:
            failure = failure or error
            continue
        if best is None or found.prediction.time_ms < best.prediction.time_ms:
            best = found
        assert isinstance(found.recipe, RoundRecipe)
        counts, folds = (len(found.recipe.rounds),), (max(map(max, found.recipe.rounds)),)
    if best is None:
        assert failure is not None
        raise failure
    return best


def _plan_in_range(
    lengths: Sequence[int],
    job: ElasticJob,
    attention_range: str,
    counts: Sequence[int],
    folds: Sequence[int],
) -> ElasticPlan:
    cut = cut_of(job.costs, attention_range)
    levels = [level.recompute for level in cut.levels]
    if job.recompute is not None:
        levels = [cut.level(job.recompute).recompute]
    shortages: list[_Shortage] = []
    recipes = _recipes(lengths, job, counts, folds, (levels[0], attention_range))
    candidates = list(_candidates(recipes, job, levels, shortages))
    heapq.heapify(candidates)
    while candidates:
        found = heapq.heappop(candidates)
        plan = lower(found.plan, found.costs)
        prediction = predict(found.recipe, plan, job)
        rank, peak = max(enumerate(prediction.peak_with_messages), key=lambda entry: entry[1])
        if peak <= job.memory_limit_bytes:
            validate(plan)
            return ElasticPlan(found.recipe, plan, prediction)
        missing = peak - job.memory_limit_bytes
        shortages.append(_Shortage(found.recipe, rank, missing, with_messages=True))
        for level in levels[levels.index(found.recipe.recompute) + 1 :][:1]:
            again = _priced(replace(found.recipe, recompute=level), found.plan, job)
            heapq.heappush(candidates, _timed(*again, found.number))
    least = min(shortages, key=lambda shortage: shortage.missing_bytes, default=None)
    raise ValueError(
        f"no elastic helix fits; {least}"
        if least
        else f"no elastic helix fits: its chunks hold more than {job.token_capacity} tokens; raise the token "
        "capacity"
    )


def most_rounds(lengths: Sequence[int]) -> int:
    """Beyond, a round of one sequence is the longest, and the others get shorter for nothing."""
    return max(1, sum(lengths) // max(lengths))


def _recipes(
    lengths: Sequence[int],
    job: ElasticJob,
    counts: Sequence[int],
    folds: Sequence[int],
    model: tuple[str, str],
) -> Iterator[list[RoundRecipe]]:
    """Rounds to choose from, those of a number together, for a level of recomputation and attention range."""
    for count in counts:
        made = (make_rounds(lengths, job.costs, job.num_stages, count, fold, *model) for fold in folds)
        capacity = job.token_capacity
        yield [recipe for recipe in made if not capacity or max(c.tokens for c in recipe.chunks) <= capacity]


def _candidates(
    recipes: Iterable[Sequence[RoundRecipe]],
    job: ElasticJob,
    levels: Sequence[str],
    shortages: list[_Shortage],
) -> Iterator[_Candidate]:
    """Rounds with the least recomputation that fits without messages."""
    further, number = _FURTHER, 0
    for of_count in recipes:
        if further < 0:
            return
        is_easy = False
        for recipe in of_count:
            found = _least_recomputed(recipe, levels, job, shortages)
            if found is not None:
                number += 1
                yield _timed(*found, number)
                is_easy = is_easy or found[0].recompute == levels[0]
        further -= is_easy


def _least_recomputed(
    recipe: RoundRecipe, levels: Sequence[str], job: ElasticJob, shortages: list[_Shortage]
) -> tuple[RoundRecipe, Plan, Costs] | None:
    plan = round_plan(recipe, job.num_layers)
    for level in levels:
        found = _priced(replace(recipe, recompute=level), plan, job)
        rank, peak = max(enumerate(peak_bytes(plan, found[2])), key=lambda entry: entry[1])
        if peak <= job.memory_limit_bytes:
            return found
    shortages.append(_Shortage(found[0], rank, peak - job.memory_limit_bytes, with_messages=False))
    return None


def _priced(recipe: RoundRecipe, plan: Plan, job: ElasticJob) -> tuple[RoundRecipe, Plan, Costs]:
    return recipe, plan, costs_of_rounds(recipe, job.num_layers, job.costs)


def _timed(recipe: RoundRecipe, plan: Plan, costs: Costs, number: int) -> _Candidate:
    return _Candidate(simulate(plan, costs).timeline.makespan_ms, number, recipe, plan, costs)
