"""JSON that people can read and diff: one line per row of a table."""

from __future__ import annotations

import json
from collections.abc import Iterable


def json_rows(key: str, rows: Iterable[object]) -> str:
    """A member of a top-level object whose value is a list, with a line per element."""
    body = ",\n".join("    " + json.dumps(row) for row in rows)
    return f'  "{key}": [\n{body}\n  ]'
