"""Plugging the schedule into Megatron and taking it out again."""

import sys
import types

import pytest
from megatron.core import pipeline_parallel
from megatron.core.pipeline_parallel import schedules

from helixpipe.megatron_adapter.forward_backward import HelixForwardBackward
from helixpipe.megatron_adapter.install import install, uninstall

ORIGINAL = schedules.get_forward_backward_func


def functions():
    return pipeline_parallel.get_forward_backward_func, schedules.get_forward_backward_func


@pytest.fixture(autouse=True)
def _clean():
    yield
    uninstall()
    assert functions() == (ORIGINAL, ORIGINAL)


def test_megatron_gets_the_installed_function_wherever_it_asks():
    helix = HelixForwardBackward()
    install(helix)
    for function in functions():
        assert function() is helix
        assert function(pp_size=4, vp_size=None) is helix


def test_a_module_that_imported_it_before_gets_it_too(monkeypatch):
    early = types.ModuleType("early")
    early.get = ORIGINAL
    monkeypatch.setitem(sys.modules, "early", early)
    helix = HelixForwardBackward()
    install(helix)
    assert early.get() is helix
    uninstall()
    assert early.get is ORIGINAL


def test_the_last_one_installed_counts():
    first, second = HelixForwardBackward(), HelixForwardBackward(num_fold=1)
    install(first)
    install(first)
    assert functions()[0]() is first
    install(second)
    assert [function() for function in functions()] == [second, second]
    # One step back is enough, however often it was installed.
    uninstall()
    assert functions() == (ORIGINAL, ORIGINAL)


def test_taking_out_what_is_not_there_is_harmless():
    uninstall()
    uninstall()
    assert functions() == (ORIGINAL, ORIGINAL)


def test_installing_is_logged(caplog):
    with caplog.at_level("INFO", logger="helixpipe.megatron_adapter.install"):
        install(HelixForwardBackward(num_fold=3))
    assert caplog.messages == ["schedule installed: helix (num_fold=3, attention_range=core)"]
