"""Bytes for the eye: one unit for all numbers that are compared."""

from __future__ import annotations

from typing import NamedTuple


class ByteUnit(NamedTuple):
    """A unit's name and its size in bytes."""

    name: str
    size: int

    def text(self, num_bytes: float) -> str:
        """``num_bytes`` in this unit, with its name."""
        return f"{num_bytes / self.size:.4g} {self.name}"


_UNITS = (ByteUnit("GiB", 2**30), ByteUnit("MiB", 2**20), ByteUnit("KiB", 2**10))
# Below this share of a unit the next smaller one reads better.
_LEAST = 0.1


def byte_unit(largest: float) -> ByteUnit:
    """The unit in which numbers up to ``largest`` bytes read well: GiB wherever memory is scarce."""
    return next((unit for unit in _UNITS if largest >= _LEAST * unit.size), ByteUnit("bytes", 1))
