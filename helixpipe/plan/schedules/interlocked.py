"""Interlocked rounds of helix: the forwards of a round run among the backwards of the round before.

First in, last out, each round begins with ranks that wait for work and ends with ranks that have none left.
Interlocked, all rounds share one clock, and only the first start and the last end are paid for.

**The clock.** Let S and A be the forward of a middle segment and of attention, s and a their whole backward,
and tau = S + A + s + a. A round is L layers of p slots on p ranks, so it costs every rank L tau: if both
directions advance one layer per tau and a round starts every L tau, all ranks are busy. What runs when is
then a *key* per operation, in layers of that clock. With round k, slot j, z = p-1-j, layer l, D = L + lag:

    S  k L + l         + f j          h  k L + D + beta - h_b              + b z
    A  k L + l + alpha + f' j         a  k L + D + (L-1-l) + beta          + b z
    H  k L + L + h_f   + f j          s  k L + D + (L-1-l) + beta + delta  + b' z

H and h are the last segment. Backwards mirror forwards: they descend the layers, and the slot that came last
turns first (z).

**The coefficients.** The p slots of a layer meet on one rank, which runs their S and s in turn: they are
spread over p omega, omega = (S + s) / tau, with some room for attention in between, hence f, f', b and b'
near omega. The backward of a round starts when the forward of its last slot has ended, so lag is a constant
and omega (p - 1). Attention lies in the middle of a layer's time (alpha, beta) and s behind a (delta grows
with a / tau). The numbers in :class:`_Spread` come from a search over jobs of 4 to 16 ranks and 32k to
256k tokens. f' and b' are clamped so that keys rise along every slot.

**No deadlock.** Keys rise along every dependency, within a slot from S of a layer to A, to S of the next, and
so on down to s of layer 0. Every rank's order is thus part of one linear order of all operations, in which
each follows what it needs, whatever the operations' durations.

**With costs** the keys are priorities of a list schedule instead (:class:`_ListSchedule`): each rank runs the
smallest key among the operations that can start now, or so soon that waiting costs less than disorder. The
best of nine settings in the simulator is taken, or the keys alone where these do better, as they may far from
the jobs of the search. A list schedule's orders are those of an execution, so they cannot block.

**Weight gradients** apart (W) follow their B at once, whose message leaves the earlier. With costs, those of
the last round stand behind all else and fill the gaps of the last ramp, where ranks have nothing else to do.

Layers need not be alike: the clock then counts in mean layers, a longer layer taking a longer part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, chain, pairwise, product
from statistics import fmean
from typing import NamedTuple

from helixpipe.plan.operation import Kind, Operation, output_edge
from helixpipe.plan.plan import Order, Plan
from helixpipe.plan.schedules.request import KnownCosts
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.simulate import simulate_until

# How much longer than for the first operation a rank may wait for one with a smaller key, in mean layers.
_WAITS = (0.0, 1 / 140)
# By how many layers forwards are put before or behind their keys.
_SHIFTS = (-1.0, 0.0, 1.0, 2.0)
# And with the keys of costs that are not known.
_USUAL_SHIFT = 1.0
# Layers of the clock that no iteration has: behind everything else.
_BEHIND = 1e6
# Without costs: the share of the middle segment, omega, by attention range (7B at 128k), and of the rest what
# attention's backward takes, 2.5 times its forward's products.
_OMEGA = {"core": 0.23, "qkv": 0.18, "block": 0.15}
_BACKWARD_SHARE = 0.73


class Seat(NamedTuple):
    """Where a micro batch sits: its round, its slot of the p slots, and which of the slot's it is."""

    round: int
    slot: int
    member: int


@dataclass(frozen=True)
class _Pace:
    """What the keys depend on: how long layers are, in mean layers, and two shares of a mean layer's time."""

    layers: tuple[float, ...]
    omega: float
    back: float
    layer_ms: float = 0.0


def interlocked_orders(plan: Plan, seats: Sequence[Seat], *, splits_backward: bool) -> list[Order]:
    """Every rank's operations sorted by key: for costs that are not known.

    Args:
        plan: helix's placement; its orders do not matter.
        seats: of every micro batch.
        splits_backward: whether micro batches have W.
    """
    key = _keys(plan.num_ranks, _usual_pace(plan))
    rows: list[list[_Entry]] = [[] for _ in range(plan.num_ranks)]
    for op, seat in _operations(plan, seats, splits_backward):
        rank = plan.rank_of(op.segment, op.micro_batch)
        rows[rank].append(_Entry(key(op, seat), _turn(op, seat), op))
    return [tuple(entry.operation for entry in sorted(row)) for row in rows]


