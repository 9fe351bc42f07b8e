"""Plug a schedule in where Megatron asks for its ``forward_backward_func``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from helixpipe.contact_points import replace
from helixpipe.megatron_adapter.schedule import ForwardBackward

logger = logging.getLogger(__name__)

_PLACES = ("megatron.core.pipeline_parallel.schedules", "megatron.core.pipeline_parallel")
_undo: list[Callable[[], None]] = []


def install(forward_backward: ForwardBackward) -> None:
    """Make Megatron's ``get_forward_backward_func`` return ``forward_backward``, until :func:`uninstall`.

    Code that imported the function by name before this call keeps Megatron's own.
    """

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return forward_backward

    uninstall()
    for place in _PLACES:
        _undo.append(replace(place, "get_forward_backward_func", get_forward_backward_func))
    logger.info("schedule installed: %s", forward_backward)


def uninstall() -> None:
    """Give Megatron its own function back; harmless if nothing was installed."""
    while _undo:
        _undo.pop()()
