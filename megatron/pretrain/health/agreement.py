"""What all ranks must be given alike, compared before the first message."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch.distributed import Store

from helixpipe.commands.parser import flag_of
from helixpipe.reliability.versions import versions
from megatron.pretrain.settings.job import JobSettings

# Of one rank or one host, or without effect on the numbers.
_MAY_DIFFER = frozenset((
    "data_path", "data_args_path", "train_data_path", "valid_data_path",
    "per_split_data_args_path", "data_cache_path", "num_workers", "metrics_jsonl", "trace_dir",
    "save", "load",
    "failure_dir", "log_interval", "hardware", "plan", "hang_timeout_s", "elastic_costs",
    "tokenizer_model", "vocab_file", "merge_file",
))  # fmt: skip
# A disagreement in many arguments is shown by the first few.
_MAX_SHOWN = 6


def agree_on_arguments(settings: JobSettings, store: Store) -> None:
    """Compare arguments, plan, data set and versions over all ranks.

    Args:
        settings: of this rank.
        store: one that all ranks reach.

    Raises:
        ValueError: on every rank, with both values, if a rank differs from rank 0.
    """
    rank = settings.parallel.rank
    store.set(f"arguments/{rank}", json.dumps(fingerprint(settings)))
    if rank == 0:
        store.set("disagreement", _disagreement(store, settings.parallel.world_size))
    text = store.get("disagreement").decode()
    if text:
        raise ValueError(text)


def fingerprint(settings: JobSettings) -> dict[str, str]:
    """Everything that must be the same on all ranks, by the name to show."""
    found: dict[str, Any] = {
        flag_of(name): value for name, value in settings.options.items() if name not in _MAY_DIFFER
    }
    found |= {
        "world size": settings.parallel.world_size,
        "padded vocabulary": settings.model.padded_vocab_size,
        "what elastic plans are made by": settings.elastic_job,
    }
    # Where the files are may differ between hosts, but not what is in them.
    found |= {
        f"data set, {k}": v for k, v in dataclasses.asdict(settings.data.dataset).items() if k != "prefix"
    }
    if settings.data.is_blend:
        found["data set, blend"] = [
            (source.weights, [(info.num_documents, info.num_tokens) for info in source.infos])
            for source in settings.data.sources
        ]
    if settings.schedule.plan is not None:
        found["plan"] = settings.schedule.plan.fingerprint[:16]
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