def listed_orders(
    plan: Plan,
    seats: Sequence[Seat],
    known: KnownCosts,
    *,
    splits_backward: bool,
) -> list[Order]:
    """The best of the list schedules with the keys as priorities and of the keys alone.

    Args:
        plan: helix's placement and loans; its orders do not matter.
        seats: of every micro batch.
        known: costs of the plan. If no setting stays within the memory limit, the smallest peak wins.
        splits_backward: whether micro batches have W.
    """
    work = _ListedWork(plan, seats, known.of(plan), splits_backward=splits_backward)
    alone = interlocked_orders(plan, seats, splits_backward=splits_backward)
    best: tuple[tuple[float, float], list[Order]] | None = None
    for orders in chain(_list_schedules(plan, work), [alone]):
        candidate = plan.with_orders(orders)
        # How much is borrowed at a time depends on the order.
        exact = known.of(candidate)
        excess = 0.0
        if known.memory_limit_bytes is not None:
            excess = max(0.0, max(peak_bytes(candidate, exact)) - known.memory_limit_bytes)
        end_by_ms = _NOT_YET
        if best is not None and best[0][0] == 0:
            end_by_ms = best[0][1] - exact.least_finish_ms
        simulation = simulate_until(candidate, exact, end_by_ms)
        if simulation is None:
            continue
        value = excess, simulation.iteration_ms
        if best is None or value < best[0]:
            best = value, orders
    assert best is not None
    return best[1]


def _list_schedules(plan: Plan, work: _ListedWork) -> Iterator[list[Order]]:
    """Of every setting."""
    pace = _pace(plan, work.costs)
    queues = {shift: work.queues(pace, shift) for shift in _SHIFTS}
    for wait, shift in product(_WAITS, _SHIFTS):
        yield _ListSchedule(work, queues[shift], wait * pace.layer_ms).run()
    yield _ListSchedule(work, work.queues(_usual_pace(plan), _USUAL_SHIFT), 0.0).run()


def _operations(plan: Plan, seats: Sequence[Seat], splits_backward: bool) -> Iterator[tuple[Operation, Seat]]:
    """Every computation of the plan with its micro batch's seat."""
    kinds = [Kind.F, Kind.B] + [Kind.W] * splits_backward
    for micro_batch, seat in enumerate(seats):
        for segment, kind in product(range(plan.num_segments), kinds):
            yield Operation(segment, kind, micro_batch), seat


def _turn(op: Operation, seat: Seat) -> int:
    """Members of a slot go forward in their order and backward in reverse."""
    return seat.member if op.kind is Kind.F else -seat.member


