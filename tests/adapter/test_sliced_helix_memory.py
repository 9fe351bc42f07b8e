"""What sliced helix keeps of one sequence, against two-fold helix with whole sequences: at most a quarter."""

from __future__ import annotations

from dataclasses import replace

import pytest
from elastic_memory import measure_cases_of_slices
from models import Case
from ranks import run_on_ranks

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.cost_model import HARDWARE, MODELS, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.simulation.memory import peak_bytes

RANKS, FOLD = 4, 2
WHOLE = ("helix", RANKS * FOLD)
SLICED = ("sliced-helix", 1)


def planned_bytes(schedule, groups, recompute, **options):
    """Peak of activations, keys and values on the worst rank; Llama 7B at 128k, tensor 8."""
    name, num_sequences = schedule
    model = replace(MODELS["llama-7b"], num_kv_heads=groups)
    workload = Workload(model=model, seq_length=131072, tensor_parallel=8, whole_logits=False)
    request = ScheduleRequest(
        num_layers=model.num_layers,
        num_ranks=RANKS,
        num_microbatches=num_sequences,
        num_fold=FOLD,
        head_placement="spread",
        **options,
    )
    plan = build_plan(name, request)
    costs = costs_of_plan(predict_pieces(workload, HARDWARE["h20"]), plan, recompute)
    return max(peak - costs.rank(rank).static_bytes for rank, peak in enumerate(peak_bytes(plan, costs)))


@pytest.mark.parametrize("groups", [32, 8], ids=["MHA", "GQA"])
@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.WITHOUT_ATTENTION])
def test_by_the_plan(groups, recompute):
    whole, sliced = (planned_bytes(schedule, groups, recompute) for schedule in (WHOLE, SLICED))
    assert 4 * sliced <= whole
    assert planned_bytes(SLICED, groups, recompute, resend_context=True) < sliced


@pytest.mark.parametrize("style", [pytest.param("gpt", marks=pytest.mark.slow), "llama"])
def test_by_what_ranks_really_hold(style):
    base = Case(
        pp=RANKS,
        fold=FOLD,
        seq_length=128,
        style=style,
        without_attention=True,
        loss_chunk=8,
        head_placement="spread",
        rounds=0,
    )
    cases = [replace(base, schedule=name, extra=num_sequences) for name, num_sequences in (WHOLE, SLICED)]
    by_rank = run_on_ranks(RANKS, measure_cases_of_slices, cases)
    whole, sliced = (max(measured.peak for measured in ranks) for ranks in zip(*by_rank, strict=True))
    assert 4 * sliced <= whole
