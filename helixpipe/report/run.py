"""What a training run has left in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixpipe.json_input import parse_object, read_json
from helixpipe.plan.simulation.timeline import Timeline


@dataclass(frozen=True)
class Run:
    """A run by its files.

    Attributes:
        rows: of the metrics file, one for each iteration.
        timelines: measured ones by iteration, as files.
        arguments: options by name; empty if they were not written.
    """

    rows: tuple[Mapping[str, Any], ...]
    timelines: Mapping[int, Path]
    arguments: Mapping[str, Any]

    def sample(self) -> int:
        """The iteration with a timeline whose time is the median."""
        times = {row["iteration"]: row["elapsed_ms"] for row in self.rows}
        known = sorted((times.get(iteration, 0.0), iteration) for iteration in self.timelines)
        return known[len(known) // 2][1]

    def timeline(self, iteration: int) -> Timeline:
        """What was measured in an iteration.

        Raises:
            ValueError: there is no timeline of it, or one that cannot be read.
        """
        if iteration not in self.timelines:
            first, last = min(self.timelines), max(self.timelines)
            raise ValueError(f"iteration {iteration} has no timeline; choose one of {first} to {last}")
        return Timeline.from_json(self.timelines[iteration].read_text(encoding="utf-8"))


def read_run(folder: Path) -> Run:
    """Read a folder that ``--trace-dir`` and ``--metrics-jsonl`` have been in, or two folders in it.

    Raises:
        ValueError: metrics or timelines are missing, or cannot be read.
    """
    metrics = _found(folder, "*.jsonl")
    if len(metrics) != 1:
        raise ValueError(
            f"{folder} holds {len(metrics)} metrics files (*.jsonl), not one; train with --metrics-jsonl "
            f"{folder / 'metrics.jsonl'}"
        )
    timelines = {
        int(path.stem.removeprefix("iteration_")): path for path in _found(folder, "iteration_*.json")
    }
    if not timelines:
        raise ValueError(f"{folder} holds no iteration_*.json; train with --trace-dir {folder}")
    arguments = _found(folder, "arguments.json")
    try:
        lines = metrics[0].read_text(encoding="utf-8").splitlines()
        rows = [parse_object(line, f"line {number}") for number, line in enumerate(lines, 1)]
        rows.sort(key=lambda row: row["iteration"])
        options = read_json(arguments[0], "arguments") if arguments else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: the metrics or arguments cannot be read ({error})") from None
    if not rows:
        raise ValueError(f"{metrics[0]} holds no iteration yet")
    return Run(tuple(rows), timelines, options)


def _found(folder: Path, pattern: str) -> Sequence[Path]:
    return sorted((*folder.glob(pattern), *folder.glob(f"*/{pattern}")))
