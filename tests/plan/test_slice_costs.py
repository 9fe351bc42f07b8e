"""What slices of a sequence cost, and where a sequence is cut."""

from dataclasses import replace

import pytest

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.cost_model import HARDWARE, MODELS, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.cost_model.segments import rank_parameters
from helixpipe.plan.cost_model.slices import WHOLE, Slice, core_cost, equal_forward_slices
from helixpipe.plan.slice_ends import with_slice_ends

LLAMA = replace(MODELS["llama-7b"], num_kv_heads=8, num_layers=4)


def pieces(seq_length=131072, tensor_parallel=8, **changes):
    workload = Workload(model=LLAMA, seq_length=seq_length, tensor_parallel=tensor_parallel)
    return replace(predict_pieces(workload, HARDWARE["h20"]), overhead_ms=0.0, **changes)


def planned(attention_range="core", **options):
    request = ScheduleRequest(
        num_layers=4, num_ranks=4, num_microbatches=1, attention_range=attention_range,
        head_placement="spread", **options,
    )  # fmt: skip
    return build_plan("sliced-helix", request, compute_only=True)


def test_slices_take_equal_forward_times():
    """Within half of what the 128 tokens of a multiple take, on either side."""
    found = pieces(multiprocessors=0)
    costs = costs_of_plan(found, planned(), Recompute.NONE).segments
    times = [costs[f"attention/slice{j}"].forward + costs[f"middle/slice{j}"].forward for j in range(8)]
    whole = sum(times)
    assert times == pytest.approx([whole / 8] * 8, abs=2 * 128 / 131072 * whole)
    tokens = [part.tokens * 131072 for part in equal_forward_slices(found, 8)]
    assert tokens == sorted(tokens, reverse=True)
    assert all(count % 128 == 0 for count in tokens)


def test_tensor_parallelism_divides_slices():
    found = pieces(tensor_parallel=32)
    assert all(part.tokens * 131072 % 128 == 0 for part in equal_forward_slices(found, 16))


def test_a_short_sequence_is_refused():
    with pytest.raises(ValueError, match="1024 tokens cannot be cut into 16 slices of a multiple of 128"):
        equal_forward_slices(pieces(1024), 16)


def test_slices_end_where_the_plan_says():
    ends = (60000, 80000, 90000, 100000, 110000, 120000, 130000, 131072)
    plan = with_slice_ends(planned(), ends)
    found = costs_of_plan(pieces(), plan, Recompute.NONE).message_bytes
    assert found["context/slice1"] == pytest.approx(20000 * 2 * 1024 * 2, rel=1e-5)


@pytest.mark.parametrize("recompute", list(Recompute))
def test_ranges_compute_the_same(recompute):
    """The split of attention's range adds up to the same work."""
    found = pieces(multiprocessors=0)
    totals = []
    for name in ("core", "qkv", "block"):
        plan = planned(name)
        costs = costs_of_plan(found, plan, recompute).segments
        chain = [costs[f"{segment}/slice3"] for segment in plan.segment_names]
        totals.append(sum(cost.forward + cost.backward + cost.weight - cost.recompute for cost in chain))
    assert totals == pytest.approx([totals[0]] * 3)


def test_keys_and_values_have_their_size():
    """Of 8 of 32 heads, bf16: 1024 channels of each."""
    found = pieces()
    costs = costs_of_plan(found, planned(), Recompute.NONE)
    tokens = [round(part.tokens * 131072) for part in equal_forward_slices(found, 8)]
    for j, count in enumerate(tokens):
        assert costs.message_bytes[f"context/slice{j}"] == pytest.approx(2 * 1024 * 2 * count, abs=8)
        cost = costs.segments[f"attention/slice{j}"]
        assert cost.context_bytes == pytest.approx(2 * 1024 * 2 * count // 8, abs=1)
        assert cost.gradient_bytes == 2 * cost.context_bytes, "summed in fp32"
        assert costs.segments[f"middle/slice{j}"].context_bytes == 0


def test_weights_on_loan_are_those_of_the_segment():
    found = pieces()
    count = found.workload.parameters
    lent = {
        name: costs_of_plan(found, planned(name), Recompute.NONE).loan_bytes
        for name in ("core", "qkv", "block")
    }
    assert set(lent["core"]) == {"last"}
    assert set(lent["qkv"]) == {"last", "qkv"}
    assert lent["block"]["attention"].weights == count["proj"] * 2 * 8
    assert lent["block"]["qkv"] == lent["qkv"]["qkv"]
    assert lent["qkv"]["qkv"].weights == count["qkv"] * 2 * 8
    total = {name: sum(rank_parameters(found, planned(name))) for name in lent}
    assert len(set(total.values())) == 1


def test_short_slices_lose_by_waves_and_calls():
    """78 multiprocessors, 4 heads of a GPU, tiles of 128 rows; by hand."""
    found, free = pieces(), pieces(multiprocessors=0)
    # 1920 tokens are 60 tiles on 78 multiprocessors; up to 3840 tokens 120 tiles take two waves.
    part = Slice(tokens=1920 / 131072, area=0.001, end=3840 / 131072)
    slow, fast = core_cost(found, part), core_cost(free, part)
    assert slow.forward == pytest.approx(fast.forward * 78 / 60 + 0.04)
    assert slow.backward == pytest.approx(fast.backward * 156 / 120 + 0.04)
    assert core_cost(found, WHOLE) == core_cost(free, WHOLE)
    # 39 rows of tiles are two waves, 78 are four: none is lost.
    exact = Slice(tokens=39 * 128 / 131072, area=0.01, end=78 * 128 / 131072)
    slow, fast = core_cost(found, exact), core_cost(free, exact)
    assert (slow.forward, slow.backward) == pytest.approx((fast.forward + 0.04, fast.backward + 0.04))
