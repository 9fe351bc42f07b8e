"""Plans over NCCL against Megatron's own schedule functions: a GPU for every rank."""

from __future__ import annotations

import pytest
import torch
from equivalence_worker import compare_one_iteration
from models import Case
from ranks import run_on_ranks
from test_gradients import TOLERANCE, check_results, core_cases_of, layout_name, lending_cases_of

LAYOUTS = [Case(pp=1), Case(pp=2), Case(pp=2, tp=2), Case(pp=2, dp=2), Case(pp=4), Case(pp=4, tp=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_losses_and_gradients_equal_megatrons(layout):
    if torch.cuda.device_count() < layout.world_size:
        pytest.skip(f"NCCL needs a GPU for each of {layout.world_size} ranks")
    zero_bubble = Case(pp=layout.pp, tp=layout.tp, dp=layout.dp, schedule="zb-h1")
    cases = [*core_cases_of(layout), *lending_cases_of(layout), zero_bubble]
    cases = [case for case in cases if case.dtype is not torch.float64]
    of_ranks = run_on_ranks(layout.world_size, compare_one_iteration, cases, backend="nccl")
    check_results(cases, of_ranks, TOLERANCE)
