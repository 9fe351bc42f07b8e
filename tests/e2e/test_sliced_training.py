"""Slices of sequences on real ranks: the losses of 1F1B, also after a change of schedule."""

from __future__ import annotations

import pytest
from jobs import metrics_of

from helixpipe.plan import Plan
from helixpipe.plan.slice_ends import slice_ends

SEQ1F1B = ("--pipeline-schedule", "seq1f1b", "--num-slices", 3)
SLICED_HELIX = ("--pipeline-schedule", "sliced-helix", "--head-placement", "spread", "--resend-context")
PLAIN = ("--pipeline-schedule", "1f1b")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "sliced"), [(2, SEQ1F1B), (4, SLICED_HELIX)], ids=["seq1f1b", "sliced-helix"]
)
def test_a_job_goes_on_under_another_schedule_with_the_same_losses(launch, tmp_path, ranks, sliced):
    """Two iterations each way, against four under 1F1B."""
    losses = {}
    for name, (first, second) in {
        "1f1b": (PLAIN, PLAIN),
        "to": (PLAIN, sliced),
        "from": (sliced, PLAIN),
    }.items():
        found = []
        for part, (schedule, iterations) in enumerate(((first, 2), (second, 4))):
            metrics = tmp_path / f"{name}{part}.jsonl"
            words = ("--save", tmp_path / name, *(("--load", tmp_path / name) if part else ()))
            words += ("--train-iters", iterations, "--trace-dir", tmp_path / f"{name}{part}")
            words += ("--global-batch-size", 2, "--pipeline-model-parallel-size", ranks, "--eval-iters", 1)
            finished = launch(ranks, *schedule, *words, "--metrics-jsonl", metrics)
            assert finished.code == 0, finished.errors
            found += [row["lm_loss"] for row in metrics_of(metrics)]
        losses[name] = found
    assert len(losses["1f1b"]) == 4
    for name in ("to", "from"):
        assert losses[name] == pytest.approx(losses["1f1b"], rel=1e-5)
    plan = Plan.from_json((tmp_path / "from0" / "plan.json").read_text(encoding="utf-8"))
    assert slice_ends(plan)[-1] == 128
