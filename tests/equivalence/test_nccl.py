"""Plans over NCCL against Megatron's own schedule functions, on one GPU or several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from equivalence_worker import compare_one_iteration
from models import Case
from ranks import run_on_ranks
from test_gradients import (
    SAVING_LOSS_TOLERANCE,
    SAVING_TOLERANCE,
    check_results,
    core_cases_of,
    interlocked_cases_of,
    layout_name,
    lending_cases_of,
    saving_cases_of,
    splitting_cases_of,
)

LAYOUTS = [Case(pp=1), Case(pp=2), Case(pp=2, tp=2), Case(pp=2, dp=2), Case(pp=4), Case(pp=4, tp=2)]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_losses_and_gradients_equal_megatrons(layout):
    zero_bubble = Case(pp=layout.pp, tp=layout.tp, dp=layout.dp, schedule="zb-h1")
    cases = [*core_cases_of(layout), *lending_cases_of(layout), zero_bubble]
    if layout.pp > 1:
        # A few of each: ranks that share a GPU take turns on it, and every message waits for one.
        cases += [*splitting_cases_of(layout)[:1], *interlocked_cases_of(layout)[:4]]
        cases += [*saving_cases_of(layout)[:3], replace(layout, schedule="sliced-helix", rounds=0, extra=1)]
    of_ranks = run_on_ranks(layout.world_size, compare_one_iteration, cases, backend="nccl")
    check_results(cases, of_ranks, SAVING_TOLERANCE, SAVING_LOSS_TOLERANCE)
