"""Closed forms of every schedule: bubble, activations and messages, each as a function and as its text.

The table of docs/choosing.md is :func:`markdown_table`, and the tests hold each function to the simulator,
so the text a reader sees stands beside the very expression that was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the closed forms are functions of, in the symbols of the table.

    Layers take equally long, as do slices of a sequence; messages are free.

    Attributes:
        p: pipeline ranks.
        L: layers, a multiple of the schedule's stages.
        m: micro batches, for seq1f1b and sliced-helix sequences.
        v: interleaved: chunks per rank.
        fold: helix: micro batches per slot.
        K: seq1f1b: slices per sequence.
        t_F: forward of one layer and micro batch, attention included.
        t_B: its input gradient.
        t_W: its weight gradient.
        t_last: helix: the segment after the last attention, head and loss included, forward plus backward.
        t_seg: sliced-helix: the segment between two attentions, forward plus backward.
        t_seg_B: sliced-helix: its backward.
        t_pre: sliced-helix: the part of t_seg that precedes attention.
        g: key/value heads over query heads.
        attention_range: helix: pieces that the attention rank runs.
    """

    p: int
    L: int
    m: int
    v: int = 2
    fold: int = 2
    K: int = 4
    t_F: float = 1.0
    t_B: float = 1.0
    t_W: float = 1.0
    t_last: float = 3.0
    t_seg: float = 3.0
    t_seg_B: float = 2.0
    t_pre: float = 0.75
    g: float = 1.0
    attention_range: str = "core"

    @property
    def t(self) -> float:
        """Forward plus backward of one layer."""
        return self.t_F + self.t_B + self.t_W


class Bubble(NamedTuple):
    """Idle time, from the first start of an iteration to its last end, of the rank with the least work."""

    text: str
    of: Callable[[Case], float]


class Activations(NamedTuple):
    """What rank r holds at its peak, in layers of one micro batch (A). With W operations, until W."""

    text: str
    of: Callable[[Case, int], float]


class Units(NamedTuple):
    """Forward messages of one micro batch over all ranks, in hidden states (b·s·h elements)."""

    text: str
    of: Callable[[Case], float]


class Range(NamedTuple):
    """Where the forms are exact. A schedule's own demands on its sizes come on top."""

    text: str
    holds: Callable[[Case], bool]


class Form(NamedTuple):
    """The closed forms of one schedule."""

    title: str
    bubble: Bubble
    activations: Activations
    units: Units
    exact: Range

    def makespan(self, case: Case) -> float:
        """One iteration: the work of a rank, m·(L/p)·t, and the bubble."""
        return case.t * case.m * case.L / case.p + self.bubble.of(case)


_NEIGHBOURS = Units("p−1", lambda c: c.p - 1)
_DOWN_AND_UP = Units("2(p−1)", lambda c: 2 * (c.p - 1))
_WHOLE_STAGES = Bubble("(p−1)·(L/p)·t", lambda c: (c.p - 1) * c.L / c.p * c.t)
_ALWAYS = Range("always", lambda c: True)


def _is_ordinary(case: Case) -> bool:
    return case.m >= 2 * case.p and case.t_W <= case.t_F <= case.t_B


def _is_even(case: Case) -> bool:
    return case.m >= 2 * case.p >= 4 and case.t_W == case.t_F == case.t_B


def _sliced_bubble(c: Case) -> float:
    start = (c.p - 1) * c.t_seg_B - (c.t_seg - c.t_pre)
    hidden = (c.t_seg + c.t_pre) * (c.fold - 1) / c.fold
    return c.m * (c.t_last + (start - hidden) / c.p)


def _holds_sliced(c: Case) -> bool:
    attention = min(c.t_F - (c.t_seg - c.t_seg_B), c.t_B + c.t_W - c.t_seg_B)
    return c.p >= 4 and c.L % c.p == 0 and 2 * c.t_pre <= c.t_seg <= attention and c.t_last >= c.t_seg


def _units_of_a_layer(case: Case) -> float:
    """To attention and back: q, k, v and residual or the hidden state; output and residual or their sum."""
    return {"core": 4 + 2 * case.g, "qkv": 3, "block": 2}[case.attention_range]


