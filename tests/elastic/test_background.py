"""Planning in the background: the plan that a search finds, or a quick one; never a hang, never an orphan."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from planning import LENGTHS, make_job
from planning_worker import plan_together
from ranks import run_on_ranks

from helixpipe.elastic import plan_batch
from helixpipe.elastic.search.quick_plan import num_slices_of, plan_quickly
from helixpipe.elastic.service import background as background_module
from helixpipe.elastic.service.background import BackgroundPlanner
from helixpipe.elastic.service.planner_process import Request, answer

ROOT = Path(__file__).parents[2]
OTHER = LENGTHS[1:]


def plan_of(planner, lengths):
    planner.submit(lengths)
    return planner.result()


def pid_of(planner):
    return planner._process._popen.pid


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# Quick plans


@pytest.mark.parametrize("memory_gib", [1, 2, 4, 40])
@pytest.mark.parametrize("num_slices", [1, 3, 8])
def test_a_quick_plan_fits_and_holds_every_token(memory_gib, num_slices):
    job = make_job(memory_gib)
    plan = plan_quickly(LENGTHS, job, num_slices)
    plan.recipe.check(LENGTHS)
    assert max(plan.prediction.peak_bytes) <= job.memory_limit_bytes
    assert plan.prediction.time_ms >= 0.999 * plan_batch(LENGTHS, job).prediction.time_ms
    if memory_gib == 40:
        assert num_slices_of(plan.recipe) == num_slices
        assert not any(map(any, plan.recipe.checkpointed))
    for members in plan.recipe.ranges:
        assert len({row[i] for row in plan.recipe.checkpointed for i in members}) == 1


def test_a_quick_plan_takes_another_number_of_slices_where_its_own_does_not_fit():
    job = make_job(1)
    assert num_slices_of(plan_quickly(LENGTHS, job, 1).recipe) > 1
    with pytest.raises(ValueError, match="no plan fits"):
        plan_quickly(LENGTHS, make_job(0.5), 8)


# The process


def test_answers_hold_every_failure(monkeypatch):
    request = Request(LENGTHS, make_job(), (4,))
    found = answer(request)
    assert found.plan.recipe == plan_batch(LENGTHS, make_job(), slice_counts=(4,)).recipe
    assert found.seconds > 0
    assert "no plan fits" in answer(Request(LENGTHS, make_job(0.5), (4,))).error

    def fail(*arguments, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("helixpipe.elastic.service.planner_process.choose_plan", fail)
    assert answer(request).error == "ZeroDivisionError: a bug"


def test_plans_are_those_of_the_search_and_the_process_survives_ctrl_c():
    job = make_job()
    with BackgroundPlanner(job) as planner:
        first = plan_of(planner, LENGTHS)
        assert first.plan.fingerprint == plan_batch(LENGTHS, job).fingerprint
        assert first.fallback == ""
        assert first.planning_s > 0
        pid = pid_of(planner)
        os.kill(pid, signal.SIGINT)
        planner.submit(OTHER)
        wait_for(lambda: not planner._process._answers.empty())
        # The answer was there, all of its time hidden: no patience is needed to take it.
        planner._next_patience_s = 0
        hidden = planner.result()
        assert hidden.plan.fingerprint == plan_batch(OTHER, job).fingerprint
        assert pid_of(planner) == pid
        assert hidden.fallback == ""
    assert is_gone(pid)


def test_wrong_lengths_are_refused_at_once_and_leave_no_trace():
    with BackgroundPlanner(make_job()) as planner:
        with pytest.raises(ValueError, match="lengths must be"):
            planner.submit([])
        assert plan_of(planner, LENGTHS).fallback == ""
    with pytest.raises(ValueError, match="patience"):
        BackgroundPlanner(make_job(), patience_s=-1)


@pytest.mark.parametrize(
    ("number", "patience_s", "words"),
    [(signal.SIGSTOP, 0.2, "no plan within 0.2 seconds"), (signal.SIGKILL, 60, "exit code -9")],
)
def test_a_late_or_dead_planner_is_replaced(caplog, number, patience_s, words):
    job = make_job()
    with BackgroundPlanner(job, slice_counts=(3,), patience_s=patience_s) as planner:
        assert plan_of(planner, LENGTHS).fallback == ""
        pid = pid_of(planner)
        os.kill(pid, number)
        with caplog.at_level(logging.WARNING):
            found = plan_of(planner, OTHER)
        assert words in found.fallback
        assert found.plan == plan_quickly(OTHER, job, 3), "with the slices of the last good recipe"
        assert found.waited_s >= found.planning_s
        (record,) = caplog.records
        assert words in record.message
        assert "quick plan of 3 slices" in record.message
        assert pid_of(planner) != pid
        assert is_gone(pid)
        planner.patience_s = planner._next_patience_s = 60
        assert plan_of(planner, OTHER).fallback == ""


def test_a_search_that_fails_is_replaced_by_a_quick_plan():
    # Whole sequences alone were asked for, and do not fit.
    with BackgroundPlanner(make_job(1), slice_counts=(1,)) as planner:
        found = plan_of(planner, LENGTHS)
        assert "no plan fits" in found.fallback
        assert num_slices_of(found.plan.recipe) > 1
        planner.job = make_job(0.5)
        with pytest.raises(ValueError, match=r"no plan fits; .*\(the best plan was not found: no plan fits"):
            plan_of(planner, LENGTHS)


def test_without_room_for_a_process_plans_are_quick_ones(monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(background_module.subprocess, "Popen", refuse)
    planner = BackgroundPlanner(make_job())
    found = plan_of(planner, LENGTHS)
    assert found.fallback == "the planning process cannot be started"
    assert found.plan == plan_quickly(LENGTHS, make_job())
    assert "Cannot allocate memory" in caplog.text


TRAINER = """
    import os, time
    from planning import make_job
    from helixpipe.elastic.service.background import BackgroundPlanner
    from helixpipe.elastic.sample import skewed_lengths

    if __name__ == "__main__":
        planner = BackgroundPlanner(make_job(40))
        planner.submit((100, 200))
        planner.result()
        # A forked worker, as data loaders have, holds all files of its parent open.
        worker = os.fork()
        if not worker:
            time.sleep(60)
        planner.submit(skewed_lengths(512))
        print(planner._process._popen.pid, worker, flush=True)
        time.sleep(60)
