"""How many layers each stage of a plan has: as many as the others, unless the plan says it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from helixpipe.plan.plan import Plan

# A plan's parameter, in the form of ``spell_stage_layers``; without it stages are alike.
STAGE_LAYERS = "stage_layers"


def spell_stage_layers(counts: Sequence[int]) -> str:
    """The form in which a plan and a command line have them, like ``2,4,4,2``."""
    return ",".join(map(str, counts))


def parse_stage_layers(text: str) -> tuple[int, ...]:
    """Read that form.

    Raises:
        ValueError: it is another.
    """
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 9 and int(part) for part in parts):
        raise ValueError(f"{text[:64]!r} must be the layers of each stage, like 2,4,4,2")
    return tuple(map(int, parts))


def layers_of_stages(plan: Plan) -> list[range]:
    """The numbers of each stage's layers, from 0.

    Args:
        plan: of whole layers, as :func:`helixpipe.plan.fit.check_executable` finds it to be.

    Raises:
        ValueError: it does not share its layers out.
    """
    num_layers, stages = plan.parameters.get("num_layers"), plan.num_segments
    if not isinstance(num_layers, int):
        raise ValueError(f'the plan\'s "num_layers" is {num_layers!r:.40}; it must be a number')
    spelled = plan.parameters.get(STAGE_LAYERS)
    if spelled is None and num_layers % stages:
        raise ValueError(
            f"{num_layers} layers in {stages} segments on {plan.num_ranks} ranks are not shared out evenly; "
            "give every segment as many layers and every rank as many segments as the others"
        )
    counts = stage_counts(() if spelled is None else parse_stage_layers(str(spelled)), num_layers, stages)
    check_stage_layers(counts, num_layers, stages)
    return [range(first, last) for first, last in pairwise(accumulate(counts, initial=0))]


def stage_counts(counts: Sequence[int], num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage: those given, or, where none are, as many in each."""
    return tuple(counts) or (num_layers // num_stages,) * num_stages


def check_stage_layers(counts: Sequence[int], num_layers: int, num_stages: int) -> None:
    """``ValueError`` unless there is a count for each stage, and they add up."""
    if len(counts) != num_stages or sum(counts) != num_layers:
        raise ValueError(
            f"{spell_stage_layers(counts)} layers by stage are {sum(counts)} layers in {len(counts)} stages; "
            f"give {num_stages} numbers that add up to {num_layers}"
        )
