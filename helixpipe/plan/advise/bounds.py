"""Lower bounds: what no schedule can beat, and what a candidate cannot, without simulating it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from helixpipe.plan.advise.candidates import Candidate
from helixpipe.plan.advise.job import Job
from helixpipe.plan.cost_model import Pieces, Recompute, costs_of_plan
from helixpipe.plan.cost_model.segments import segment_costs, whole_layer_cost
from helixpipe.plan.operation import Kind
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import SCHEDULES, ScheduleRequest
from helixpipe.plan.simulation.costs import Costs


def least_ms(pieces: Pieces, num_ranks: int, num_microbatches: int) -> float:
    """What an iteration takes at least, whatever the schedule: all work once, shared evenly, nothing waiting.

    Or the way of one micro batch through all layers and back, if that is longer. Weight gradients need not
    be on it. Then the sum of gradients and the optimizer, shared evenly, too.

    Args:
        pieces: costs on one rank of a pipeline.
        num_ranks: p.
        num_microbatches: per replica and iteration.
    """
    passed = _Passage.of(pieces, Recompute.NONE)
    shared_ms = passed.total_ms * num_microbatches / num_ranks
    return max(shared_ms, passed.through_ms) + _finish_ms(pieces, num_ranks)


def least_ms_in_memory(pieces: Pieces, num_ranks: int, num_microbatches: int, limit_bytes: int) -> float:
    """What an iteration takes at least where sequences stay whole and every layer recomputes alike.

    What a layer keeps of a micro batch is held while this passes all later layers, there and back. Bytes
    times milliseconds of all micro batches must find room in what the ranks have beside weights: with little
    memory, few micro batches are under way. The best of all recomputations, each with its own work.
    """
    room = num_ranks * (limit_bytes - least_bytes(pieces, num_ranks))
    finish_ms = _finish_ms(pieces, num_ranks)
    found = []
    for level in Recompute:
        passed = _Passage.of(pieces, level)
        shared_ms = passed.total_ms * num_microbatches / num_ranks
        held_ms = passed.byte_ms * num_microbatches / room if room > 0 else float("inf")
        found.append(max(shared_ms, held_ms, passed.through_ms) + finish_ms)
    return min(found)


class _Passage(NamedTuple):
    """A micro batch in all layers and both ends, each rank's operations without the host's share.

    Attributes:
        total_ms: all work.
        through_ms: without weight gradients.
        byte_ms: bytes that layers keep times how long at least, of all layers together.
    """

    total_ms: float
    through_ms: float
    byte_ms: float

    @classmethod
    def of(cls, pieces: Pieces, recompute: Recompute) -> _Passage:
        kinds = pieces.workload.model.layer_kinds
        costs = {kind: whole_layer_cost(pieces, recompute, kinds.index(kind)) for kind in set(kinds)}
        embedding, head = (pieces.times[name] for name in ("embedding", "head"))
        after_ms = head.forward + head.backward
        # Attention that is cut off has q, k and v, and so does not compute them again.
        spared_ms = pieces.times["qkv"].forward if recompute is Recompute.WITHOUT_ATTENTION else 0.0
        total_ms, byte_ms = embedding.total + head.total, 0.0
        for kind in reversed(kinds):
            cost = costs[kind]
            byte_ms += cost.bytes * after_ms
            both_ms = cost.forward + cost.backward - 2 * pieces.overhead_ms - spared_ms
            after_ms += both_ms
            total_ms += both_ms + cost.weight
        return cls(total_ms, after_ms + embedding.forward + embedding.backward, byte_ms)


def _finish_ms(pieces: Pieces, num_ranks: int) -> float:
    own, experts = held_parameters(pieces)
    found = pieces.reduction_ms(own) + pieces.optimizer_ms(own)
    found += pieces.reduction_ms(experts, of_experts=True) + pieces.optimizer_ms(experts, of_experts=True)
    return found / num_ranks


def held_parameters(pieces: Pieces) -> tuple[int, int]:
    """Matrix weights on one GPU of each rank, of all ranks together: those of experts apart."""
    workload = pieces.workload
    model = workload.model
    kinds = Counter(model.layer_kinds)
    own, experts = workload.parameters["embedding"], 0
    own += 0 if model.tied else workload.parameters["head"]
    for kind, count in kinds.items():
        held = workload.held_parameters(model.layer_kinds.index(kind))
        experts += count * held["experts"]
        own += count * (held["qkv"] + held["proj"] + held["mlp"])
    return own, experts


def least_bytes(pieces: Pieces, num_ranks: int) -> int:
    """Bytes of weights, gradients and optimizer states that some rank holds at least: the mean."""
    own, experts = held_parameters(pieces)
    workload = pieces.workload
    return (workload.static_bytes(own) + workload.static_bytes(experts, of_experts=True)) // num_ranks


class Outlook:
    """Lower bounds of candidates that differ in what they recompute alone.

    Of time: a rank cannot start before the first micro batch has passed all segments before its first one,
    then does its own work, and after the last backward of that segment the micro batch has to pass the
    others. Of a schedule whose segments change ranks, the busiest rank's work alone counts. Of memory: what a
    rank holds when most forwards wait for their backward, in a plan of few micro batches.
    """

    def __init__(self, job: Job, candidate: Candidate) -> None:
        """Plan few micro batches.

        Raises:
            ValueError: sizes that the schedule does not take.
        """
        pieces = job.pieces_for(candidate.micro_batch_size)
        assert pieces is not None
        self._pieces = pieces
        request = candidate.request(job)
        self._work = _small_work(candidate.schedule, replace(request, num_microbatches=_few(request)))
        # All but segments is the same whatever is computed again.
        self._costs = costs_of_plan(pieces, self._work.plan, candidate.recompute)
        self._times = float(candidate.num_microbatches)
        if not SCHEDULES[candidate.schedule].repeats_sequences:
            self._times = request.num_microbatches / self._work.plan.num_sequences

    def least_ms(self, recompute: Recompute) -> float:
        """What an iteration takes at least."""
        costs = self._with(recompute)
        pipeline_ms = max(_rank_ms(self._work, costs, rank, self._times) for rank in self._ranks)
        finish_ms = min(rank.gradient_reduction_ms for rank in costs.ranks)
        return pipeline_ms + finish_ms + max(rank.optimizer_ms for rank in costs.ranks)

    def least_bytes(self, recompute: Recompute) -> float:
        """What the rank with most holds at least."""
        costs = self._with(recompute)
        return max(_held_bytes(self._work, costs, rank) for rank in self._ranks)

    @property
    def _ranks(self) -> range:
        return range(self._work.plan.num_ranks)

    def _with(self, recompute: Recompute) -> Costs:
        return replace(self._costs, segments=segment_costs(self._pieces, self._work.plan, recompute))


class _Work(NamedTuple):
    """What ranks compute in a small plan of a schedule.

    Attributes:
        plan: of few micro batches.
        counts: of each rank, how often each operation of each cost name.
        held: of each rank, the cost names of forwards whose backward is still to come, when these are most.
        before: of each rank, the segments that every micro batch passes before its first one; empty where
            segments have no rank of their own.
    """

    plan: Plan
    counts: tuple[Mapping[tuple[Kind, str], int], ...]
    held: tuple[Mapping[str, int], ...]
    before: tuple[range, ...]


def _few(request: ScheduleRequest) -> int:
    """Micro batches of a small plan: two for each rank, a round of the largest fold, or all there are."""
    return min(request.num_microbatches, 2 * request.num_ranks)


@lru_cache(maxsize=4096)
def _small_work(schedule: str, request: ScheduleRequest) -> _Work:
    plan = SCHEDULES[schedule].plan(request)
    is_fixed = not plan.micro_batch_names and all(len(set(ranks)) == 1 for ranks in plan.placement)
    firsts: dict[int, int] = {}
    for segment in range(plan.num_segments if is_fixed else 0):
        firsts.setdefault(plan.rank_of(segment, 0), segment)
    ranks = range(plan.num_ranks)
    return _Work(
        plan,
        tuple(
            Counter((op.kind, plan.cost_name(op.segment, op.micro_batch)) for op in plan.orders[rank])
            for rank in ranks
        ),
        tuple(_most_held(plan, rank) for rank in ranks),
        tuple(range(firsts.get(rank, 0)) for rank in ranks),
    )


def _most_held(plan: Plan, rank: int) -> Mapping[str, int]:
    held: Counter[str] = Counter()
    most, most_held = 0, dict(held)
    total = 0
    for op in plan.orders[rank]:
        change = {Kind.F: 1, Kind.B: -1}.get(op.kind, 0)
        held[plan.cost_name(op.segment, op.micro_batch)] += change
        total += change
        if total > most:
            most, most_held = total, dict(held)
    return most_held


def _rank_ms(work: _Work, costs: Costs, rank: int, times: float) -> float:
    splits = work.plan.splits_backward
    by_kind = dict.fromkeys((Kind.F, Kind.B, Kind.W), 0.0)
    for (kind, name), count in work.counts[rank].items():
        by_kind[kind] += count * costs.duration_ms(kind, name, splits_backward=splits)
    busy_ms = sum(by_kind.values()) * times
    lead, tail = 0.0, 0.0
    for segment in work.before[rank]:
        name = work.plan.cost_name(segment, 0)
        lead += costs.duration_ms(Kind.F, name, splits_backward=splits)
        tail += costs.duration_ms(Kind.B, name, splits_backward=splits)
    return lead + max(busy_ms, (by_kind[Kind.F] + by_kind[Kind.B]) * times + tail)


def _held_bytes(work: _Work, costs: Costs, rank: int) -> float:
    held = sum(count * costs.segments[name].bytes for name, count in work.held[rank].items())
    return costs.rank(rank).static_bytes + held
