"""Interleaved 1F1B whose micro batches go through the chunks in groups of any size that Megatron allows."""

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from helixpipe.plan import Kind, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import uniform_costs
from helixpipe.plan.simulation.simulate import simulate


def planned(p, v, m, group):
    request = ScheduleRequest(
        num_layers=p * v, num_ranks=p, num_microbatches=m, virtual_stages=v, microbatch_group=group
    )
    return build_plan("interleaved", request)


@pytest.mark.parametrize(("p", "v", "m", "group"), [(4, 3, 5, 5), (2, 2, 8, 3), (4, 2, 12, 8), (3, 2, 7, 4)])
def test_chunks_and_micro_batches_are_megatrons(p, v, m, group):
    plan = planned(p, v, m, group)
    table = get_schedule_table(m, v, group)
    for rank, order in enumerate(plan.orders):
        forwards = [(op.micro_batch, op.segment // p) for op in order if op.kind is Kind.F]
        backwards = [(op.micro_batch, v - 1 - op.segment // p) for op in order if op.kind is Kind.B]
        assert forwards == backwards == table
        first_backward = next(
            i for i, op in enumerate(op for op in order if op.kind.is_compute) if op.kind is Kind.B
        )
        assert first_backward == min((p - rank - 1) * 2 + (v - 1) * group + 1, m * v)


def test_a_group_of_as_many_as_ranks_is_the_default():
    assert planned(4, 2, 8, 4).fingerprint == planned(4, 2, 8, None).fingerprint
    whole = planned(4, 2, 8, 8)
    assert whole.parameters["microbatch_group"] == 8
    # More activations are held for it.
    peaks = [max(simulate(plan, uniform_costs(plan)).peak_bytes) for plan in (planned(4, 2, 8, 4), whole)]
    assert peaks[1] > peaks[0]


@pytest.mark.parametrize(("m", "group"), [(8, 3), (8, 9), (9, 8), (10, 8)])
def test_groups_that_would_wait_are_refused(m, group):
    with pytest.raises(ValueError, match=f"groups of {group} micro batches, .*; use groups of {m}, or leave"):
        planned(4, 2, m, group)


def test_sizes_without_a_group_say_what_fits():
    with pytest.raises(
        ValueError, match=r"the number of micro batches \(5\) must be a multiple of .* use 4 or 8"
    ):
        planned(4, 2, 5, None)
