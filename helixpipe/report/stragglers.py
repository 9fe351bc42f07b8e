"""Which ranks are slower than others at the same work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, median

from helixpipe.plan.operation import Kind
from helixpipe.plan.segment_names import role_of
from helixpipe.plan.simulation.timeline import Timeline

# Of the median of the ranks; below, noise of clocks and caches.
SLOW = 1.05


def slowness(timelines: Iterable[Timeline]) -> list[float]:
    """How long each rank takes for its operations, over what the ranks' median takes for the same; about 1.

    Operations are the same if their kind is, and the part of the model that they compute: ends of the model
    and attention are told apart from the rest. What only one rank does counts as 1.

    Args:
        timelines: of one run, with the same ranks.
    """
    durations: dict[tuple[Kind, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    ranks = 0
    for timeline in timelines:
        ranks = len(timeline.spans)
        for rank, spans in enumerate(timeline.spans):
            for operation, start, end in spans:
                key = operation.kind, _part(timeline, operation.segment)
                durations[key][rank].append(end - start)
    own, usual = [0.0] * ranks, [0.0] * ranks
    for by_rank in durations.values():
        means = {rank: fmean(values) for rank, values in by_rank.items()}
        middle = median(means.values())
        for rank, mean in means.items():
            own[rank] += mean * len(by_rank[rank])
            usual[rank] += middle * len(by_rank[rank])
    return [mine / theirs if theirs else 1.0 for mine, theirs in zip(own, usual, strict=True)]


def _part(timeline: Timeline, segment: int) -> str:
    names = timeline.segment_names
    if not names:
        return ""
    if segment in (0, len(names) - 1):
        return names[segment]
    # Stages between the ends are alike.
    return role_of(names[segment]).rstrip("0123456789")
