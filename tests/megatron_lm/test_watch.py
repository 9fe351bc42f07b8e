"""When the ranks of another program watch each other, and what is a hang there."""

import math

import pytest

from helixpipe.megatron_lm import watch
from helixpipe.megatron_lm.options import take_options

HELIX = ["--pipeline-schedule", "helix"]


class FakeMonitor:
    made = None

    def __init__(self, rank, world_size, **options):
        self.options, self.said, self.progress = options, [], object()
        self.place = (rank, world_size)
        FakeMonitor.made = self

    def report_failure(self, error, *, say=False):
        self.said.append((error, say))

    def close(self):
        self.said.append("closed")


class FakeStep:
    def __init__(self, *words):
        self.options = take_options([*HELIX, *words])
        self.watched = []

    def watch(self, *told):
        self.watched.append(told)


@pytest.fixture(autouse=True)
def job(monkeypatch):
    monkeypatch.setattr(watch, "Monitor", FakeMonitor)
    monkeypatch.setattr(FakeMonitor, "made", None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")


def monitor_of(*words):
    step = FakeStep(*words)
    with watch.watched(step, "program"):
        pass
    assert len(step.watched) == 1
    return FakeMonitor.made


def test_without_a_word_nothing_is_a_hang(tmp_path):
    monitor = monitor_of()
    assert monitor.place == (2, 4)
    assert monitor.said == ["closed"]
    assert {monitor.options["deadlines"].of(phase) for phase in ("step", "between steps")} == {math.inf}


def test_the_limit_is_for_steps_and_for_what_is_between_them(tmp_path):
    monitor = monitor_of("--hang-timeout-s", "90", "--failure-dir", str(tmp_path / "stacks"))
    assert {monitor.options["deadlines"].of(phase) for phase in ("step", "between steps")} == {90.0}
    assert monitor.options["stack_folder"] == tmp_path / "stacks"


def test_nobody_watches_megatrons_own_steps_or_a_single_rank(monkeypatch):
    with watch.watched(None, "program"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with watch.watched(FakeStep(), "program"):
        pass
    assert FakeMonitor.made is None


def test_a_single_rank_is_watched_if_it_has_a_limit(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("RANK")
    assert monitor_of("--hang-timeout-s", "90").place == (0, 1)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit(0), "closed"),
        (SystemExit(3), ("it was told to stop", False)),
        (ValueError("theirs"), ("theirs", False)),
        (IndexError("why"), ("IndexError: why", True)),
    ],
)
def test_the_others_hear_how_the_script_has_ended(error, told):
    with pytest.raises(type(error)), watch.watched(FakeStep(), "program"):
        raise error
    assert FakeMonitor.made.said == [told]


def test_both_options_are_of_a_schedule():
    for word in ("--hang-timeout-s", "--failure-dir"):
        with pytest.raises(ValueError, match=f"{word} needs --pipeline-schedule"):
            take_options([word, "5"])
    with pytest.raises(ValueError, match="--hang-timeout-s"):
        take_options([*HELIX, "--hang-timeout-s", "-1"])
