"""Which attention backend a job computes with, told once, and what if ranks do not agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist


def attention_of_job(mine: str) -> str:
    """The line for the terminal, from every rank's own choice; collective.

    Args:
        mine: this rank's backend, with the reasons why it is not a faster one.
    """
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return summary(everyone)


def summary(choices: Sequence[str]) -> str:
    """One line about the choices of all ranks: a node whose packages are broken must not go unseen."""
    ranks: dict[str, list[int]] = {}
    for rank, choice in enumerate(choices):
        ranks.setdefault(choice, []).append(rank)
    if len(ranks) == 1:
        return f"attention: {choices[0]}"
    parts = (f"{choice} on rank {of[0]}{_more(of)}" for choice, of in ranks.items())
    return f"attention differs between ranks, the slowest holds up all: {'; '.join(parts)}"


def _more(ranks: Sequence[int]) -> str:
    return f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
