"""The trace of one iteration, under a clock that is turned by hand."""

import time

import pytest
import torch

from helixpipe.plan.operation import Operation
from helixpipe.plan.simulation.timeline import Span
from helixpipe.runtime.trace import CudaClock, HostClock, NullClock, Trace, default_clock


class HandClock:
    def __init__(self):
        self.now = 100.0

    def mark(self):
        return self.now

    def elapsed_ms(self, start, end):
        return end - start


def op(text):
    return Operation.parse(text)


def iteration(trace, clock):
    """Two operations of 3 and 5 ms, 1 ms before, 2 ms between and 4 ms after them."""
    trace.start()
    clock.now += 1
    trace.begin(op("0F0"))
    clock.now += 3
    trace.end()
    clock.now += 2
    trace.begin(op("0B0"))
    clock.now += 5
    trace.end()
    clock.now += 4
    trace.stop()


def test_spans_total_and_busy_time():
    clock = HandClock()
    trace = Trace(clock)
    iteration(trace, clock)
    assert trace.spans() == (Span(op("0F0"), 1, 4), Span(op("0B0"), 6, 11))
    assert trace.total_ms() == 15
    assert trace.busy_ms() == 8


def test_waits_are_told_apart_from_compute():
    clock = HandClock()
    trace = Trace(clock)
    for _ in range(2):
        trace.start()
        clock.now += 1
        start = clock.mark()
        clock.now += 2
        trace.waited(op("0RECV_F0@1"), start)
        trace.begin(op("1F0"))
        clock.now += 3
        trace.end()
        trace.waited(op("1RECV_B0@1"), clock.mark())
        trace.stop()
        assert trace.waits() == (Span(op("0RECV_F0@1"), 1, 3), Span(op("1RECV_B0@1"), 6, 6))
        assert trace.busy_ms() == 3
        assert trace.operations == []
    assert trace.sees_waits
    assert not Trace(clock, sees_waits=False).sees_waits


def test_an_iteration_forgets_the_one_before():
    clock = HandClock()
    trace = Trace(clock)
    trace.operations.append(op("7F7"))
    iteration(trace, clock)
    first = trace.spans()
    clock.now += 50
    iteration(trace, clock)
    assert trace.spans() == first
    assert trace.total_ms() == 15
    assert trace.operations == []


def test_an_end_needs_its_beginning():
    trace = Trace(HandClock())
    trace.start()
    with pytest.raises(AssertionError):
        trace.end()
    trace.begin(op("0F0"))
    trace.end()
    with pytest.raises(AssertionError):
        trace.end()


def test_the_host_clock_counts_milliseconds():
    clock = HostClock()
    start = clock.mark()
    time.sleep(0.02)
    assert 20 <= clock.elapsed_ms(start, clock.mark()) < 2000


def test_the_null_clock_counts_nothing():
    clock = NullClock()
    trace = Trace(clock)
    trace.start()
    trace.begin(op("0F0"))
    trace.end()
    trace.stop()
    assert (trace.total_ms(), trace.busy_ms()) == (0, 0)
    assert [span.operation for span in trace.spans()] == [op("0F0")]


def test_the_default_clock_times_the_device():
    assert isinstance(default_clock(), CudaClock if torch.cuda.is_available() else HostClock)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU")
def test_the_cuda_clock_times_the_devices_work():
    clock = CudaClock()
    torch.cuda.synchronize()
    start = clock.mark()
    torch.cuda._sleep(100_000_000)
    # The host has not waited for it.
    assert clock.elapsed_ms(start, clock.mark()) > 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a GPU")
def test_a_wait_of_the_devices_stream_is_timed():
    """As a handle of NCCL does it: the stream waits, the host goes on."""
    trace = Trace(CudaClock())
    other, arrived = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    trace.start()
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)
        arrived.record()
    start = trace.clock.mark()
    arrived.wait()
    trace.waited(op("0RECV_F0@1"), start)
    trace.stop()
    (wait,) = trace.waits()
    assert wait.end_ms - wait.start_ms > 10
