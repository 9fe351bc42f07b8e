"""The benchmark of layouts: what it says of orders that agree and of orders that do not."""

from pathlib import Path

import pytest
from scripts import load_script

from helixpipe.plan.advise.joint import search
from helixpipe.plan.cost_model import HARDWARE, MODELS, Workload

layouts = load_script(Path(__file__).parents[2] / "benchmarks" / "layouts.py")


@pytest.fixture(scope="module")
def findings():
    found = search(
        HARDWARE["h100"],
        Workload(model=MODELS["gpt-1.3b"], seq_length=2048),
        num_gpus=2,
        global_batch=2,
        accept=lambda layout, candidate: candidate.schedule in ("1f1b", "gpipe"),
        exhaustive=True,
    )
    return sorted(found.simulated, key=lambda finding: finding.iteration_ms)[:4]


def test_orders_that_agree(findings):
    text = layouts.report([layouts.Contender(f, [2 * f.iteration_ms]) for f in findings])
    assert "Kendall's tau: 1.00." in text
    assert text.count("| 0.50 |") == len(findings)
    assert text.endswith("the fastest that ran.")


def test_orders_that_do_not_agree(findings):
    times = [100.0 * (len(findings) - number) for number in range(len(findings))]
    text = layouts.report([layouts.Contender(f, [ms]) for f, ms in zip(findings, times, strict=True)])
    assert "Kendall's tau: -1.00." in text
    assert text.endswith("300.0% slower than the fastest that ran.")


def test_one_candidate_has_no_order(findings):
    text = layouts.report([layouts.Contender(findings[0], [1.0, 5.0, 2.0])])
    assert "tau" not in text
    assert "| 2 |" in text
