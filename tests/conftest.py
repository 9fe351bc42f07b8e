"""Imports and parametrizations make many objects and no garbage: nobody need look for it."""

import gc


def pytest_sessionstart() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
