"""fp8, which is never on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False


@contextmanager
def fp8_autocast(enabled: bool = False, **options: Any) -> Iterator[None]:
    assert not enabled
    yield


@contextmanager
def fp8_model_init(enabled: bool = True, **options: Any) -> Iterator[None]:
    assert not enabled
    yield
