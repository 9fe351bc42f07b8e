"""The record in shared memory, and the deadlines in it."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import signal
import statistics
import time

import pytest

from helixpipe.plan import Operation
from helixpipe.plan.operation import Kind
from helixpipe.reliability.deadlines import Deadlines
from helixpipe.reliability.record import (
    BETWEEN,
    RECORD_BYTES,
    RUNNING,
    WAITING,
    Record,
    RecordReader,
    SharedProgress,
)

FORWARD, NEXT = Operation.parse("12F3"), Operation.parse("13B4")
MESSAGE = Operation.parse("11RECV_F3@2")


@pytest.fixture
def memory():
    return mmap.mmap(-1, RECORD_BYTES)


def read_record(memory) -> Record:
    return RecordReader(memory).read()


def seen(memory):
    record = read_record(memory)
    return record.state, str(record.operation or ""), str(record.last or "")


def test_every_turn_of_an_iteration_is_seen(memory):
    progress = SharedProgress(memory)
    assert seen(memory) == (BETWEEN, "", "")
    progress.begin(FORWARD)
    assert seen(memory) == (RUNNING, "12F3", "")
    progress.wait(MESSAGE)
    assert seen(memory) == (WAITING, "11RECV_F3@2", "")
    progress.resume()
    assert seen(memory) == (RUNNING, "12F3", "")
    progress.begin(NEXT)
    assert seen(memory) == (RUNNING, "13B4", "12F3")
    progress.end()
    assert seen(memory) == (BETWEEN, "", "13B4")
    progress.wait(MESSAGE)
    progress.resume()
    assert seen(memory) == (BETWEEN, "", "13B4")


def test_time_begins_anew_with_every_turn(memory):
    progress = SharedProgress(memory)
    times = []
    begin, wait = (lambda: progress.begin(FORWARD)), (lambda: progress.wait(MESSAGE))
    for turn in (begin, wait, progress.resume, progress.end):
        turn()
        times.append(read_record(memory).since)
    assert times == sorted(set(times))


def test_phases_are_numbered_and_have_their_deadline(memory):
    progress = SharedProgress(memory)
    progress.enter("step", 4, 7.5)
    first = read_record(memory)
    progress.enter("a name that is longer than the record has room for", 5, math.inf)
    second = read_record(memory)
    assert (first.phase, first.step, first.deadline_s) == ("step", 4, 7.5)
    assert (second.step, second.deadline_s, second.place) == (5, math.inf, first.place + 1)
    assert second.phase == "a name that is longer than the r"


def test_of_a_record_that_a_stopped_rank_has_left_half_written_the_one_before_is_read(memory):
    progress, reader = SharedProgress(memory), RecordReader(memory)
    progress.begin(FORWARD)
    before = reader.read()
    for position in range(90):
        kept = memory[position]
        memory[position] = kept ^ 0x10
        assert reader.read() == before
        memory[position] = kept
    progress.begin(NEXT)
    assert str(reader.read().operation) == "13B4"


def test_no_record_is_ever_read_half_written(memory):
    """While another process writes as fast as it can: half a time would be a hang of hours."""
    writer = os.fork()
    if writer == 0:
        progress = SharedProgress(memory)
        for number in itertools.count():
            progress.begin(Operation(number, Kind.F, number, None))
            progress.pulse()
    try:
        reader, numbers = RecordReader(memory), [0]
        while len(numbers) < 2000:
            record, now = reader.read(), time.monotonic()
            if record.operation is None or record.operation.segment == numbers[-1]:
                continue
            assert record.operation.segment > numbers[-1]
            numbers.append(record.operation.segment)
            assert record.operation.micro_batch == numbers[-1]
            assert record.last is None or record.last.segment == numbers[-1] - 1
            assert now - 60 < record.since <= now
            assert now - 60 < record.pulse <= now
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def test_pulse(memory):
    progress, reader = SharedProgress(memory), RecordReader(memory)
    before = reader.read().pulse
    progress.pulse()
    assert reader.read().pulse > before


def test_deadlines_are_learned_by_phase():
    deadlines = Deadlines(first_s=600.0)
    assert deadlines.of("step") == 600.0
    for seconds in (40.0, 4.0, 5.0):
        deadlines.learn("step", seconds)
    assert deadlines.of("step") == 3 * statistics.median([40.0, 4.0, 5.0])
    assert deadlines.of("save") == 600.0


def test_deadlines_have_a_floor_which_is_higher_where_storage_may_stall():
    deadlines = Deadlines(first_s=600.0)
    for phase in ("step", "evaluate", "save"):
        deadlines.learn(phase, 0.1)
    assert [deadlines.of(phase) for phase in ("step", "evaluate", "save")] == [5.0, 5.0, 60.0]


def test_deadlines_follow_the_latest_durations():
    deadlines = Deadlines(first_s=600.0)
    for seconds in [100.0] * 40 + [10.0] * 20:
        deadlines.learn("step", seconds)
    assert deadlines.of("step") == 30.0


def test_a_fixed_deadline_is_not_learned_and_zero_is_none():
    fixed, none = Deadlines(600.0, fixed_s=2.0), Deadlines(600.0, fixed_s=0.0)
    for deadlines in (fixed, none):
        deadlines.learn("step", 100.0)
    assert (fixed.of("step"), fixed.of("new")) == (2.0, 2.0)
    assert none.of("step") == math.inf
