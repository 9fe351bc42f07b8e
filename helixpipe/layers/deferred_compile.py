"""megatron.core, imported without the compiler that its fused functions may need."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from helixpipe.contact_points import replace


def import_megatron_core() -> None:
    """Import megatron.core so that what it decorates with ``torch.compile`` is compiled when first called.

    ``torch.compile`` loads the compiler already where it decorates: two seconds of every rank's start, of no
    use to a run without fused functions. megatron.core keeps the decorator of its first import.
    """
    undo = replace("torch", "compile", functools.partial(_compile_when_called, torch.compile))
    try:
        import megatron.core.jit  # noqa: F401
    finally:
        undo()


def _compile_when_called(
    compile_now: Callable[..., Any], function: Callable[..., Any], **options: Any
) -> Callable[..., Any]:
    @functools.cache
    def compiled() -> Callable[..., Any]:
        found: Callable[..., Any] = compile_now(function, **options)
        return found

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
