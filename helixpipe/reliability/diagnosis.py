"""Who is to blame when ranks stand still: the rank that nobody keeps waiting."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from helixpipe.reliability.status import ALIVE, DEAD, ENDED, FAILED, STOPPED, Status

# More ranks than this are counted, not listed.
_MAX_LISTED = 64


def culprits(statuses: Mapping[int, Status], missing: Collection[int] = ()) -> list[int]:
    """The ranks that hold the others up, in the order of how sure it is.

    A rank that is gone, was stopped, or never came; else one whose interpreter does not answer; else the
    ranks at the end of chains of waits that are the least far in the program, those inside an operation
    before those between operations. Ranks that wait for each other in a circle are all named.

    Args:
        statuses: by rank.
        missing: ranks that were expected and never heard of.
    """
    present = [status for status in statuses.values() if status.condition != ENDED]
    for suspects in (
        [*missing, *(s.rank for s in present if s.condition in (DEAD, FAILED))],
        [s.rank for s in present if s.condition == STOPPED],
        [s.rank for s in present if not s.answers and not s.message],
    ):
        if suspects:
            return sorted(suspects)
    ends = {end for status in present for end in _ends_of_waits(status, statuses)}
    candidates = [status for status in present if status.rank in ends]
    first = min(status.place for status in candidates)
    behind = [status for status in candidates if status.place == first]
    busy = [status for status in behind if status.operation and not status.message]
    return sorted(status.rank for status in busy or behind)


def _ends_of_waits(status: Status, statuses: Mapping[int, Status]) -> set[int]:
    """Who a rank waits for in the end: one rank, itself if it waits for none, or all ranks of a circle."""
    path = [status.rank]
    while True:
        peer = statuses[path[-1]].peer
        if peer is None or peer not in statuses:
            return {path[-1]}
        if peer in path:
            return set(path[path.index(peer) :])
        path.append(peer)


def describe_hang(statuses: Mapping[int, Status], missing: Collection[int] = ()) -> str:
    """Names the culprits, what they are doing, and whom they hold up."""
    guilty = culprits(statuses, missing)
    parts = []
    for rank in guilty:
        if rank in missing:
            parts.append(f"rank {rank} has not joined the job")
        else:
            status = statuses[rank]
            parts.append(f"{status.name} {_symptom(status)}: {status.position}")
    if len(guilty) > 1 and all(rank in statuses and statuses[rank].message for rank in guilty):
        parts.append("these wait for each other in a circle")
    # Reports are not of one instant: who waits for the same reason may not be overdue yet.
    still = (s.rank for s in statuses.values() if s.condition == ALIVE and s.seconds > s.deadline_s / 2)
    held_up = sorted(set(still) - set(guilty))
    waiting = f"; held up: {_listed(held_up)}" if held_up else ""
    return f"hang: {'; '.join(parts)}{waiting}"


def describe_lost(statuses: Mapping[int, Status], lost: Iterable[int]) -> str:
    """Names the ranks that are gone, and where each was."""
    return "; ".join(
        f"{statuses[rank].name} was lost (killed, crashed or cut off): {statuses[rank].position}"
        for rank in lost
    )


def describe_failed(statuses: Mapping[int, Status], failed: Iterable[int]) -> str:
    """Names the ranks that ended with an error, the error and where."""
    return "; ".join(
        f"{statuses[rank].name} failed: {statuses[rank].error}; {statuses[rank].position}" for rank in failed
    )


def _symptom(status: Status) -> str:
    if status.condition == STOPPED:
        return "is stopped (SIGSTOP or a debugger)"
    if not status.answers:
        return "hangs inside a call that does not let Python run"
    if status.condition == ALIVE and (status.operation or status.message):
        return "does not go on"
    return "has not arrived where the others wait" if status.condition == ALIVE else "is gone"


def last_completed(statuses: Mapping[int, Status]) -> str:
    """How far every rank has come."""
    shown = [
        f"rank {rank}: {status.last or 'none'}" + (f" (step {status.step})" if status.step else "")
        for rank, status in sorted(statuses.items())[:_MAX_LISTED]
    ]
    more = len(statuses) - len(shown)
    return f"last completed: {', '.join(shown)}{f' and {more} more ranks' if more > 0 else ''}"


def _listed(ranks: list[int]) -> str:
    more = len(ranks) - _MAX_LISTED
    text = ", ".join(map(str, ranks[:_MAX_LISTED]))
    return f"rank{'s' * (len(ranks) > 1)} {text}{f' and {more} more' if more > 0 else ''}"
