"""Metrics and timelines on disks that are full or broken, and after training has gone back."""

from __future__ import annotations

import json
import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from training_worker import Fault, run_cases, small_model

from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.profiling import ProfilingSettings
from megatron.pretrain.side_outputs import (
    MetricsFile,
    SideOutput,
    replace_file,
    say,
    set_aside_later_files,
)
from megatron.pretrain.step_profiler import StepProfiler


def lines_of(*iterations):
    return "".join(json.dumps({"iteration": iteration}) + "\n" for iteration in iterations)


DEEP = "[" * 100_000 + "\n"  # more than a JSON reader can nest


@pytest.mark.parametrize(
    ("before", "iteration", "kept", "aside"),
    [
        (None, 0, "", None),
        ("", 0, "", None),
        (lines_of(1, 2), 2, lines_of(1, 2), None),
        (lines_of(1, 2, 3), 2, lines_of(1, 2), lines_of(3)),
        (lines_of(1, 2), 0, "", lines_of(1, 2)),
        (lines_of(1) + '{"iteration": 2', 2, lines_of(1), '{"iteration": 2\n'),
        (lines_of(1) + '{"iteration": 2}', 2, lines_of(1), '{"iteration": 2}\n'),
        (lines_of(1) + "words\n[3]\nnull\n" + lines_of(2), 2, lines_of(1, 2), "words\n[3]\nnull\n"),
        (lines_of(1) + DEEP, 2, lines_of(1), DEEP),
    ],
)
def test_no_line_is_lost(tmp_path, before, iteration, kept, aside):
    path, set_aside = tmp_path / "m.jsonl", tmp_path / "m.jsonl.set-aside"
    if before is not None:
        path.write_text(before)
    MetricsFile(path, iteration).append("{}")
    assert path.read_text() == f"{kept}{{}}\n"
    assert (set_aside.read_text() if set_aside.exists() else None) == aside
    assert {entry.name for entry in tmp_path.iterdir()} <= {"m.jsonl", "m.jsonl.set-aside"}


def test_what_was_set_aside_twice_is_all_there(tmp_path):
    path = tmp_path / "m.jsonl"
    for _ in range(2):
        path.write_text(lines_of(1, 2))
        MetricsFile(path, 1)
    assert (tmp_path / "m.jsonl.set-aside").read_text() == lines_of(2, 2)


OF_A_JOB = ("plan.json", "arguments.json", "profile_rank0.json", "profile_rank12.json")
OF_ITERATIONS = [f"{name}_{number:07d}.json" for name in ("iteration", "plan") for number in (1, 2, 3)]
OF_OTHERS = ("owner.json", "notes.json", "iteration_x.json", "events.out", "iteration_0000003.json.tmp")


@pytest.mark.parametrize(
    ("iteration", "moved"),
    [
        (0, {*OF_A_JOB, *OF_ITERATIONS}),
        (2, {"iteration_0000003.json", "plan_0000003.json"}),
        (3, set()),
    ],
)
def test_no_timeline_is_lost(tmp_path, iteration, moved):
    """Neither of another job, when this one starts anew, nor of iterations that come again."""
    assert set_aside_later_files(tmp_path / "not there", iteration) is None
    names = {*OF_A_JOB, *OF_ITERATIONS, *OF_OTHERS}
    for count in range(2):
        for name in names:
            (tmp_path / name).write_text(f"{count} {name}")
        set_aside_later_files(tmp_path, iteration)
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == names - moved
    asides = {"set-aside", "set-aside-2"} if moved else set()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == asides
    for count, aside in enumerate(sorted(asides)):
        found = {path.name: path.read_text() for path in (tmp_path / aside).iterdir()}
        assert found == {name: f"{count} {name}" for name in moved}


