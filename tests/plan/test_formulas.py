"""Closed forms: equal, not close, to the simulator, the memory of plans and the messages that they hold."""

from fractions import Fraction
from itertools import product

import pytest

from helixpipe.plan import Kind, ScheduleRequest, build_plan
from helixpipe.plan.formulas import FORMS, Case, markdown_table
from helixpipe.plan.schedules import planned_ahead
from helixpipe.plan.simulation.costs import Costs, SegmentCost, uniform_costs
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.simulate import simulate

# (F, B, W) of one layer: the ordinary case, its edges, and two cases outside W <= F <= B.
TIMES = [(10, 13, 7), (5, 5, 5), (4, 9, 1), (6, 6, 0), (3, 8, 3), (7, 4, 2), (2, 5, 6)]
SHAPES = [(p, m) for p in range(1, 7) for m in sorted({1, p, 2 * p, 3 * p + 1})] + [(8, 16)]
BYTES = 12  # of one layer: divides evenly into three pieces and into the slices of a sequence


def cases(schedule):
    """Every case in which the form claims to be exact and the schedule can be made."""
    for (p, m), (forward, backward, weight) in product(SHAPES, TIMES):
        times = {"t_F": forward, "t_B": backward, "t_W": weight}
        if schedule == "interleaved":
            wanted = [Case(p=p, L=2 * p * v, m=m // p * p, v=v, **times) for v in (1, 2, 3) if m >= p]
        elif schedule == "seq1f1b":
            wanted = [Case(p=p, L=p, m=m, K=K, **times) for K in (1, 4)]
        elif schedule == "helix":
            # Here m stands for rounds; 3 is as long as the segments in between, see plan_costs.
            wanted = [
                Case(p=p, L=p * layers, m=p * fold * m, fold=fold, t_last=last, **times)
                for layers, fold, last in product((1, 2), (1, 2), (3, 30))
                if m in (1, 2) and forward > 4
            ]
        elif schedule == "sliced-helix":
            # Fractions, since a slot is a p-th of a sequence.
            exact = {name: Fraction(value) for name, value in times.items()}
            wanted = [
                Case(
                    p=p,
                    L=p,
                    m=m,
                    fold=fold,
                    t_last=Fraction(last),
                    t_seg=Fraction(3),
                    t_seg_B=Fraction(2),
                    t_pre=Fraction(pre),
                    **exact,
                )
                for fold, last, pre in product((1, 2, 3), (3, 30), (0.75, 1.5))
                if m == 1
            ]
        else:
            wanted = [Case(p=p, L=4 * p, m=m, **times)]
        yield from (case for case in wanted if FORMS[schedule].exact.holds(case))


def shapes(schedule):
    """One case of each size."""
    return {(case.p, case.L, case.m, case.v, case.fold, case.K): case for case in cases(schedule)}.values()


def plan_of(schedule, case, *, compute_only=True):
    options = {
        "interleaved": {"virtual_stages": case.v},
        "seq1f1b": {"num_slices": case.K},
        "helix": {"num_fold": case.fold, "attention_range": case.attention_range},
        "sliced-helix": {"num_fold": case.fold},
    }
    request = ScheduleRequest(
        num_ranks=case.p, num_layers=case.L, num_microbatches=case.m, **options.get(schedule, {})
    )
    return build_plan(schedule, request, compute_only=compute_only)


def plan_costs(schedule, case, plan):
    """The case's layers as costs of the plan's segments."""
    if schedule == "helix":
        # Attention, and a segment of 1 + 2 ms. A third of the bytes each before, in and after attention.
        whole_backward = case.t_B + case.t_W
        return Costs(
            {
                "first": SegmentCost(1, 2, bytes=BYTES // 3),
                "attention": SegmentCost(case.t_F - 1, whole_backward - 2, bytes=BYTES // 3),
                "middle": SegmentCost(1, 2, bytes=2 * BYTES // 3),
                "last": SegmentCost(case.t_last / 3, 2 * case.t_last / 3, bytes=BYTES // 3),
            },
            {},
        )
    if schedule == "sliced-helix":
        pre, post, last = (float(time) / 3 for time in (case.t_pre, case.t_seg - case.t_pre, case.t_last))
        backward = float(case.t_B + case.t_W) - 2
        # Logits of one slice at a time: what the last segment keeps does not add up.
        of_role = {
            "first": SegmentCost(pre, 2 * pre, bytes=2 * BYTES // 3),
            "attention": SegmentCost(float(case.t_F) - 1, backward, bytes=BYTES // 3),
            "middle": SegmentCost(pre + post, 2 * (pre + post), bytes=2 * BYTES // 3),
            "last": SegmentCost(last, 2 * last),
        }
        return Costs({name: of_role[name.partition("/")[0]] for name in plan.cost_names}, {})
    # A slice gets what a whole sequence costs, so that numbers stay whole: everything is K times as large.
    layers = case.L // plan.num_segments
    cost = SegmentCost(case.t_F * layers, case.t_B * layers, case.t_W * layers, bytes=BYTES * layers)
    return Costs(dict.fromkeys(plan.cost_names, cost), {})


def parts(schedule, case):
    """How many slices, each with the costs of a whole layer, a micro batch is cut into."""
    return {"seq1f1b": case.K, "sliced-helix": case.p * case.fold}.get(schedule, 1)


@pytest.mark.parametrize("schedule", planned_ahead())
def test_bubbles(schedule):
    seen = 0
    for case in cases(schedule):
        plan = plan_of(schedule, case)
        timeline = simulate(plan, plan_costs(schedule, case, plan)).timeline
        form, scale = FORMS[schedule], parts(schedule, case)
        assert timeline.makespan_ms - min(timeline.busy_ms) == scale * form.bubble.of(case), case
        assert timeline.makespan_ms == scale * form.makespan(case), case
        seen += case.p > 2
    assert seen >= 4


@pytest.mark.parametrize("schedule", planned_ahead())
def test_activations(schedule):
    for case in shapes(schedule):
        plan = plan_of(schedule, case)
        form, scale = FORMS[schedule], parts(schedule, case)
        assert peak_bytes(plan, plan_costs(schedule, case, plan)) == [
            scale * BYTES * form.activations.of(case, rank) for rank in range(case.p)
        ], case


def units_sent(schedule, case, plan):
    """Units of all forward messages, of which helix's to attention and from it differ."""
    weights = (1, 1)
    if "helix" in schedule:
        weights = {"core": (2 + 2 * case.g, 2), "qkv": (1, 2), "block": (1, 1)}[case.attention_range]
    sends = [op for order in plan.orders for op in order if op.kind is Kind.SEND_F]
    keys = 2 * case.g * sum(len(context.lent) for context in plan.contexts)
    return (sum(weights[op.segment % 2] for op in sends) + keys) / parts(schedule, case)


@pytest.mark.parametrize("g", [1, 0.25])
@pytest.mark.parametrize(
    ("schedule", "attention_range"),
    [*((schedule, "core") for schedule in planned_ahead()), ("helix", "qkv"), ("helix", "block")],
)
def test_messages(schedule, attention_range, g):
    for case in shapes(schedule):
        case = Case(**{**vars(case), "g": g, "attention_range": attention_range})
        plan = plan_of(schedule, case, compute_only=False)
        assert units_sent(schedule, case, plan) == case.m * FORMS[schedule].units.of(case), case


def bubble(schedule, p, m, forward, backward, weight):
    plan = plan_of(schedule, Case(p=p, L=2 * p, m=m))
    timeline = simulate(plan, uniform_costs(plan, forward, backward, weight)).timeline
    return timeline.makespan_ms - max(timeline.busy_ms)


@pytest.mark.parametrize("p", [2, 3, 4, 7, 8])
def test_when_the_bubble_of_v_half_and_v_min_grows(p):
    """V-Half's round trips fit the steady state if W + 2B >= 2F and W + 2F >= 2B; V-Min's need F = B = W."""
    for times in [(10, 13, 7), (1, 1, 1), (4, 5, 3), (7, 13, 12)]:
        assert bubble("v-half", p, 4 * p, *times) == bubble("v-half", p, 8 * p, *times)
    assert bubble("v-min", p, 4 * p, 1, 1, 1) == bubble("v-min", p, 8 * p, 1, 1, 1)
    assert bubble("v-min", p, 4 * p, 10, 13, 7) < bubble("v-min", p, 8 * p, 10, 13, 7)
    if p > 2:
        assert bubble("v-half", p, 4 * p, 7, 13, 10) < bubble("v-half", p, 8 * p, 7, 13, 10)


def test_every_schedule_has_a_row():
    assert list(FORMS) == planned_ahead()
    rows = markdown_table().split("\n\n")[0].splitlines()
    assert len(rows) == 2 + len(planned_ahead())
    assert {row.count("|") for row in rows} == {6}
    assert "| 1F1B | (p−1)·(L/p)·t | (p−r)·(L/p)·A | p−1 | m ≥ p |" in rows


def test_every_symbol_is_explained():
    _, symbols = markdown_table().split("\n\n")
    for symbol in ("p, r", "L, m", "v, fold, K", "t_F, t_B, t_W", "t_last", "A", "g"):
        assert f"| {symbol} |" in symbols