"""


def test_the_process_does_not_outlive_a_killed_trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER))
    trainer = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"},
    )
    pid, worker = map(int, trainer.stdout.readline().split())
    try:
        assert not is_gone(pid)
        trainer.kill()
        trainer.wait()
        wait_for(lambda: is_gone(pid))
        assert not is_gone(worker)
    finally:
        os.kill(worker, signal.SIGKILL)
        trainer.stdout.close()


def test_torch_and_the_trainers_script_are_not_loaded_into_the_process():
    program = "import sys, helixpipe.elastic.service.planner_process; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# All ranks of a replica


@pytest.mark.slow
def test_all_ranks_use_the_plan_of_the_first():
    first, second = run_on_ranks(2, plan_together)
    assert (first["planners"], second["planners"]) == (1, 0)
    assert first["alone"] != second["alone"], "ranks that planned for themselves would differ"
    assert first["together"] == second["together"]
    assert first["fallbacks"] == second["fallbacks"]
    assert [bool(reason) for reason in first["fallbacks"]] == [False, True, False]
    assert first["refused"] == second["refused"]
    assert "no plan fits" in first["refused"]
    # Two replicas of a rank plan for themselves, one replica of two ranks together.
    (own_0, shared_0), (own_1, shared_1) = first["in replicas"], second["in replicas"]
    assert own_0 == shared_0 == shared_1 != own_1
