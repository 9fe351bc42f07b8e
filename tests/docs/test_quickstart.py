"""The quickstart: what it says of two jobs, and, slow, the whole of it on a few iterations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import run_example

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "side_by_side.py"


def report(run, schedule, losses, speed):
    folder = run / schedule
    folder.mkdir()
    rows = [
        {
            "lm_loss": loss,
            "tokens_per_second": speed,
            "bubble_ratio": 0.25,
            "peak_memory_bytes": [2**30, 2**29],
        }
        for loss in losses
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def say(*arguments, job=""):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        input=job,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_losses_stand_side_by_side_and_a_difference_is_loud(tmp_path):
    report(tmp_path, "1f1b", [7.0, 6.0, 5.0], 1000)
    report(tmp_path, "helix", [7.0, 6.0 + 1e-7, 5.1], 1500)
    lines = say("follow", tmp_path, "helix", "1f1b", job="an iteration's line\n").stdout.splitlines()
    assert lines[0] == "helix  iteration  1   loss 7.00000   1f1b 7.00000   agree to 0e+00"
    assert "agree to 2e-08" in lines[1]
    assert "DIFFER by 2e-02" in lines[2]


def test_the_summary_tells_the_ratio(tmp_path):
    report(tmp_path, "1f1b", [7.0, 6.0], 1000)
    report(tmp_path, "helix", [7.0, 6.0], 1500)
    shown = say("summary", tmp_path, "1f1b", "helix").stdout
    assert "25.0%" in shown
    assert "1.00 GiB" in shown
    assert "helix trains 1.50 times as fast as 1f1b here." in shown
    report(tmp_path, "short", [7.0], 1)
    assert "fewer than two iterations" in say("summary", tmp_path, "1f1b", "short").stderr


def test_a_typical_iteration_is_the_one_of_median_time(tmp_path):
    trace = tmp_path / "helix" / "trace"
    trace.mkdir(parents=True)
    rows = [{"iteration": number, "elapsed_ms": ms} for number, ms in enumerate((900, 100, 110, 300), 1)]
    (trace.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in (1, 2, 3, 4):
        (trace / f"iteration_{number:07d}.json").touch()
    assert say("typical", tmp_path, "helix").stdout == f"{trace / 'iteration_0000004.json'}\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_of_it(tmp_path):
    finished = run_example("quickstart.sh", tmp_path, iterations=3)
    assert finished.code == 0, finished.errors
    assert finished.output.count("agree to") == 3
    assert (tmp_path / "schedules.png").exists()
    assert (tmp_path / "schedules.html").exists()
    assert (tmp_path / "helix" / "report.html").exists()
