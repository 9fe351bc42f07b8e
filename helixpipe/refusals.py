"""Refuse what would be ignored or done wrong, in one line that says what to change."""

from __future__ import annotations

from collections.abc import Mapping


def refuse(options: Mapping[str, object], sentence: str) -> None:
    """Raise for the first option that is set.

    Args:
        options: whether each is set, by the name to show.
        sentence: the message, with ``{}`` where the name goes.

    Raises:
        ValueError: the sentence.
    """
    for name, is_set in options.items():
        if is_set:
            raise ValueError(sentence.replace("{}", name))
