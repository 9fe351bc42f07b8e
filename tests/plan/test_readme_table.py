"""The README's table of schedules, held against plans."""

import pytest

from helixpipe.plan import Kind, ScheduleRequest, build_plan
from helixpipe.plan.memory import peak_activations


def built(schedule, p, layers, m, **options):
    request = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, **options)
    return build_plan(schedule, request)


def messages_per_micro_batch(plan):
    sends = sum(op.kind is Kind.SEND_F for order in plan.orders for op in order)
    return sends / plan.num_microbatches


@pytest.mark.parametrize("p", [2, 4, 8])
def test_one_f_one_b(p):
    plan = built("1f1b", p, p, 4 * p)
    assert peak_activations(plan) == [p - rank for rank in range(p)]
    assert messages_per_micro_batch(plan) == p - 1


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("v", [2, 3])
def test_interleaved(p, v):
    plan = built("interleaved", p, p * v, 4 * p, virtual_stages=v)
    assert peak_activations(plan) == [2 * (p - rank - 1) + (v - 1) * p + 1 for rank in range(p)]
    assert messages_per_micro_batch(plan) == p * v - 1


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("rounds", [1, 3])
def test_helix(p, fold, rounds):
    layers = 2 * p
    plan = built("helix", p, layers, p * fold * rounds, num_fold=fold)
    # Two segments a layer: fold * L layers' worth; rank 0 also holds the last segments.
    last = [p * fold] + [0] * (p - 1)
    assert peak_activations(plan) == [2 * fold * layers + extra for extra in last]
    # Half the messages leave for attention, (2 + 2g) units, half leave it, 2 units.
    assert messages_per_micro_batch(plan) == 2 * layers * (p - 1) / p
