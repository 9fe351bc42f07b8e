"""Whole training runs that watch which plan object they execute, and which samples they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.datasets.gpt_dataset import GPTDataset
from training_worker import Fault, run_cases


class WatchPlan(Fault):
    """No fault: notes in every iteration whether the plan that ran is the one that parsing validated."""

    def __init__(self, read: list[int]) -> None:
        self.all_read = read

    def on_build(self, state: Any, forward_backward: Any) -> None:
        self.forward_backward = forward_backward
        self.first_read = len(self.all_read)

    def on_gradients(self, state: Any) -> None:
        self.seen.append(self.forward_backward.plan is self.settings.schedule.plan)


def train_and_watch(folder: Path, common: str, runs: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Train with each run's options on two pipeline ranks; what came of it, with the losses of rank 0."""
    read: list[int] = []
    watches = {name: WatchPlan(read) for name in runs}
    get_sample = GPTDataset.__getitem__

    def note(dataset: Any, index: Any) -> Any:
        read.append(int(index))
        return get_sample(dataset, index)

    cases: list[tuple[str, Fault]] = [
        (f"{options} --metrics-jsonl {folder / name}.jsonl", watches[name]) for name, options in runs.items()
    ]
    with mock.patch.object(GPTDataset, "__getitem__", note):
        finished = run_cases(cases, 1, 2, f"{common} --pipeline-model-parallel-size 2")
    found = {}
    ends = [*[watch.first_read for watch in watches.values()][1:], len(read)]
    for (name, watch), run, end in zip(watches.items(), finished, ends, strict=True):
        planned = watch.settings.schedule.plan
        rows = (
            (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            if watch.settings.parallel.rank == 0
            else []
        )
        losses = [json.loads(row)["lm_loss"] for row in rows]
        # True only if the run has ended with an evaluation.
        evaluated = watch.forward_backward.plan == planned.forward_only()
        samples = read[watch.first_read : end]
        found[name] = {**run, "losses": losses, "evaluated": evaluated, "read": samples}
    return found