def _usual_pace(plan: Plan) -> _Pace:
    """Of costs that are not known."""
    omega = _OMEGA[str(plan.parameters["attention_range"])]
    return _Pace((1.0,) * (plan.num_segments // 2), omega, _BACKWARD_SHARE * (1 - omega))


def _pace(plan: Plan, costs: Costs) -> _Pace:
    """A layer is its attention and half of the segments around it; those at the ends count as middle ones."""

    def total(segment: int) -> float:
        cost = costs.segments[plan.cost_name(segment, 0)]
        return cost.forward + cost.backward + cost.weight

    n = plan.num_segments
    around = [total(segment) for segment in range(0, n, 2)]
    middle_ms = fmean(around[1:-1] or around)
    around[0] = around[-1] = middle_ms
    attention = [costs.segments[plan.cost_name(segment, 0)] for segment in range(1, n, 2)]
    back_ms = fmean(cost.backward + cost.weight for cost in attention)
    layers_ms = [
        total(2 * layer + 1) + (before + after) / 2 for layer, (before, after) in enumerate(pairwise(around))
    ]
    mean_ms = fmean(layers_ms)
    if mean_ms == 0:
        return _Pace((1.0,) * len(layers_ms), 0.0, 0.0, 0.0)
    # Keys must rise even where a layer takes no time.
    layers = tuple(max(ms / mean_ms, 0.01) for ms in layers_ms)
    return _Pace(layers, middle_ms / mean_ms, back_ms / mean_ms, mean_ms)


@dataclass(frozen=True)
class _Spread:
    """The coefficients: spreads per slot (f, f', b, b') and offsets, in mean layers."""

    f: float
    f_attention: float
    b_attention: float
    b: float
    alpha: float
    beta: float
    delta: float
    lag: float
    last_forward: float
    last_backward: float

    @classmethod
    def of(cls, p: int, pace: _Pace) -> _Spread:
        omega, back, shortest = pace.omega, pace.back, min(pace.layers)
        alpha, beta, delta = 0.591, -0.052, min(max(0.650 * back + 0.356 * omega, 0.01), 0.95)
        f, b = 1.197 * omega, 0.871 * omega
        last_forward, last_backward = alpha / 2, max(0.52 * back, 0.01)
        # Over all slots, spreads may differ by as much as offsets leave room for on either side.
        room = 0.9 * shortest / max(1, p - 1)
        least_lag = last_forward + f * (p - 1) - beta + last_backward
        return cls(
            f=f,
            f_attention=min(max(1.069 * omega, f - room * alpha), f + room * (1 - alpha)),
            b_attention=b,
            b=min(max(0.958 * omega, b - room * delta), b + room * (1 - delta)),
            alpha=alpha,
            beta=beta,
            delta=delta,
            lag=max(1.389 + 1.179 * omega * (p - 1), least_lag + 0.01),
            last_forward=last_forward,
            last_backward=last_backward,
        )


def _keys(p: int, pace: _Pace) -> Callable[[Operation, Seat], float]:
    """The key of an operation; that of W is its B's."""
    spread = _Spread.of(p, pace)
    num_layers = len(pace.layers)
    clock = [0.0, *accumulate(pace.layers)]
    turn = clock[num_layers] + spread.lag

    def forward(layer: int, is_attention: int, slot: int) -> float:
        if is_attention:
            return clock[layer] + spread.alpha * pace.layers[layer] + spread.f_attention * slot
        last = spread.last_forward if layer == num_layers else 0.0
        return clock[layer] + last + spread.f * slot

    def backward(layer: int, is_attention: int, slot: int) -> float:
        z = p - 1 - slot
        if layer == num_layers:
            return turn + spread.beta - spread.last_backward + spread.b_attention * z
        begin = turn + clock[num_layers] - clock[layer + 1] + spread.beta
        if is_attention:
            return begin + spread.b_attention * z
        return begin + spread.delta * pace.layers[layer] + spread.b * z

    tables = [
        [[of(*divmod(segment, 2), slot) for slot in range(p)] for segment in range(2 * num_layers + 1)]
        for of in (forward, backward)
    ]
    for slot in range(p):
        chain = [row[slot] for row in tables[0]] + [row[slot] for row in reversed(tables[1])]
        assert all(before < after for before, after in pairwise(chain)), "keys must rise along every slot"

    def key(op: Operation, seat: Seat) -> float:
        return seat.round * clock[num_layers] + tables[op.kind is not Kind.F][op.segment][seat.slot]

    return key


class _Entry(NamedTuple):
    """An operation in a queue; entries compare by key, then by the order of a slot's members."""

    key: float
    member: int
    operation: Operation


_STREAMS = (Kind.F, Kind.B, Kind.W)


@dataclass(frozen=True)
class _Queues:
    """Forwards, backwards and weight gradients of every rank, each sorted by key.

    Attributes:
        ranks: numbers of computations, by rank and stream.
        place: of every computation in the order of all keys.
    """

    ranks: list[list[list[int]]]
    place: list[int]


class _ListedWork:
    """What a list schedule asks of every computation, by number.

    Messages take the time of their edge, whatever else is under way; the simulator, which knows better,
    judges the result.

    Attributes:
        costs: of the plan.
        operations: by number.
        ranks, streams, durations_ms: of each.
        readied: the computation that takes its result; its own backward after the last forward; or -1.
        message_ms: until that has it.
        weight: the computation of its weight gradient, for a backward that has one; or -1.
    """

    def __init__(self, plan: Plan, seats: Sequence[Seat], costs: Costs, *, splits_backward: bool) -> None:
        found = list(_operations(plan, seats, splits_backward))
        self._seats = [seat for _, seat in found]
        self.costs = costs
        self.operations = [op for op, _ in found]
        self.num_ranks = plan.num_ranks
        self.ranks = [plan.rank_of(op.segment, op.micro_batch) for op in self.operations]
        self.streams = [_STREAMS.index(op.kind) for op in self.operations]
        durations = {
            (kind, name): costs.duration_ms(kind, name, splits_backward=splits_backward)
            for kind, name in product(_STREAMS, plan.cost_names)
        }
        names = plan.segment_names
        self.durations_ms = [durations[op.kind, names[op.segment]] for op in self.operations]
        numbers = {op: number for number, op in enumerate(self.operations)}
        message_ms = cache(partial(_message_ms, costs))
        self.readied, self.message_ms, self.weight = [], [], []
        for op, rank in zip(self.operations, self.ranks, strict=True):
            edge = output_edge(op, plan.num_segments)
            readied = op._replace(segment=edge[1]) if edge else op._replace(kind=Kind.B)
            number = numbers[readied] if edge or op.kind is Kind.F else -1
            self.readied.append(number)
            crosses = number >= 0 and self.ranks[number] != rank
            ends = (names[segment] for segment in sorted(edge or ()))
            self.message_ms.append(message_ms(*ends, rank, self.ranks[number]) if crosses else 0.0)
            has_weight = op.kind is Kind.B and splits_backward
            self.weight.append(numbers[op._replace(kind=Kind.W)] if has_weight else -1)

    def queues(self, pace: _Pace, shift: float) -> _Queues:
        """With forwards put so many layers before or behind their keys, and the last round's W at the end."""
        key, last_round = _keys(self.num_ranks, pace), self._seats[-1].round
        moves = (shift, 0.0, 0.0)
        entries = []
        for number, (op, seat) in enumerate(zip(self.operations, self._seats, strict=True)):
            stream = self.streams[number]
            moved = _BEHIND if stream == 2 and seat.round == last_round else moves[stream]
            entries.append((key(op, seat) + moved, _turn(op, seat), op, number))
        entries.sort()
        ranks: list[list[list[int]]] = [[[] for _ in _STREAMS] for _ in range(self.num_ranks)]
        place = [0] * len(entries)
        for position, (*_, number) in enumerate(entries):
            place[number] = position
            ranks[self.ranks[number]][self.streams[number]].append(number)
        return _Queues(ranks, place)


def _message_ms(costs: Costs, producer: str, consumer: str, sender: int, receiver: int) -> float:
    if costs.network is None:
        return costs.transfer_ms(producer, consumer)
    return costs.network.transfer_ms(costs.num_bytes(producer, consumer), sender, receiver)


_NOT_YET = float("inf")


class _ListSchedule:
    """An execution in which each rank takes the next operation from the heads of its queues."""

    def __init__(self, work: _ListedWork, queues: _Queues, wait_ms: float) -> None:
        self._work = work
        self._queues = queues
        self._wait_ms = wait_ms
        self._next = [[0] * len(_STREAMS) for _ in queues.ranks]
        self._free_ms = [0.0] * len(queues.ranks)
        self._ready_ms = [
            0.0 if op.segment == 0 and op.kind is Kind.F else _NOT_YET for op in work.operations
        ]

    def run(self) -> list[Order]:
        """Every rank's order."""
        work, ready_ms = self._work, self._ready_ms
        orders: list[list[Operation]] = [[] for _ in self._queues.ranks]
        choices = [self._choose(rank) for rank in range(len(orders))]
        starts_ms = [start_ms for start_ms, _ in choices]
        while (start_ms := min(starts_ms)) != _NOT_YET:
            rank = starts_ms.index(start_ms)
            _, number = choices[rank]
            orders[rank].append(work.operations[number])
            self._next[rank][work.streams[number]] += 1
            end_ms = self._free_ms[rank] = start_ms + work.durations_ms[number]
            if work.weight[number] >= 0:
                ready_ms[work.weight[number]] = end_ms
            changed = {rank}
            if work.readied[number] >= 0:
                ready_ms[work.readied[number]] = end_ms + work.message_ms[number]
                changed.add(work.ranks[work.readied[number]])
            for other in changed:
                choices[other] = self._choose(other)
                starts_ms[other] = choices[other][0]
        assert all(len(o) == sum(map(len, q)) for o, q in zip(orders, self._queues.ranks, strict=True))
        return [tuple(order) for order in orders]

    def _choose(self, rank: int) -> tuple[float, int]:
        """The smallest key among the heads that can start first, or not much later; when it can."""
        free_ms, first_ms = self._free_ms[rank], _NOT_YET
        heads, ready_ms, begins = [], self._ready_ms, self._next[rank]
        for stream, queue in enumerate(self._queues.ranks[rank]):
            position = begins[stream]
            if position < len(queue):
                number = queue[position]
                start_ms = ready_ms[number]
                if start_ms < free_ms:
                    start_ms = free_ms
                if start_ms < first_ms:
                    first_ms = start_ms
                heads.append((start_ms, stream, number))
        if first_ms == _NOT_YET:
            return _NOT_YET, -1
        # W can run at any time: nothing waits for it, and it waits for nothing.
        latest_ms, place = first_ms + self._wait_ms, self._queues.place
        chosen = first_ms, -1
        first_place = len(place)
        for start_ms, stream, number in heads:
            if start_ms <= (first_ms if stream == 2 else latest_ms) and place[number] < first_place:
                first_place = place[number]
                chosen = start_ms, number
        return chosen
