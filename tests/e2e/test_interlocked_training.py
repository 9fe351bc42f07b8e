"""Interlocked rounds on real ranks: the losses of 1F1B, whatever divides what."""

from __future__ import annotations

import pytest
from jobs import metrics_of

from helixpipe.plan import Plan

SIZES = ("--num-layers", 5, "--global-batch-size", 5, "--pipeline-model-parallel-size")
HELIX = (
    "--pipeline-schedule", "helix", "--num-fold", 1, "--attention-range", "block",
    "--head-placement", "spread", "--round-order", "interlocked",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--split-weight-gradients", "--hardware", "h20")], ids=["keys", "fitted-W"]
)
def test_five_layers_and_five_micro_batches_on_two_ranks(launch, tmp_path, options):
    losses = {}
    for name, ranks, schedule in (("helix", 2, (*HELIX, *options)), ("1f1b", 1, ())):
        metrics = tmp_path / f"{name}.jsonl"
        trace = ("--trace-dir", tmp_path / name)
        finished = launch(ranks, *SIZES, ranks, *schedule, *trace, "--metrics-jsonl", metrics)
        assert finished.code == 0, finished.errors
        losses[name] = [row["lm_loss"] for row in metrics_of(metrics)]
    assert len(losses["helix"]) == 4
    assert losses["helix"] == pytest.approx(losses["1f1b"], rel=1e-5)
    plan = Plan.from_json((tmp_path / "helix" / "plan.json").read_text(encoding="utf-8"))
    assert plan.parameters["round_order"] == "interlocked"
    assert plan.splits_backward == bool(options)
