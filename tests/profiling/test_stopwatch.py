"""The stopwatch under a clock that ticks only when told to."""

import pytest
import torch

from helixpipe.profiling.stopwatch import Stopwatch, Times


class Ticking:
    """Time passes only in the functions that are measured."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def elapsed_ms(self, start, end):
        return end - start


class Slow(torch.autograd.Function):
    """Takes 3 forward and 5 backward; more in its first round."""

    clock = Ticking()
    calls = 0
    alive = 0
    most_alive = 0

    @staticmethod
    def forward(ctx, x):
        Slow.clock.now += 3 if Slow.calls >= 2 else 100
        Slow.calls += 1
        Slow.alive += 1
        Slow.most_alive = max(Slow.alive, Slow.most_alive)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        Slow.clock.now += 5
        Slow.alive -= 1
        return grad * 2


@pytest.fixture
def watch():
    Slow.clock, Slow.calls, Slow.alive, Slow.most_alive = Ticking(), 0, 0, 0
    aligned = []
    return Stopwatch(Slow.clock, repeats=3, alive=2, align=lambda: aligned.append(0)), aligned


def test_median_of_the_rounds_after_the_first(watch):
    stopwatch, aligned = watch
    assert stopwatch.times(Slow.apply, [torch.ones(4)]) == Times(3, 5)
    assert len(aligned) == 4
    assert Slow.calls == 8
    # Activations of several micro batches exist at once, as in a pipeline.
    assert (Slow.alive, Slow.most_alive) == (0, 2)


def test_inputs_are_not_changed(watch):
    stopwatch, _ = watch
    x, tokens = torch.ones(4), torch.zeros(4, dtype=torch.long)
    stopwatch.times(lambda x, tokens: Slow.apply(x + tokens), [x, tokens])
    assert not x.requires_grad
    assert x.grad is None


def test_functions_without_gradients(watch):
    stopwatch, aligned = watch

    def function():
        Slow.clock.now += 7

    assert stopwatch.plain(function) == 7
    assert len(aligned) == 4
