"""The activation store: what forwards keep for their backward."""

from __future__ import annotations

from typing import Generic, TypeVar

Key = tuple[int, int]
Value = TypeVar("Value")


class ActivationStore(Generic[Value]):
    """Values by (segment, micro batch); each is put once, taken once, and none is left at the end."""

    def __init__(self) -> None:
        self._values: dict[Key, Value] = {}
        self.peak = 0

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value."""
        assert key not in self._values, f"segment {key[0]}, micro batch {key[1]} is already stored"
        self._values[key] = value
        self.peak = max(self.peak, len(self._values))

    def take(self, key: Key) -> Value:
        """Give a value back and forget it."""
        assert key in self._values, f"segment {key[0]}, micro batch {key[1]} is not stored"
        return self._values.pop(key)

    def assert_empty(self) -> None:
        """Everything that was put has been taken."""
        assert not self._values, f"left in the store (segment, micro batch): {sorted(self._values)}"
