"""What a schedule is asked for, and the helpers that stage-based schedules share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from helixpipe.plan.operation import Operation
from helixpipe.plan.plan import Plan

ATTENTION_RANGES = ("core", "qkv", "block")


@dataclass(frozen=True, kw_only=True)
class ScheduleRequest:
    """Arguments of a schedule. An optional argument left at None takes the schedule's default.

    Attributes:
        num_layers: transformer layers L.
        num_ranks: pipeline-parallel size p.
        num_microbatches: micro batches m per data-parallel replica and iteration.
        num_fold: helix: micro batches that share a slot (2 hides every message behind compute).
        virtual_stages: interleaved: model chunks per rank.
        attention_range: helix: pieces that the attention rank runs, ``core``, ``qkv`` or ``block``.
    """

    num_layers: int
    num_ranks: int
    num_microbatches: int
    num_fold: int | None = None
    virtual_stages: int | None = None
    attention_range: str | None = None

    def __post_init__(self) -> None:
        named = {
            "number of layers": self.num_layers,
            "pipeline-parallel size": self.num_ranks,
            "number of micro batches": self.num_microbatches,
            "fold": 1 if self.num_fold is None else self.num_fold,
            "number of virtual stages": 1 if self.virtual_stages is None else self.virtual_stages,
        }
        for name, value in named.items():
            if value < 1:
                raise ValueError(f"the {name} must be at least 1, not {value}")
        if self.attention_range not in (None, *ATTENTION_RANGES):
            raise ValueError(
                f"unknown attention range {self.attention_range!r}; "
                f"choose one of {', '.join(ATTENTION_RANGES)}"
            )


def require_multiple(value: int, factor: int, what: str, of_what: str) -> None:
    """``ValueError`` that names the nearest valid values unless ``value`` is a multiple of ``factor``."""
    if value % factor:
        below = value - value % factor
        nearest = " or ".join(str(v) for v in (below, below + factor) if v > 0)
        raise ValueError(f"{what} ({value}) must be a multiple of {of_what} ({factor}); use {nearest}")


def stage_plan(
    name: str,
    request: ScheduleRequest,
    orders: Iterable[Iterable[Operation]],
    virtual_stages: int = 1,
) -> Plan:
    """A plan whose segment ``s`` is a stage of consecutive layers on rank ``s mod p``."""
    p, num_stages = request.num_ranks, request.num_ranks * virtual_stages
    of_what = "the pipeline-parallel size"
    if virtual_stages > 1:
        of_what += " times the virtual stages per rank"
    require_multiple(request.num_layers, num_stages, "the number of layers", of_what)
    parameters = {"num_layers": request.num_layers}
    if virtual_stages > 1:
        parameters["virtual_stages"] = virtual_stages
    return Plan(
        schedule=name,
        num_ranks=p,
        num_microbatches=request.num_microbatches,
        segment_names=tuple(f"stage{s}" for s in range(num_stages)),
        placement=tuple((s % p,) * request.num_microbatches for s in range(num_stages)),
        orders=tuple(tuple(order) for order in orders),
        parameters=parameters,
    )
