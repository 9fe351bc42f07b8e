"""The pipeline that Megatron's functions see: its own way to override what its groups say."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state


def as_one_stage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``function`` see a pipeline of one stage, which reads tokens and labels, on whatever rank."""

    @functools.wraps(function)
    def seen(*args: Any, **options: Any) -> Any:
        with seen_as(0, 1):
            return function(*args, **options)

    return seen


@contextmanager
def seen_as(stage: int, num_stages: int) -> Iterator[None]:
    """Within, this rank is ``stage`` of a pipeline of ``num_stages``."""
    parallel_state.set_pipeline_model_parallel_world_size(num_stages)
    parallel_state.set_pipeline_model_parallel_rank(stage)
    # Megatron-LM 0.17 asks its arguments.
    args = program_arguments()
    size = getattr(args, "pipeline_model_parallel_size", None)
    if args is not None:
        args.pipeline_model_parallel_size = num_stages
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_world_size(None)
        parallel_state.set_pipeline_model_parallel_rank(None)
        if args is not None:
            args.pipeline_model_parallel_size = size


def program_arguments() -> Any:
    """Of Megatron-LM's program; None in another one, which may have imported it without its arguments."""
    variables = sys.modules.get("megatron.training.global_vars")
    try:
        return None if variables is None else variables.get_args()
    except AssertionError:  # they are not set
        return None
