"""Ends before the last iteration, and what is collected beside training."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from megatron.pretrain.health.housekeeping import Housekeeping
from megatron.pretrain.health.planned_end import PlannedEnd
from megatron.pretrain.settings.ending import Ending
from megatron.pretrain.settings.housekeeping import HousekeepingSettings, housekeeping_of


def test_an_interval_ends_a_job():
    end = PlannedEnd(Ending(5, None))
    assert [i for i in range(1, 12) if end.reason(i, is_over=end.is_over)] == [5, 10]
    assert end.reason(5, is_over=False) == "--exit-interval 5"


def test_minutes_end_a_job():
    now = 0.0
    end = PlannedEnd(Ending(None, 0.5), clock=lambda: now, started=0.0)
    assert not end.is_over
    now = 30.0
    assert end.is_over
    assert end.reason(3, is_over=False) == ""  # other ranks have been told otherwise
    assert end.reason(3, is_over=True) == "--exit-duration-in-mins 0.5"


def test_nothing_ends_a_job_by_itself():
    end = PlannedEnd(Ending(None, None), clock=lambda: 1e9)
    assert not end.is_over
    assert end.reason(10, is_over=False) == ""


@pytest.fixture
def collected(monkeypatch):
    """Generations that are collected; 'gpu' for GPU memory that is given back."""
    found = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: found.append(generation))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("gpu"))
    yield found
    gc.enable()


def one_iteration(settings, iteration):
    keeper = Housekeeping(settings)
    keeper.before_optimizer()
    keeper.after_iteration(iteration)
    keeper.around_evaluation()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (HousekeepingSettings(False, 0, True, 0), []),
        (HousekeepingSettings(False, 0, True, 1), ["gpu"]),
        (HousekeepingSettings(False, 0, True, 2), ["gpu", "gpu"]),
        (HousekeepingSettings(True, 0, False, 0), [2]),
        (HousekeepingSettings(True, 3, False, 0), [2, 2]),
        (HousekeepingSettings(True, 4, False, 0), [2]),
        (HousekeepingSettings(True, 0, True, 0), [2, 0]),
    ],
)
def test_what_is_collected_when(collected, settings, wanted):
    one_iteration(settings, 6)
    assert collected == wanted
    assert gc.isenabled() != settings.is_manual


@pytest.mark.parametrize("wrong", [{"manual_gc_interval": 3}, {"manual_gc_eval": False}])
def test_options_of_manual_collection_need_it(wrong):
    given = {"manual_gc": False, "manual_gc_interval": 0, "manual_gc_eval": True} | wrong
    with pytest.raises(ValueError, match=r"needs --manual-gc$"):
        housekeeping_of(SimpleNamespace(**given, empty_unused_memory_level=0))
