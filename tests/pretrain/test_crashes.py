"""Jobs that are killed again and again, in training, saving, pruning and going back, end as if unbroken."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections import Counter

import pytest
from crash_worker import PHASES, Killed, Waiting, run_counted
from ranks import run_on_ranks
from training_worker import Fault, run_cases, small_model

from megatron.pretrain.checkpoint.files import TRACKER, branch_of, check_file, manifest_of, tracked, usable
from megatron.pretrain.checkpoint.publishing import finish_publishing

ITERATIONS, KEPT = 7, 2
JOBS = {"a": "--seed 1", "b": "--seed 2 --lr 1e-3 --async-save"}
# How a killed job began: anew; gone back by hand; gone back because the latest is damaged.
STARTS = ("anew", "tracker", "damage")
# Of abandoned checkpoints and of metrics; jobs that are not killed do none.
GOING_BACK = 4


class Root:
    """A folder in which each job has a folder, and what its jobs learn without a break."""

    def __init__(self, folder, corpus):
        self.folder = folder
        self.killed = Counter()
        self.common = (
            f"{small_model(corpus)} --num-layers 1 --save-interval 1 --keep-checkpoints {KEPT} "
            f"--lr-decay-iters {ITERATIONS}"
        )
        # Five of seven iterations, from all of which one can go on.
        five = "--train-iters 5 --keep-checkpoints 5"
        jobs = [(self.line(job, f"{job}-five", five), Killed()) for job in JOBS]
        jobs += [(self.line(job, f"{job}-whole"), Killed()) for job in JOBS]
        outcomes = self.run(jobs)
        assert [outcome["code"] for outcome in outcomes] == [0] * len(jobs), outcomes
        self.whole = {job: self.learned(f"{job}-whole") for job in JOBS}
        self.events = dict(zip(JOBS, (outcome["done"] for outcome in outcomes[2:]), strict=True))

    def line(self, job, name, more=""):
        saved = self.folder / name
        return (
            f"{JOBS[job]} --train-iters {ITERATIONS} --save {saved} --load {saved} "
            f"--metrics-jsonl {saved}.jsonl {more}"
        )

    def run(self, cases):
        (outcomes,) = run_on_ranks(1, run_counted, cases, self.common)
        return outcomes

    def learned(self, name):
        rows = [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]
        return [(row["iteration"], row["lm_loss"], row["grad_norm"], row["consumed_samples"]) for row in rows]

    def begin(self, job, name, start, chance):
        """Make what the job finds; what it is to be told beside."""
        if start == "anew":
            return ""
        shutil.copytree(self.folder / f"{job}-five", self.folder / name)
        shutil.copy(self.folder / f"{job}-five.jsonl", self.folder / f"{name}.jsonl")
        *older, newest = usable(self.folder / name)
        if start == "tracker":
            (self.folder / name / TRACKER).write_text(f"{int(chance.choice(older).name[5:])}\n")
            return ""
        victim = chance.choice(sorted(newest.glob("*.distcp")))
        victim.write_bytes(victim.read_bytes()[:-1])
        return "--load-fallback"

    def is_killed(self, job, name, more, chance):
        """Let the job begin, and die of the n-th thing that it does in a phase; False if it ends before."""
        newest = tracked(self.folder / name)
        left = ITERATIONS - (int(newest.name[5:]) if newest else 0)
        phase = chance.choice(PHASES)
        events = self.events[job].get(phase, GOING_BACK) * max(1, left) // ITERATIONS
        fault = Killed(phase, chance.randrange(max(1, events)))
        try:
            (outcome,) = self.run([(self.line(job, name, more), fault)])
        except AssertionError as error:
            if "the process died" not in str(error):
                raise
            self.killed[phase] += 1
            return True
        assert outcome["code"] == 0, outcome["error"]
        return False

    def promised(self, name):
        """How many checkpoints may not be fewer from here on."""
        finish_publishing(self.folder / name)
        newest = tracked(self.folder / name)
        return 0 if newest is None else min(KEPT, len([f for f in branch_of(newest) if not damage(f)]))


def damage(checkpoint):
    files = manifest_of(checkpoint)
    return [text for name in files if (text := check_file(checkpoint, name, files[name]))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return Root(tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("corpus"))


def crash(root, crashes, seed):
    """Kill both jobs in turn, in folders of their own, up to three times each before they are left alone."""
    chance, resumed = random.Random(seed), []
    while crashes:
        job, start = chance.choice(list(JOBS)), STARTS[len(resumed) % len(STARTS)]
        name = f"{job}-{seed}-{len(resumed)}"
        more = root.begin(job, name, start, chance)
        for _ in range(min(crashes, chance.randint(1, 3))):
            before = root.promised(name)
            if not root.is_killed(job, name, more, chance):
                break
            crashes -= 1
            assert root.promised(name) >= before
            for checkpoint in usable(root.folder / name):
                assert start == "damage" or not damage(checkpoint)
        resumed.append((job, name, more))
    outcomes = root.run([(root.line(job, name, more), Killed()) for job, name, more in resumed])
    for (job, name, _), outcome in zip(resumed, outcomes, strict=True):
        assert outcome["code"] == 0, outcome["error"]
        assert root.learned(name) == root.whole[job]
        saved = root.folder / name
        # Killed while it pruned for the last time, it leaves that to the next save.
        kept = branch_of(tracked(saved))[-KEPT:]
        assert [folder.name for folder in kept] == ["iter_0000006", "iter_0000007"]
        assert not any(map(damage, kept))
        assert [path for path in saved.iterdir() if path.suffix in (".saving", ".json")] == []


def test_four_crashes(root):
    crash(root, 4, 1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_forty_crashes(root):
    root.killed.clear()
    crash(root, 40, 2)
    assert root.killed.total() == 40
    assert root.killed.keys() == set(PHASES)


def test_jobs_in_one_root_leave_each_other_alone(root):
    """While one trains, the other is refused its folder, and trains in its own."""
    outcomes = {}
    held = root.folder / "held"

    def train():
        case = (root.line("a", "held/a"), Waiting(root.folder))
        outcomes["a"] = run_on_ranks(1, run_cases, [case], 1, 1, root.common)[0][0]

    held.mkdir()
    first = threading.Thread(target=train)
    first.start()
    end = time.monotonic() + 60
    while not (root.folder / "waiting").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    cases = [(root.line("b", "held/a"), Fault()), (root.line("b", "held/b"), Fault())]
    try:
        ((refused, own),) = run_on_ranks(1, run_cases, cases, 1, 1, root.common)
    finally:
        (root.folder / "go on").touch()
        first.join()
    assert refused["code"] == 2
    assert refused["error"].startswith(f"--metrics-jsonl {held}/a.jsonl is in use by job ")
    assert (outcomes["a"]["code"], own["code"]) == (0, 0)
    for job in JOBS:
        assert root.learned(f"held/{job}") == root.whole[job]
