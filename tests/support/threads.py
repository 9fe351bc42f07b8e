"""Run a function for every rank on threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def run_on_threads(size: int, function: Callable[[int], Result]) -> list[Result]:
    """Call ``function(rank)`` for all ranks at once; the results by rank, or the failure that came first.

    A rank that fails leaves its peers waiting, so a ``TimeoutError`` is raised only if nothing else was.
    """
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, rank) for rank in range(size)]
    failures = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(failures, key=lambda error: isinstance(error, TimeoutError)):
        raise error
    return [future.result() for future in futures]
