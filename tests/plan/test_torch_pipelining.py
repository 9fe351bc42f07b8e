"""Plans, through their CSV form, held against torch.distributed.pipelining's own checks and schedules.

Torch describes a schedule by the same kind of text (``0F0``, ``1SEND_F3``) and brings three checks that share
nothing with ours: ``_validate_schedule`` (complete, F before B before W, one rank per stage),
``_add_send_recv`` (lowering) and ``_simulate_comms_compute`` (every receive has its send, no rank waits for
ever, with buffered sends).

In torch a stage belongs to one rank and its successor is the stage with the next number. All stage-based
and V-shaped plans are of that form. Helix is not, because the rank of an attention segment depends on the
micro batch's slot. Naming the pair (slot, segment) a stage gives every stage one rank, which is all that
``_validate_schedule`` asks. The other two would take the first segment of a slot for the successor of the
last segment of the slot before. So they see one slot at a time, which is a chain of stages: messages and
order are checked within every slot, deadlocks between slots only by our own validation.
"""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from helixpipe.plan import Kind, Operation, PlanError, ScheduleRequest, build_plan, validate
from helixpipe.plan.plan import orders_from_csv

STAGE_SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved",
    "zb-h1",
    "zb-v",
    "v-half",
    "v-min",
    "dualpipe-v",
    "seq1f1b",
)
REFUSED = (AssertionError, ValueError)


def built(schedule, p, m, layers=None, *, compute_only=False, **options):
    request = ScheduleRequest(num_ranks=p, num_layers=layers or 2 * p, num_microbatches=m, **options)
    return build_plan(schedule, request, compute_only=compute_only)


def actions(plan):
    """Torch's actions per rank from the CSV: a message there is named after the stage at its own end."""
    rows = {}
    for rank, row in enumerate(plan.to_csv().splitlines()):
        rows[rank] = []
        for word in filter(None, row.split(",")):
            op = Operation.parse(word)
            kind = "I" if op.kind is Kind.B and plan.splits_backward else op.kind.value
            stage = op.segment + (op.kind in (Kind.RECV_F, Kind.SEND_B))
            rows[rank].append(torch_schedules._Action.from_str(f"{stage}{kind}{op.micro_batch}"))
    return rows


def check(plan):
    """Raise one of ``REFUSED`` unless torch accepts the plan; how many steps torch takes to run it."""

    def rank_of(stage):
        return plan.placement[stage][0]

    rows = actions(plan)
    torch_schedules._validate_schedule(rows, plan.num_ranks, plan.num_segments, plan.num_microbatches)
    if not plan.is_lowered:
        rows = torch_schedules._add_send_recv(rows, rank_of, plan.num_segments)
    steps = torch_schedules._simulate_comms_compute(rows, rank_of, plan.num_segments)
    return max(map(len, steps.values()))


@pytest.mark.parametrize("compute_only", [True, False])
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 1), (2, 6), (3, 9), (4, 8), (5, 3)])
@pytest.mark.parametrize("schedule", STAGE_SCHEDULES)
def test_torch_accepts_every_stage_based_plan(schedule, p, m, compute_only):
    if schedule == "interleaved":
        m = -(-m // p) * p
    assert check(built(schedule, p, m, compute_only=compute_only)) > 0


def swapped(plan, rank, first, second):
    orders = [list(order) for order in plan.orders]
    order = orders[rank]
    order[first], order[second] = order[second], order[first]
    return plan.with_orders(orders)


def without(plan, rank, index):
    orders = [list(order) for order in plan.orders]
    del orders[rank][index]
    return plan.with_orders(orders)


def accepts(judge, plan):
    try:
        judge(plan)
    except REFUSED:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([name for name in STAGE_SCHEDULES if name != "seq1f1b"]),
    st.integers(2, 4),
    st.integers(1, 2),
    st.data(),
)
def test_torch_and_we_agree_on_changed_orders(schedule, p, rounds, data):
    """Two operations of a rank change places; both or none of us find a way to run what comes out."""
    plan = built(schedule, p, p * rounds, compute_only=True)
    rank = data.draw(st.integers(0, p - 1))
    place = st.integers(0, len(plan.orders[rank]) - 1)
    changed = swapped(plan, rank, data.draw(place), data.draw(place))
    assert accepts(check, changed) == accepts(validate, changed)


@pytest.mark.parametrize("schedule", STAGE_SCHEDULES)
def test_torch_notices_every_missing_operation(schedule):
    plan = built(schedule, 2, 2)
    for rank, order in enumerate(plan.orders):
        for index in range(len(order)):
            with pytest.raises(REFUSED):
                check(without(plan, rank, index))


@pytest.mark.parametrize("schedule", STAGE_SCHEDULES)
def test_torch_notices_a_receive_after_its_use(schedule):
    plan = built(schedule, 2, 4)
    order = plan.orders[1]
    receive = next(index for index, op in enumerate(order) if op.kind is Kind.RECV_F)
    use = order.index(Operation(order[receive].segment + 1, Kind.F, order[receive].micro_batch))
    changed = swapped(plan, 1, receive, use)
    with pytest.raises(REFUSED):
        check(changed)
    with pytest.raises(PlanError):
        validate(changed)


