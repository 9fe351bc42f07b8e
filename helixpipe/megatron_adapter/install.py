"""Plug a schedule in where Megatron asks for its ``forward_backward_func``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from megatron.core import pipeline_parallel
from megatron.core.pipeline_parallel import schedules

from helixpipe.megatron_adapter.schedule import ForwardBackward

logger = logging.getLogger(__name__)

_ORIGINAL = schedules.get_forward_backward_func
_PLACES = (schedules, pipeline_parallel)


def install(forward_backward: ForwardBackward) -> None:
    """Make Megatron's ``get_forward_backward_func`` return ``forward_backward``, until :func:`uninstall`.

    Code that imported the function by name before this call keeps Megatron's own.
    """

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return forward_backward

    for place in _PLACES:
        place.get_forward_backward_func = get_forward_backward_func
    logger.info("schedule installed: %s", forward_backward)


def uninstall() -> None:
    """Give Megatron its own function back; harmless if nothing was installed."""
    for place in _PLACES:
        place.get_forward_backward_func = _ORIGINAL
