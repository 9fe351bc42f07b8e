"""JSON from files: text that is none is refused in one line, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, what: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: no JSON, or nested deeper than can be read; begins with ``what``.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: invalid JSON ({error})") from None


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """What a JSON object holds.

    Raises:
        ValueError: no JSON, or no object; begins with ``what``.
    """
    data = parse_json(text, what)
    if not isinstance(data, dict):
        raise ValueError(f"{what}: expected a JSON object, found {data!r:.40}")
    return data


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: no text, or no JSON; begins with ``what`` and the path.
        OSError: a file that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{what} {path}: not a text file") from None
    return parse_json(text, f"{what} {path}")