def torch_orders(schedule_class, p, m, num_stages, split, **attributes):
    """The order of each rank by one of torch's schedule classes, as our operations.

    Torch's constructor wants process groups; the planning method reads nothing but these sizes.
    """
    sizes = SimpleNamespace(pp_group_size=p, num_stages=num_stages, _n_microbatches=m, **attributes)
    plan = schedule_class._calculate_single_rank_operations
    return tuple(tuple(_operations(plan(sizes, rank), split)) for rank in range(p))


def _operations(row, split):
    for action in row:
        for part in () if action is None else action.sub_actions or (action,):
            stage, kind, i = part.stage_index, part.computation_type.value, part.microbatch_index
            if kind not in "FBIW":
                continue  # torch's own notes about gradient reduction
            yield Operation(stage, Kind.B if kind == "I" else Kind(kind), i)
            if kind == "B" and split:
                yield Operation(stage, Kind.W, i)


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 3), (2, 8), (3, 6), (4, 7), (4, 16), (7, 20)])
def test_zb_v_is_torchs(p, m):
    orders = torch_orders(torch_schedules.ScheduleZBVZeroBubble, p, m, 2 * p, split=True)
    assert built("zb-v", p, m, compute_only=True).orders == orders


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (2, 7), (3, 6), (4, 16), (7, 20)])
def test_dualpipe_v_is_torchs(p, m):
    orders = torch_orders(torch_schedules.ScheduleDualPipeV, p, m, 2 * p, split=True)
    assert built("dualpipe-v", p, m, compute_only=True).orders == orders


@pytest.mark.parametrize(("p", "v", "rounds"), [(2, 2, 1), (2, 3, 3), (3, 2, 2), (4, 2, 4)])
def test_interleaved_is_torchs(p, v, rounds):
    orders = torch_orders(
        torch_schedules.ScheduleInterleaved1F1B,
        p,
        p * rounds,
        p * v,
        split=False,
        n_local_stages=v,
        microbatches_per_round=p,
    )
    plan = built("interleaved", p, p * rounds, p * v, virtual_stages=v, compute_only=True)
    assert plan.orders == orders


def test_csv_is_what_was_checked():
    plan = built("zb-v", 3, 6)
    assert orders_from_csv(plan.to_csv()) == plan.orders


HELIX = [(1, 2, 2, 1), (2, 2, 1, 2), (2, 4, 2, 1), (3, 3, 2, 2), (4, 8, 2, 1)]


def stages_of_slots(plan, p, fold):
    """Helix with (slot, segment) as stages and with micro batches numbered within their slot."""

    def renamed(op):
        start, member = divmod(op.micro_batch, fold)
        round_number, slot = divmod(start, p)
        return Operation(slot * plan.num_segments + op.segment, op.kind, round_number * fold + member)

    rows = {
        rank: [torch_schedules._Action.from_str(str(renamed(op))) for op in order]
        for rank, order in enumerate(plan.orders)
    }
    return rows, p * plan.num_segments, plan.num_microbatches // p


@pytest.mark.parametrize(("p", "layers", "fold", "rounds"), HELIX)
def test_torch_finds_helix_complete(p, layers, fold, rounds):
    plan = built("helix", p, p * fold * rounds, layers, num_fold=fold, compute_only=True)
    rows, num_stages, num_microbatches = stages_of_slots(plan, p, fold)
    ranks = torch_schedules._validate_schedule(rows, p, num_stages, num_microbatches)
    for stage, rank in ranks.items():
        slot, segment = divmod(stage, plan.num_segments)
        assert rank == plan.rank_of(segment, slot * fold)
    for rank in range(p):
        shorter = {**rows, rank: rows[rank][1:]}
        with pytest.raises(AssertionError):
            torch_schedules._validate_schedule(shorter, p, num_stages, num_microbatches)


@pytest.mark.parametrize("compute_only", [True, False])
@pytest.mark.parametrize(("p", "layers", "fold", "rounds"), HELIX)
def test_torch_runs_every_slot_of_helix(p, layers, fold, rounds, compute_only):
    plan = built("helix", p, p * fold * rounds, layers, num_fold=fold, compute_only=compute_only)
    for slot in range(p):
        chain = {stage: plan.rank_of(stage, slot * fold) for stage in range(plan.num_segments)}
        rows = {
            rank: [action for action in row if action.microbatch_index // fold % p == slot]
            for rank, row in actions(plan).items()
        }
        rows = {rank: row for rank, row in rows.items() if row}
        if compute_only:
            rows = torch_schedules._add_send_recv(rows, chain.get, plan.num_segments)
        steps = torch_schedules._simulate_comms_compute(rows, chain.get, plan.num_segments)
        assert sum(action is not None for row in steps.values() for action in row) == sum(
            map(len, rows.values())
        )
