"""The colours that pictures, pages and traces share."""

from __future__ import annotations

from typing import NamedTuple

from helixpipe.report.role import Role


class Style(NamedTuple):
    """Colours of a bar, and the colour that a trace viewer knows by name and that comes nearest."""

    fill: str
    text: str
    trace_name: str


# Blue against orange stays apart under every common colour blindness, dark against light also in grey.
STYLES = {
    Role.FORWARD: Style("#1f5fa8", "#ffffff", "rail_response"),
    Role.ATTENTION_FORWARD: Style("#a9d1f3", "#0b2d52", "thread_state_runnable"),
    Role.BACKWARD: Style("#d4660b", "#ffffff", "thread_state_iowait"),
    Role.ATTENTION_BACKWARD: Style("#fbd09b", "#532503", "thread_state_unknown"),
    Role.WEIGHT: Style("#4b9b82", "#ffffff", "rail_load"),
}
WAIT_TRACE_NAME = "grey"
IDLE = "#eceef1"
INK = "#22272e"
FAINT = "#5d6570"
RULE = "#b9c0c8"
LIMIT = "#c62f4b"

# Neighbours in this row differ in hue, all are dark enough for white paper and light enough for a dark page.
_RANK_STOPS = ("#7a55c7", "#2f7fd0", "#12958a", "#6f9a1c", "#c9862a", "#d0486b")


def rank_colour(rank: int, num_ranks: int) -> str:
    """The colour of a rank's curve: hues in order of ranks, so that near ranks look alike."""
    if num_ranks == 1:
        return _RANK_STOPS[1]
    place = rank / (num_ranks - 1) * (len(_RANK_STOPS) - 1)
    before = min(int(place), len(_RANK_STOPS) - 2)
    share = place - before
    channels = zip(_channels(_RANK_STOPS[before]), _channels(_RANK_STOPS[before + 1]), strict=True)
    return "#" + "".join(f"{round(low + (high - low) * share):02x}" for low, high in channels)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
