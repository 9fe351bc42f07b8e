"""Plug a schedule in where Megatron asks for its ``forward_backward_func``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from helixpipe.contact_points import replace_everywhere
from helixpipe.megatron_adapter.schedule import ForwardBackward

logger = logging.getLogger(__name__)

_undo: list[Callable[[], None]] = []


def install(forward_backward: ForwardBackward) -> None:
    """Make Megatron's ``get_forward_backward_func`` return ``forward_backward``, until :func:`uninstall`.

    Modules that imported the function by name before this call get it, too.
    """

    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return forward_backward

    uninstall()
    place = "megatron.core.pipeline_parallel.schedules"
    _undo.append(replace_everywhere(place, "get_forward_backward_func", get_forward_backward_func))
    logger.info("schedule installed: %s", forward_backward)


def uninstall() -> None:
    """Give Megatron its own function back; harmless if nothing was installed."""
    while _undo:
        _undo.pop()()
