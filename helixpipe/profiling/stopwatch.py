"""Forward and backward times of a function, under the conditions of a pipeline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from helixpipe.runtime.trace import Clock

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Times(NamedTuple):
    """Median milliseconds of a forward and of its whole backward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


class Stopwatch:
    """Times functions as a pipeline runs them: several forwards, then their backwards in reverse.

    Activations of several micro batches are alive at once, so that allocation costs what it does in training.

    Args:
        clock: of the device.
        repeats: rounds that are measured, after one that is not.
        alive: forwards before the first backward.
        align: called before every round, so that all ranks load the machine together.
    """

    def __init__(self, clock: Clock, repeats: int, alive: int, align: Callable[[], object]) -> None:
        self.clock = clock
        self.repeats = repeats
        self.alive = alive
        self.align = align

    def times(self, function: Function, inputs: Sequence[Tensor]) -> Times:
        """Times of ``function(*inputs)``; floating-point inputs are differentiated."""
        forwards, backwards = [], []
        for number in range(self.repeats + 1):
            self.align()
            marks = self._round(function, inputs)
            if number:
                forwards += [self.clock.elapsed_ms(*pair) for pair in marks[0]]
                backwards += [self.clock.elapsed_ms(*pair) for pair in marks[1]]
        return Times(statistics.median(forwards), statistics.median(backwards))

    def round(self, function: Function, inputs: Sequence[Tensor]) -> Times:
        """Times of one round of ``function(*inputs)``, the first as well as a later one."""
        self.align()
        forwards, backwards = (
            [self.clock.elapsed_ms(*pair) for pair in marks] for marks in self._round(function, inputs)
        )
        return Times(statistics.median(forwards), statistics.median(backwards))

    def plain(self, function: Callable[[], object]) -> float:
        """Median milliseconds of a function without gradients."""
        samples = []
        for number in range(self.repeats + 1):
            self.align()
            start = self.clock.mark()
            function()
            end = self.clock.mark()
            if number:
                samples.append(self.clock.elapsed_ms(start, end))
        return statistics.median(samples)

    def _round(
        self, function: Function, inputs: Sequence[Tensor]
    ) -> tuple[list[tuple[object, object]], list[tuple[object, object]]]:
        forward_marks, backward_marks, alive = [], [], []
        for _ in range(self.alive):
            leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
            start = self.clock.mark()
            result = function(*leaves)
            forward_marks.append((start, self.clock.mark()))
            results = (result,) if isinstance(result, Tensor) else result
            alive.append([output for output in results if output.requires_grad])
        while alive:
            outputs = alive.pop()
            grads = [torch.randn_like(output) for output in outputs]
            start = self.clock.mark()
            torch.autograd.backward(outputs, grads)
            backward_marks.append((start, self.clock.mark()))
        return forward_marks, backward_marks
