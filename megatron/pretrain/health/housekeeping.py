"""Collect Python's garbage on all ranks at the same time, and give unused GPU memory back."""

from __future__ import annotations

import gc

import torch

from megatron.pretrain.settings.housekeeping import HousekeepingSettings


class Housekeeping:
    """Does nothing unless it is asked to.

    Where collection is manual, Python's own is off from here on: on one of many ranks it would make all
    others wait.

    Args:
        settings: what to do.
    """

    def __init__(self, settings: HousekeepingSettings) -> None:
        self._settings = settings
        if settings.is_manual:
            gc.disable()
            gc.collect()

    def before_optimizer(self) -> None:
        """Gradients are there, activations are gone."""
        if self._settings.emptying >= 1:
            torch.cuda.empty_cache()

    def after_iteration(self, iteration: int) -> None:
        """The optimizer has stepped."""
        if self._settings.emptying >= 2:
            torch.cuda.empty_cache()
        interval = self._settings.interval
        if interval and iteration % interval == 0:
            gc.collect()

    def around_evaluation(self) -> None:
        """Before an evaluation, and after it."""
        if self._settings.is_manual and self._settings.around_evaluation:
            gc.collect(generation=0)
