"""What all ranks must be given alike, compared before the first message."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from torch.distributed import Store

from helixpipe.reliability.versions import versions

# Of one rank or one host, or without effect on the numbers.
_MAY_DIFFER = frozenset((
    "rank", "data_path", "data_cache_path", "num_workers", "metrics_jsonl", "trace_dir", "save", "load",
    "failure_dir", "log_interval", "hardware", "plan", "schedule", "dataset", "hang_timeout_s",
    "elastic_costs", "profiling", "tokenizer", "tokenizer_model", "vocab_file", "merge_file",
))  # fmt: skip
# A disagreement in many arguments is shown by the first few.
_MAX_SHOWN = 6


def agree_on_arguments(args: argparse.Namespace, store: Store) -> None:
    """Compare arguments, plan, data set and versions over all ranks.

    Args:
        args: parsed arguments.
        store: one that all ranks reach.

    Raises:
        ValueError: on every rank, with both values, if a rank differs from rank 0.
    """
    store.set(f"arguments/{args.rank}", json.dumps(fingerprint(args)))
    if args.rank == 0:
        store.set("disagreement", _disagreement(store, args.world_size))
    text = store.get("disagreement").decode()
    if text:
        raise ValueError(text)


def fingerprint(args: argparse.Namespace) -> dict[str, str]:
    """Everything that must be the same on all ranks, by the name to show."""
    found: dict[str, Any] = {
        "--" + name.replace("_", "-"): value for name, value in vars(args).items() if name not in _MAY_DIFFER
    }
    # Where the files are may differ between hosts, but not what is in them.
    found |= {f"data set, {k}": v for k, v in dataclasses.asdict(args.dataset).items() if k != "prefix"}
    if args.schedule.plan is not None:
        found["plan"] = args.schedule.plan.fingerprint[:16]
    found |= versions()
    return {name: str(value) for name, value in found.items()}


def _disagreement(store: Store, world_size: int) -> str:
    """One line about the first rank that differs from rank 0, empty if none does."""
    expected: dict[str, str] = json.loads(store.get("arguments/0"))
    others = []
    shown = ""
    for rank in range(1, world_size):
        found: dict[str, str] = json.loads(store.get(f"arguments/{rank}"))
        if found == expected:
            continue
        others.append(rank)
        shown = shown or _differences(rank, expected, found)
    more = f" (and {len(others) - 1} more ranks differ)" if len(others) > 1 else ""
    if not others:
        return ""
    return f"ranks disagree: {shown}{more}. Start every rank with the same command and files"


def _differences(rank: int, expected: dict[str, str], found: dict[str, str]) -> str:
    names = [name for name in dict.fromkeys((*expected, *found)) if expected.get(name) != found.get(name)]
    parts = [
        f"{name} is {expected.get(name, 'missing')} on rank 0, {found.get(name, 'missing')} on rank {rank}"
        for name in names[:_MAX_SHOWN]
    ]
    more = f"; and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return "; ".join(parts) + more
