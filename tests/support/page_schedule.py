"""The schedule that docs/architecture.md adds, registered as the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from plan_worker import train_and_watch

from helixpipe.plan.execution import Execution
from helixpipe.plan.schedules import SCHEDULES, Schedule

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
NAME = "lifo"


@contextmanager
def registered() -> Iterator[None]:
    """The page's file and line, in force inside the context."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## Add a schedule\n")[2].partition("\n## ")[0]
    file, line = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    module: dict[str, Any] = {}
    exec(compile(file, f"{NAME}.py", "exec"), module)
    names = {NAME: SimpleNamespace(plan=module["plan"]), "Schedule": Schedule, "Execution": Execution}
    with mock.patch.dict(SCHEDULES, eval("{" + line + "}", names)):
        yield


def train_with_the_pages_schedule(*arguments: Any) -> Any:
    """:func:`plan_worker.train_and_watch` with the schedule registered, on every rank."""
    with registered():
        return train_and_watch(*arguments)
