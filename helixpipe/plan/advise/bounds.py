"""Lower bounds: what no schedule can beat, and what a candidate cannot, without simulating it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from helixpipe.plan.advise.candidates import Candidate
from helixpipe.plan.advise.job import Job
from helixpipe.plan.advise.plans import plan_of
from helixpipe.plan.computations import NONE, Numbers
from helixpipe.plan.cost_model import Pieces, Recompute, costs_of_plan
from helixpipe.plan.cost_model.segments import segment_costs, whole_layer_cost
from helixpipe.plan.operation import Kind
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import SCHEDULES, ScheduleRequest
from helixpipe.plan.simulation.costs import Costs, LoanBytes
from helixpipe.plan.simulation.network import busiest_link_ms


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

    Of time: the link with most to carry is busy all the while; and a rank cannot start before the first micro
    batch has passed all segments before its first one, then does its own work, and after the last backward of
    that segment the micro batch has to pass the others; where segments change ranks, the first one of any
    micro batch. Of slices, which differ, the busiest rank's work alone counts. Of memory: what a rank holds
    when most forwards wait for their backward, in a plan of few micro batches.
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
        self._durations: dict[Recompute, npt.NDArray[np.float64]] = {}
        self._least_bytes: dict[Recompute, float] = {}
        # All but segments is the same whatever is computed again.
        self._costs = costs_of_plan(pieces, self._work.plan, candidate.recompute)
        self._times = float(candidate.num_microbatches)
        if not SCHEDULES[candidate.schedule].repeats_sequences:
            self._times = request.num_microbatches / self._work.plan.num_sequences
        self._link_ms = self._busiest_link_ms()

    def least_ms(self, recompute: Recompute) -> float:
        """What an iteration takes at least."""
        work = self._work
        durations, counts = self._durations_ms(recompute), work.plan.computations.counts
        is_waited_for = np.array([kind is not Kind.W for kind, _, _ in work.plan.computations.classes])
        busy_ms = counts @ durations * self._times
        waited_for_ms = counts @ (durations * is_waited_for) * self._times
        lead_ms, tail_ms = (before @ durations for before in work.before)
        pipeline_ms = float((lead_ms + np.maximum(busy_ms, waited_for_ms + tail_ms)).max())
        return max(pipeline_ms, self._link_ms) + self._costs.least_finish_ms

    def least_mixed_ms(self, heavier: Recompute, lighter: Recompute, limit_bytes: int) -> float:
        """What an iteration takes at least if as many layers as memory allows compute less again.

        Memory grows at least as fast as in a plan of few micro batches. Whatever layers these are, the mean
        rank has their share of the work.
        """
        least_bytes = self.least_bytes(heavier)
        growth = self.least_bytes(lighter) - least_bytes
        share = min(1.0, (limit_bytes - least_bytes) / growth) if growth > 0 else 1.0
        counts = self._work.plan.computations.counts
        means = [float((counts @ self._durations_ms(level)).mean()) for level in (heavier, lighter)]
        mixed_ms = (means[0] - share * (means[0] - means[1])) * self._times
        return max(self.least_ms(lighter), mixed_ms + self._costs.least_finish_ms)

    def _durations_ms(self, recompute: Recompute) -> npt.NDArray[np.float64]:
        if recompute not in self._durations:
            segments = segment_costs(self._pieces, self._work.plan, recompute)
            classes = self._work.plan.computations.classes
            self._durations[recompute] = np.array(
                [segments[name].duration_ms(kind, splits_backward=splits) for kind, name, splits in classes]
            )
        return self._durations[recompute]

    def _busiest_link_ms(self) -> float:
        """How long the link with most to carry is busy."""
        costs, sent, p = self._costs, self._work.sent, self._work.plan.num_ranks
        assert costs.network is not None
        # Weights are lent once a round, and of rounds there are at least so many.
        loans = (Kind.SEND_P, Kind.SEND_G)
        times = np.array([int(self._times) if kind in loans else self._times for kind, _ in sent.sizes])
        sizes = np.array([_message_bytes(costs, *size) for size in sent.sizes], dtype=np.float64) * times
        num_bytes = np.zeros((p, p))
        np.add.at(num_bytes, (sent.senders, sent.receivers), sizes[sent.places] * sent.counts)
        return busiest_link_ms(costs.network, num_bytes)

    def least_bytes(self, recompute: Recompute) -> float:
        """What the rank with most holds at least."""
        if recompute not in self._least_bytes:
            segments = segment_costs(self._pieces, self._work.plan, recompute)
            kept = np.array([segments[name].bytes for name in self._work.plan.cost_names])
            static = np.array([rank.static_bytes for rank in self._costs.ranks])
            self._least_bytes[recompute] = float((static + self._work.held @ kept).max())
        return self._least_bytes[recompute]


class _Sent(NamedTuple):
    """Messages of a plan.

    Attributes:
        sizes: of different messages: F for results in either direction, else the kind of the send; and the
            segments, the segment whose weights are lent, or the cost names of the keys and values.
        places, senders, receivers, counts: how many of a size, by its place, go from one rank to another.
    """

    sizes: tuple[tuple[Kind, tuple[str, ...]], ...]
    places: Numbers
    senders: Numbers
    receivers: Numbers
    counts: Numbers


class _Work(NamedTuple):
    """What ranks compute in a small plan of a schedule, a row for each rank.

    Attributes:
        plan: of few micro batches.
        held: how many forwards of each cost name wait for their backward, when these are most.
        sent: its messages.
        before: of each class of computations, how many forwards a micro batch passes before a rank's first
            segment, and how many backwards after it; none where micro batches differ.
    """

    plan: Plan
    held: Numbers
    before: tuple[Numbers, Numbers]
    sent: _Sent


def _few(request: ScheduleRequest) -> int:
    """Micro batches of a small plan: two for each rank, a round of the largest fold, or all there are."""
    return min(request.num_microbatches, 2 * request.num_ranks)


@lru_cache(maxsize=4096)
def _small_work(schedule: str, request: ScheduleRequest) -> _Work:
    plan = plan_of(schedule, request)
    work = plan.computations
    classes = range(len(work.classes))
    firsts = [0] * plan.num_ranks
    if not plan.micro_batch_names:
        homes = [set(ranks) for ranks in plan.placement]
        firsts = [next(s for s, own in enumerate(homes) if rank in own) for rank in range(plan.num_ranks)]
    before = []
    for row in (0, 1):  # forwards, backwards
        of_segment = work.class_of[work.table[row, :, 0]]
        passed = [np.bincount(of_segment[:first], minlength=len(classes)) for first in firsts]
        before.append(np.stack(passed))
    return _Work(plan, _most_held(plan), (before[0], before[1]), _messages(plan))


def _messages(plan: Plan) -> _Sent:
    work = plan.computations
    crossing = np.bincount(work.edge_of[work.edge_of != NONE], minlength=len(work.edges)).tolist()
    sent: Counter[tuple[tuple[Kind, tuple[str, ...]], int, int]] = Counter()
    for edge, count in zip(work.edges, crossing, strict=True):
        sent[(Kind.F, (edge.producer, edge.consumer)), edge.sender, edge.receiver] += count
    for loan in plan.loans:
        names = (plan.segment_names[loan.segment],)
        sent[(Kind.SEND_P, names), loan.owner, loan.borrower] += 1
        sent[(Kind.SEND_G, names), loan.borrower, loan.owner] += 1
    for context in plan.contexts:
        keys = Kind.SEND_K, tuple(plan.context_cost_name(i) for i in context.lent)
        sent[keys, context.owner, context.borrower] += 1 + context.is_resent
        sent[keys, context.borrower, context.owner] += 1
    sizes = {size: place for place, size in enumerate(dict.fromkeys(size for size, _, _ in sent))}
    rows = [(sizes[size], sender, receiver, count) for (size, sender, receiver), count in sent.items()]
    return _Sent(tuple(sizes), *np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def _message_bytes(costs: Costs, kind: Kind, names: tuple[str, ...]) -> int:
    if kind is Kind.F:
        return costs.num_bytes(*names)
    if kind is Kind.SEND_K:
        return sum(map(costs.context_message_bytes, names))
    lent = costs.loan_bytes.get(names[0], LoanBytes(0, 0))
    return lent.weights if kind is Kind.SEND_P else lent.gradients


def _most_held(plan: Plan) -> Numbers:
    work = plan.computations
    names = {name: place for place, name in enumerate(plan.cost_names)}
    changes = np.array([{Kind.F: 1, Kind.B: -1}.get(kind, 0) for kind, _, _ in work.classes])
    name_of = np.array([names[name] for _, name, _ in work.classes])
    held = []
    for begin, end in pairwise(work.begins):
        classes = work.class_of[begin:end]
        most = int(np.argmax(np.cumsum(changes[classes]))) + 1
        until = classes[:most]
        held.append(np.bincount(name_of[until], weights=changes[until], minlength=len(names)))
    return np.stack(held).astype(np.int64)