_ORDINARY = Range("m ≥ 2p, t_W ≤ t_F ≤ t_B", _is_ordinary)
_EVEN_TEXT = "m ≥ 2p, p ≥ 2, t_F = t_B = t_W; the bubble grows with m "

FORMS: Mapping[str, Form] = {
    "gpipe": Form(
        "GPipe",
        _WHOLE_STAGES,
        Activations("m·(L/p)·A", lambda c, r: c.m * c.L / c.p),
        _NEIGHBOURS,
        _ALWAYS,
    ),
    "1f1b": Form(
        "1F1B",
        _WHOLE_STAGES,
        Activations("(p−r)·(L/p)·A", lambda c, r: (c.p - r) * c.L / c.p),
        _NEIGHBOURS,
        Range("m ≥ p", lambda c: c.m >= c.p),
    ),
    "interleaved": Form(
        "interleaved 1F1B",
        Bubble("(p−1)·(L/(p·v))·t", lambda c: (c.p - 1) * c.L / (c.p * c.v) * c.t),
        Activations(
            "(2(p−r−1) + (v−1)·p + 1)·(L/(p·v))·A",
            lambda c, r: (2 * (c.p - r - 1) + (c.v - 1) * c.p + 1) * c.L / (c.p * c.v),
        ),
        Units("p·v−1", lambda c: c.p * c.v - 1),
        Range("m ≥ 2p, p ≥ 2", lambda c: c.m >= 2 * c.p >= 4),
    ),
    "zb-h1": Form(
        "ZB-H1",
        Bubble("(p−1)·(L/p)·(t_F + t_B − t_W)", lambda c: (c.p - 1) * c.L / c.p * (c.t_F + c.t_B - c.t_W)),
        Activations("L·A on every rank", lambda c, r: c.L),
        _NEIGHBOURS,
        _ORDINARY,
    ),
    "zb-v": Form(
        "ZB-V",
        Bubble(
            "(p−1)·(L/(2p))·max(t_B, 2(t_B − t_W))",
            lambda c: (c.p - 1) * c.L / (2 * c.p) * max(c.t_B, 2 * (c.t_B - c.t_W)),
        ),
        Activations("L·A on every rank", lambda c, r: c.L),
        _DOWN_AND_UP,
        _ORDINARY,
    ),
    "v-half": Form(
        "V-Half",
        Bubble("⌊(7p − 8)/2⌋·(L/(2p))·t_F", lambda c: (7 * c.p - 8) // 2 * c.L / (2 * c.p) * c.t_F),
        Activations("⌊(p+2)/2⌋·(L/p)·A on every rank", lambda c, r: (c.p + 2) // 2 * c.L / c.p),
        _DOWN_AND_UP,
        Range(_EVEN_TEXT + "unless t_W + 2t_B ≥ 2t_F and t_W + 2t_F ≥ 2t_B", _is_even),
    ),
    "v-min": Form(
        "V-Min",
        Bubble(
            "(4p − 5 + 2·[3 divides p])·(L/(2p))·t_F",
            lambda c: (4 * c.p - 5 + 2 * (c.p % 3 == 0)) * c.L / (2 * c.p) * c.t_F,
        ),
        Activations(
            "(⌊(p+4)/3⌋ − [3 divides p+1 and r])·(L/p)·A",
            lambda c, r: ((c.p + 4) // 3 - ((c.p + 1) % 3 == r % 3 == 0)) * c.L / c.p,
        ),
        _DOWN_AND_UP,
        Range(_EVEN_TEXT + "otherwise", _is_even),
    ),
    "dualpipe-v": Form(
        "DualPipeV",
        Bubble(
            "(L/(2p))·max((p−1)·(t_F + t_B − t_W), (p−1)·(2t_B − t_W) − t_F)",
            lambda c: (
                c.L
                / (2 * c.p)
                * max((c.p - 1) * (c.t_F + c.t_B - c.t_W), (c.p - 1) * (2 * c.t_B - c.t_W) - c.t_F)
            ),
        ),
        Activations("(2p+1)·(L/(2p))·A on every rank", lambda c, r: (2 * c.p + 1) * c.L / (2 * c.p)),
        _DOWN_AND_UP,
        _ORDINARY,
    ),
    "seq1f1b": Form(
        "Seq1F1B",
        Bubble("(p−1)·(L/p)·t/K", lambda c: (c.p - 1) * c.L / c.p * c.t / c.K),
        Activations("(p−r+K−1)·(L/p)·A/K", lambda c, r: (c.p - r + c.K - 1) * c.L / c.p / c.K),
        _NEIGHBOURS,
        Range("m ≥ p; A/K: slices of equal length", lambda c: c.m >= c.p),
    ),
    "helix": Form(
        "**helix**",
        Bubble("m·t_last: the others wait while rank 0 computes it", lambda c: c.m * c.t_last),
        Activations("fold·L·A on every rank", lambda c, r: c.fold * c.L),
        Units(
            "L·u·(p−1)/p; u: `core` 4 + 2g, `qkv` 3, `block` 2",
            lambda c: c.L * _units_of_a_layer(c) * (c.p - 1) / c.p,
        ),
        Range("p ≥ 2; first segment like those between, last no shorter", lambda c: c.p >= 2),
    ),
    "sliced-helix": Form(
        "**sliced helix**",
        Bubble(
            "m·{t_last + [(p−1)·t_seg,B − (t_seg−t_pre) − (1−1/fold)·(t_seg+t_pre)]/p}",
            _sliced_bubble,
        ),
        Activations("L·A/p on every rank, and keys and values of earlier slices", lambda c, r: c.L / c.p),
        Units(
            "L·(p−1)·[u + g·(p−2)]/p; u as for helix, `core`",
            lambda c: c.L * (c.p - 1) * (_units_of_a_layer(c) + c.g * (c.p - 2)) / c.p,
        ),
        Range(
            "p ≥ 4, p divides L, 2·t_pre ≤ t_seg ≤ attention, t_last ≥ t_seg; uniform slices",
            _holds_sliced,
        ),
    ),
}


def interlocked_idle(p: int, num_layers: int, middle: float, first: float, message: float) -> float:
    """Idle time of the busiest rank under helix with interlocked rounds, fold 1, spread head, without W.

    It does not depend on the number of rounds: all but the first start and the last end is filled. Exact for
    4 and 8 ranks where attention takes most of a layer's time.

    Args:
        p: pipeline ranks.
        num_layers: L.
        middle: forward plus backward of a segment between two attentions.
        first: forward plus backward of the segment before the first attention.
        message: a hidden state from one rank to another.
    """
    return (p - 2) * middle + first + (4 * num_layers - 6) * message


SYMBOLS: Mapping[str, str] = {
    "p, r": "pipeline ranks; one of them, 0 to p−1",
    "L, m": "transformer layers; micro batches (sequences) per iteration",
    "v, fold, K": "model chunks per rank; micro batches per helix slot; slices per sequence",
    "t_F, t_B, t_W": (
        "time of one layer's forward, input gradient and weight gradient, attention included; t is their sum"
    ),
    "t_last": "time of what follows the last attention, head and loss included; forward plus backward",
    "t_seg, t_seg,B, t_pre": (
        "time of what lies between two attentions, forward plus backward; its backward alone; the part of "
        "it that precedes attention"
    ),
    "unit": "b·s·h elements: micro batch x sequence x hidden",
    "A": "units that one layer keeps for its backward, or until its weight gradient",
    "g": "key/value heads over query heads",
    "[…]": "1 if it holds, else 0",
}


def markdown_table() -> str:
    """The closed forms as a Markdown table, followed by one of their symbols; ends with a newline."""
    forms = _table(
        (
            "schedule",
            "bubble per iteration",
            "activations at the peak, rank *r*",
            "units sent per micro batch, forward",
            "exact for",
        ),
        ((f.title, f.bubble.text, f.activations.text, f.units.text, f.exact.text) for f in FORMS.values()),
    )
    return f"{forms}\n{_table(('symbol', 'meaning'), SYMBOLS.items())}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |\n" for row in (head, *rows)]
    return "".join([lines[0], "|" + "---|" * len(head) + "\n", *lines[1:]])
