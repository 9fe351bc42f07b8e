"""A training run on one page, from the files that it has left."""

from __future__ import annotations

import json

import pytest

from helixpipe.__main__ import main
from helixpipe.plan import Operation, ScheduleRequest, build_plan
from helixpipe.plan.operation import Kind
from helixpipe.plan.simulation.costs import uniform_costs
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Span, Timeline
from helixpipe.report.run import read_run
from helixpipe.report.stragglers import slowness


def timeline_of(*durations, names=("stage0", "stage1", "stage2", "stage3")):
    """Each rank runs its own stage twice, in the given milliseconds."""
    spans = tuple(
        tuple(Span(Operation(rank, Kind.F, i), i * ms, (i + 1) * ms) for i in range(2))
        for rank, ms in enumerate(durations)
    )
    return Timeline(spans, segment_names=names)


def row(iteration, **values):
    return {
        "iteration": iteration, "lm_loss": 2.0 / iteration, "grad_norm": None, "elapsed_ms": 10.0 * iteration,
        "tokens_per_second": 100.0, "peak_memory_bytes": [2**30, 3 * 2**30],
    } | values  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Of three iterations under 1F1B on two ranks."""
    request = ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=4)
    plan = build_plan("1f1b", request)
    timeline = simulate(plan, uniform_costs(plan)).timeline
    (tmp_path / "trace").mkdir()
    for iteration in (1, 2, 3):
        (tmp_path / "trace" / f"iteration_{iteration:07d}.json").write_text(timeline.to_json())
    (tmp_path / "trace" / "arguments.json").write_text(json.dumps({"num_layers": 2, "data_path": "<data>"}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in (1, 2, 3)))
    return tmp_path


def test_a_page_is_written(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    # The iteration whose time is the median.
    assert "Iteration 2, as it was executed" in page
    for text in ("loss", "norm of the gradient", "tokens per second", "largest memory of each rank (GiB)"):
        assert f"<!-- {text} -->" in page  # how matplotlib labels its glyphs
    assert '<th scope="row">data_path</th><td>&lt;data&gt;</td>' in page
    assert "<summary><h2>2 arguments</h2></summary>" in page
    assert '<th scope="row">1</th><td>1.000</td><td></td>' in page
    assert main(["report", str(folder), "--output", str(folder / "again.html")]) == 0
    assert (folder / "again.html").read_text() == page


def test_another_iteration_is_shown(folder, capsys):
    assert main(["report", str(folder), "--iteration", "3"]) == 0
    assert "Iteration 3, as it was executed" in (folder / "report.html").read_text()
    assert main(["report", str(folder), "--iteration", "4"]) == 2
    assert "iteration 4 has no timeline; choose one of 1 to 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "metrics.jsonl").unlink(), "holds 0 metrics files (*.jsonl), not one; train with"),
        (lambda f: (f / "metrics.jsonl").write_text("{}\n"), "the metrics or arguments cannot be read"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "holds no iteration yet"),
        (lambda f: [p.unlink() for p in f.glob("trace/iter*")], "holds no iteration_*.json; train with"),
        (
            lambda f: (f / "trace" / "arguments.json").write_text("{"),
            "the metrics or arguments cannot be read",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_refused(folder, capsys, spoil, message):
    spoil(folder)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_arguments_are_not_needed(folder):
    (folder / "trace" / "arguments.json").unlink()
    assert read_run(folder).arguments == {}
    assert main(["report", str(folder)]) == 0


def test_a_rank_that_is_slow_at_the_same_work_is_found():
    # The ends differ from the rest, and from each other.
    assert slowness([timeline_of(9.0, 2.0, 2.0, 5.0)]) == [1.0, 1.0, 1.0, 1.0]
    assert slowness([timeline_of(9.0, 2.0, 4.0, 5.0)]) == pytest.approx([1.0, 2 / 3, 4 / 3, 1.0])
    names = ("first", "attention", "middle", "attention", "last")
    assert slowness([timeline_of(1.0, 1.5, 1.0, 0.5, names=names)]) == pytest.approx([1.0, 1.5, 1.0, 0.5])


def test_timelines_are_averaged():
    slow_once = [timeline_of(1.0, 2.0, 2.0, 1.0), timeline_of(1.0, 2.0, 6.0, 1.0)]
    assert slowness(slow_once) == pytest.approx([1.0, 2 / 3, 4 / 3, 1.0])