@contextmanager
def small_files(size):
    """No file can grow beyond so many bytes, as on a disk that is full.

    No fixture: those end after pytest has printed how the test went, perhaps to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl", 0)
    with small_files(30):
        metrics.append("x" * 20)
        with pytest.raises(OSError, match="File too large"):
            metrics.append("y" * 20)
        metrics.append("z" * 5)
    assert (tmp_path / "m.jsonl").read_text() == "x" * 20 + "\nzzzzz\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "plan.json"
    replace_file(path, "first")
    with small_files(10), pytest.raises(OSError, match="File too large"):
        replace_file(path, "x" * 20)
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_failure_is_said_once_with_the_path(tmp_path, capsys):
    output = SideOutput(tmp_path / "x", "timelines")

    def fail():
        raise OSError(28, os.strerror(28))

    output.attempt(lambda: None)
    assert output.summary() == ""
    for _ in range(3):
        output.attempt(fail)
    assert capsys.readouterr().out == (
        f"warning: timelines cannot be written to {tmp_path / 'x'} (No space left on device); "
        "training goes on\n"
    )
    assert output.summary() == f"3 timelines are missing in {tmp_path / 'x'}"


def test_standard_output_may_be_full(monkeypatch, capsys):
    full = open("/dev/full", "w")  # noqa: SIM115 (closing it fails)
    monkeypatch.setattr(sys, "stdout", full)
    for _ in range(2):
        say("a line")
    assert capsys.readouterr().err == (
        "standard output cannot be written (No space left on device); training goes on\n"
    )
    sys.stdout.close()
    with pytest.raises(OSError, match="No space left"):
        full.close()


def make_fifo(path):
    os.mkfifo(path)


class HalfProfiler:
    """As torch's on a full disk, of which it does not tell: with what it writes aside."""

    def start(self):
        pass

    def stop(self):
        pass

    def export_chrome_trace(self, path):
        Path(f"{path}.tmp").write_text('{"traceEvents": [')


@pytest.mark.parametrize(
    ("folder", "why"), [("there", "the file was not written whole"), ("gone", "No such file or directory")]
)
def test_a_trace_of_the_profiler_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys, folder, why):
    monkeypatch.setattr(torch.profiler, "profile", HalfProfiler)
    (tmp_path / "there").mkdir()
    profiler = StepProfiler(ProfilingSettings(1, 1, tmp_path / folder), 0)
    with profiler.around(1):
        pass
    path = tmp_path / folder / "profile_rank0.json"
    assert capsys.readouterr().out == (
        f"warning: traces of the profiler cannot be written to {path} ({why}); training goes on\n"
    )
    assert list((tmp_path / "there").iterdir()) == []


SPECIAL = {
    "device": lambda path: path.symlink_to("/dev/full"),
    "fifo": make_fifo,
    "folder": lambda path: path.mkdir(),
}


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_before_training(common, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("WORLD_SIZE", "1")
    path = tmp_path / "special"
    SPECIAL[kind](path)
    with pytest.raises(ValueError, match=f"^--metrics-jsonl {path} is not a file; give another path$"):
        parse_arguments(f"{common} --metrics-jsonl {path}".split())


class FullDisk(Fault):
    """From iteration 2 on no file can grow."""

    def on_step(self):
        if self.iteration == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))


def test_a_full_disk_does_not_end_training(common, tmp_path):
    metrics, traces = tmp_path / "m.jsonl", tmp_path / "traces"
    line = f"--train-iters 4 --metrics-jsonl {metrics} --trace-dir {traces}"
    ((outcome,),) = run_on_ranks(1, run_cases, [(line, FullDisk())], 1, 1, common)
    assert outcome["code"] == 0, outcome["error"]
    assert [json.loads(row)["iteration"] for row in metrics.read_text().splitlines()] == [1]
    assert sorted(path.name for path in traces.glob("iteration*")) == ["iteration_0000001.json"]
    warnings = [text for text in outcome["lines"] if text.startswith("warning: ")]
    assert len(warnings) == 2
    assert f"written to {metrics} (File too large)" in warnings[0]
    assert f"written to {traces} (File too large)" in warnings[1]
    assert outcome["lines"][-1] == (
        f"3 metrics of iterations are missing in {metrics}; 3 timelines and plans are missing in {traces}"
    )
    assert sum(" iteration " in text for text in outcome["lines"]) == 4
