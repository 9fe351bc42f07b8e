"""Validation: what must hold for a plan before it may run.

The checks are independent of how plans are made: they look only at the plan's data, so a plan that was read
from a file or edited by hand is held to the same rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product

from helixpipe.plan.deadlock import find_deadlock
from helixpipe.plan.device_model import DEVICE_MODELS, find_stall
from helixpipe.plan.operation import Kind, Operation, input_of, message_of, output_edge
from helixpipe.plan.plan import Plan
from helixpipe.plan.plan_error import PlanError, grid, operations
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.validate_slices import (
    check_contexts,
    check_groups,
    check_places_of_contexts,
    check_slices,
)

_NEIGHBOUR_KINDS = frozenset((Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B))


def validate(plan: Plan) -> None:
    """Raise :class:`PlanError` for the first rule that the plan breaks.

    The rules: shapes that agree; every micro batch computed exactly once per segment and direction, on the
    rank that the placement names, in a possible order; weight gradients apart in all segments of a micro
    batch or in none; slices of a sequence forward in order and backward in reverse where they attend, with
    the keys and values of all earlier slices on the rank of each exactly once; one matching send and receive
    per edge between ranks, in the same order at both ends; no deadlock, neither with buffered sends nor when
    every send waits for its receive, nor in any of ``DEVICE_MODELS``. Weights on loan arrive once before they
    are used, and their gradients return once, when they are complete; so do keys and values on loan.
    """
    _check_shape(plan)
    _check_loans(plan)
    check_contexts(plan)
    _check_compute(plan)
    check_slices(plan)
    if plan.is_lowered:
        _check_messages(plan)
    _check_progress(plan)


def check_memory(plan: Plan, costs: Costs, limit_bytes: int) -> None:
    """Raise :class:`PlanError` if a rank holds more than ``limit_bytes`` at its peak.

    Args:
        plan: any plan.
        costs: what its operations and ranks hold.
        limit_bytes: what one rank may hold.
    """
    for rank, peak in enumerate(peak_bytes(plan, costs)):
        if peak > limit_bytes:
            raise PlanError(
                f"rank {rank} holds {peak} bytes at its peak, {peak - limit_bytes} over "
                f"the limit of {limit_bytes}; use a smaller fold, shorter sequences or more ranks"
            )


def _check_shape(plan: Plan) -> None:
    if min(plan.num_ranks, plan.num_segments, plan.num_microbatches) < 1:
        raise PlanError("a plan needs at least one rank, one segment and one micro batch")
    if len(plan.orders) != plan.num_ranks:
        raise PlanError(f"{plan.num_ranks} ranks but {len(plan.orders)} orders")
    if len(plan.placement) != plan.num_segments:
        raise PlanError(f"{plan.num_segments} segments but {len(plan.placement)} placed")
    for segment, row in enumerate(plan.placement):
        if len(row) != plan.num_microbatches:
            raise PlanError(
                f"segment {segment} is placed for {len(row)} of {plan.num_microbatches} micro batches"
            )
        if not all(0 <= rank < plan.num_ranks for rank in row):
            raise PlanError(f"segment {segment} is placed on a rank outside 0..{plan.num_ranks - 1}")
    if len(plan.micro_batch_names) not in (0, plan.num_microbatches):
        raise PlanError(f"{len(plan.micro_batch_names)} names for {plan.num_microbatches} micro batches")
    check_groups(plan)
    for rank, index, op in operations(plan):
        if op.segment >= plan.num_segments or op.micro_batch >= plan.num_microbatches:
            raise PlanError(f"no such segment or micro batch:\n{grid(plan, rank, index)}")
        if op.kind.is_compute != (op.peer is None) or op.peer == rank:
            raise PlanError(f"impossible peer:\n{grid(plan, rank, index)}")


def _check_loans(plan: Plan) -> None:
    """Each between two ranks, for computations of the borrower that no other loan serves."""
    served: set[tuple[int, int]] = set()
    for loan in plan.loans:
        pairs = {(loan.segment, micro_batch) for micro_batch in loan.micro_batches}
        is_possible = (
            0 <= loan.segment < plan.num_segments
            and pairs
            and all(0 <= i < plan.num_microbatches for i in loan.micro_batches)
            and 0 <= loan.owner < plan.num_ranks
            and loan.owner != loan.borrower
        )
        if not is_possible:
            raise PlanError(f"impossible loan: {loan}")
        if len(pairs) < len(loan.micro_batches) or pairs & served:
            raise PlanError(f"weights are lent twice for one micro batch: {loan}")
        if any(plan.rank_of(*pair) != loan.borrower for pair in pairs):
            raise PlanError(f"weights are lent to another rank than the placement names: {loan}")
        served |= pairs


def _check_compute(plan: Plan) -> None:
    kinds = _kinds(plan)
    seen: dict[Operation, tuple[int, int]] = {}
    for rank, index, op in operations(plan):
        if not op.kind.is_compute:
            continue
        if op in seen:
            raise PlanError(f"{op} is run twice:\n{grid(plan, rank, index)}")
        seen[op] = (rank, index)
        home = plan.rank_of(op.segment, op.micro_batch)
        if rank != home:
            raise PlanError(f"{op} belongs to rank {home}:\n{grid(plan, rank, index)}")
        needed = kinds[op.micro_batch]
        for kind in needed[: needed.index(op.kind)]:
            if op._replace(kind=kind) not in seen:
                raise PlanError(f"{op} stands before its {kind.value}:\n{grid(plan, rank, index)}")
    for micro_batch, needed in enumerate(kinds):
        for segment, kind in product(range(plan.num_segments), needed):
            op = Operation(segment, kind, micro_batch)
            if op not in seen:
                home = plan.rank_of(segment, micro_batch)
                raise PlanError(f"{op} is missing from rank {home}")


def _kinds(plan: Plan) -> list[list[Kind]]:
    """The computations that each micro batch needs in every segment, in their order."""
    both = [Kind.F] + [Kind.B] * plan.has_backward
    return [
        [*both, Kind.W] if micro_batch in plan.split_micro_batches else both
        for micro_batch in range(plan.num_microbatches)
    ]


def _check_messages(plan: Plan) -> None:
    expected: Counter[tuple[int, Operation]] = Counter()
    for rank, _, op in operations(plan):
        edge = output_edge(op, plan.num_segments) if op.kind.is_compute else None
        if edge is not None:
            peer = plan.rank_of(edge[1], op.micro_batch)
            if peer != rank:
                send, receive, number = message_of(op)
                expected[rank, Operation(number, send, op.micro_batch, peer)] += 1
                expected[peer, Operation(number, receive, op.micro_batch, rank)] += 1
    for loan in plan.loans:
        expected[loan.owner, loan.weights_sent] += 1
        expected[loan.borrower, loan.weights_received] += 1
        if plan.has_backward:
            expected[loan.borrower, loan.gradients_sent] += 1
            expected[loan.owner, loan.gradients_received] += 1
    for message in plan.context_index.producers:
        expected[message.sender, message.send] += 1
        expected[message.receiver, message.receive] += 1
    for rank, index, op in operations(plan):
        if not op.kind.is_compute:
            expected[rank, op] -= 1
            if expected[rank, op] < 0:
                raise PlanError(f"{op} is not needed here:\n{grid(plan, rank, index)}")
    for (rank, op), count in expected.items():
        if count:
            raise PlanError(f"{op} is missing from rank {rank}")
    _check_places_of_messages(plan)
    _check_places_of_loans(plan)
    check_places_of_contexts(plan)
    _check_pairwise_order(plan)


def _check_places_of_messages(plan: Plan) -> None:
    """A send stands after its producer, a receive before its consumer."""
    for rank, order in enumerate(plan.orders):
        done: set[Operation] = set()
        received: set[Operation] = set()
        for index, op in enumerate(order):
            if not op.kind.is_compute and op.kind not in _NEIGHBOUR_KINDS:
                continue
            if op.kind.is_send:
                segment, kind = (op.segment, Kind.F) if op.kind is Kind.SEND_F else (op.segment + 1, Kind.B)
                if Operation(segment, kind, op.micro_batch) not in done:
                    raise PlanError(f"{op} stands before its producer:\n{grid(plan, rank, index)}")
            elif op.kind.is_receive:
                received.add(op._replace(peer=None))
            else:
                done.add(op)
                needed = input_of(op, plan.num_segments)
                if needed is None or plan.rank_of(needed.segment, op.micro_batch) == rank:
                    continue
                _, receive, number = message_of(needed)
                if Operation(number, receive, op.micro_batch) not in received:
                    raise PlanError(f"{op} stands before its receive:\n{grid(plan, rank, index)}")


def _check_places_of_loans(plan: Plan) -> None:
    """Weights stand before the first forward of the loan, their gradients after all that add to them."""
    needed = {op: loan for loan in plan.loans for op in loan.operations(Kind.F)}
    returned = {loan.gradients_sent: loan for loan in plan.loans}
    for rank, order in enumerate(plan.orders):
        done: set[Operation] = set()
        for index, op in enumerate(order):
            if op in needed and needed[op].weights_received not in done:
                raise PlanError(f"{op} stands before its weights:\n{grid(plan, rank, index)}")
            if op in returned and not plan.completing(returned[op]) <= done:
                raise PlanError(f"{op} stands before its gradients are complete:\n{grid(plan, rank, index)}")
            done.add(op)


def _check_pairwise_order(plan: Plan) -> None:
    """Between two ranks, messages arrive in the order in which they are sent."""
    sent: dict[tuple[int, int], list[Operation]] = {}
    taken: dict[tuple[int, int], list[tuple[int, Operation]]] = {}
    for rank, index, op in operations(plan):
        if op.kind.is_send:
            assert op.peer is not None
            sent.setdefault((rank, op.peer), []).append(op.counterpart(rank))
        elif op.kind.is_receive:
            assert op.peer is not None
            taken.setdefault((op.peer, rank), []).append((index, op))
    for (sender, receiver), receives in taken.items():
        for expected, (index, found) in zip(sent[sender, receiver], receives, strict=True):
            if expected != found:
                raise PlanError(
                    f"rank {sender} sends {expected.counterpart(receiver)} first, but rank {receiver} "
                    f"takes:\n{grid(plan, receiver, index)}"
                )


def _check_progress(plan: Plan) -> None:
    """No rank waits for ever, whatever a transport lets a message hold up."""
    # The strictest: where both ends of a message hold up all behind them, nothing else can hang.
    stuck = find_deadlock(plan, rendezvous=True)
    if not stuck:
        return
    buffered = find_deadlock(plan, rendezvous=False)
    if buffered:
        raise PlanError(f"deadlock with buffered sends:\n{_blocked_grid(plan, buffered)}")
    models = "; ".join(model.name for model in DEVICE_MODELS if find_stall(plan, model))
    raise PlanError(
        f"deadlock when sends wait for their receives (on GPUs: {models}):\n{_blocked_grid(plan, stuck)}"
    )


def _blocked_grid(plan: Plan, stuck: Mapping[int, int]) -> str:
    return "\n".join(grid(plan, rank, index) for rank, index in sorted(stuck.items()))
