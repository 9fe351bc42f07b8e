"""The console that tables are printed on."""

from __future__ import annotations

import sys

from rich.console import Console


def table_console(width: int) -> Console:
    """A console of at least ``width`` columns.

    A narrower terminal breaks lines; in a narrower table numbers would be cut off. Output that is no terminal
    has no width of its own.
    """
    console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
    console.width = max(console.width, width)
    return console
