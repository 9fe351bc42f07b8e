"""What a schedule is asked for, and the helpers that stage-based schedules share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from helixpipe.plan.operation import Operation
from helixpipe.plan.plan import Parameter, Plan
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.stage_layers import STAGE_LAYERS, check_stage_layers, spell_stage_layers

ATTENTION_RANGES = ("core", "qkv", "block")
HEAD_PLACEMENTS = ("first", "spread")
ROUND_ORDERS = ("filo", "interlocked")
# Layers x micro batches: a larger plan is a slip of the keyboard, and would take minutes to find out.
MAX_CELLS = 1 << 20


@dataclass(frozen=True, eq=False)
class KnownCosts:
    """What an order may be fitted to. Ranks that compute their plans apart need the same.

    Attributes:
        of: the costs of a plan whose orders do not matter.
        memory_limit_bytes: what a rank may hold; no limit if None.
    """

    of: Callable[[Plan], Costs]
    memory_limit_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScheduleRequest:
    """Arguments of a schedule. An optional argument left at None takes the schedule's default.

    Attributes:
        num_layers: transformer layers L.
        num_ranks: pipeline-parallel size p.
        num_microbatches: micro batches m per data-parallel replica and iteration.
        num_fold: helix: micro batches that share a slot (2 hides every message behind compute).
        virtual_stages: interleaved: model chunks per rank.
        attention_range: helix: pieces that the attention rank runs: ``core``, ``qkv`` (norm1, QKV, core) or
            ``block`` (norm1 to proj).
        head_placement: helix: the last segment of every slot on the ``first`` rank, or ``spread`` over all.
        num_slices: seq1f1b: slices of each sequence, which is a micro batch of the request.
        round_order: helix: rounds one after the other (``filo``), or the forwards of one among the backwards
            of the one before (``interlocked``).
        split_weight_gradients: helix, interlocked: weight gradients are operations of their own (W), which
            fill gaps.
        costs: helix, interlocked: what to fit the order to.
        resend_context: sliced-helix: keys and values of earlier slices are dropped after the forward pass and
            lent again for the backward pass.
        microbatch_group: interleaved: micro batches that go through a model chunk before the next one's turn.
        stage_layers: 1f1b, gpipe, zb-h1: layers of each stage, where they differ.
        layer_kinds: helix: a name for each layer where layers differ in cost, which segments then carry.
    """

    num_layers: int
    num_ranks: int
    num_microbatches: int
    num_fold: int | None = None
    virtual_stages: int | None = None
    attention_range: str | None = None
    num_slices: int | None = None
    head_placement: str | None = None
    round_order: str | None = None
    split_weight_gradients: bool | None = None
    costs: KnownCosts | None = None
    layer_kinds: tuple[str, ...] | None = None
    resend_context: bool | None = None
    stage_layers: tuple[int, ...] | None = None
    microbatch_group: int | None = None

    def __post_init__(self) -> None:
        named = {
            "number of layers": self.num_layers,
            "pipeline-parallel size": self.num_ranks,
            "number of micro batches": self.num_microbatches,
            "fold": 1 if self.num_fold is None else self.num_fold,
            "number of virtual stages": 1 if self.virtual_stages is None else self.virtual_stages,
            "size of a group of micro batches": 1 if self.microbatch_group is None else self.microbatch_group,
            "number of slices": 1 if self.num_slices is None else self.num_slices,
        }
        for name, value in named.items():
            if value < 1:
                raise ValueError(f"the {name} must be at least 1, not {value}")
        pieces = self.num_microbatches * (self.num_slices or 1)
        if self.num_layers * pieces > MAX_CELLS:
            raise ValueError(
                f"layers ({self.num_layers}) times micro batches ({pieces}) must be at most {MAX_CELLS}; "
                f"use at most {MAX_CELLS // pieces} layers or {MAX_CELLS // self.num_layers} micro batches"
            )
        if self.layer_kinds is not None:
            self._check_kinds(self.layer_kinds)
        for what, choice, choices in (
            ("attention range", self.attention_range, ATTENTION_RANGES),
            ("head placement", self.head_placement, HEAD_PLACEMENTS),
            ("round order", self.round_order, ROUND_ORDERS),
        ):
            if choice not in (None, *choices):
                raise ValueError(f"unknown {what} {choice!r}; choose one of {', '.join(choices)}")

    def _check_kinds(self, kinds: tuple[str, ...]) -> None:
        if len(kinds) != self.num_layers:
            raise ValueError(f"{len(kinds)} kinds of layers for {self.num_layers} layers; give one for each")
        for kind in kinds:
            if not re.fullmatch(r"[a-z0-9-]+", kind):
                raise ValueError(f"kind of layer {kind!r} must be of small letters, digits and dashes")


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
    *,
    stage_ranks: Sequence[int] = (),
    parameters: Mapping[str, Parameter] | None = None,
) -> Plan:
    """A plan whose segments are stages of consecutive layers.

    Args:
        name: of the schedule.
        request: its arguments.
        orders: of every rank.
        stage_ranks: the rank of each stage; one stage per rank if left out.
        parameters: options to record beside the number of layers.
    """
    stage_ranks = stage_ranks or range(request.num_ranks)
    of_what = "the pipeline-parallel size"
    if len(stage_ranks) > request.num_ranks:
        of_what += " times the virtual stages per rank"
    more = dict(parameters or {})
    if request.stage_layers is None:
        require_multiple(request.num_layers, len(stage_ranks), "the number of layers", of_what)
    else:
        check_stage_layers(request.stage_layers, request.num_layers, len(stage_ranks))
        more[STAGE_LAYERS] = spell_stage_layers(request.stage_layers)
    return Plan(
        schedule=name,
        num_ranks=request.num_ranks,
        num_microbatches=request.num_microbatches,
        segment_names=tuple(f"stage{s}" for s in range(len(stage_ranks))),
        placement=tuple((rank,) * request.num_microbatches for rank in stage_ranks),
        orders=tuple(tuple(order) for order in orders),
        parameters={"num_layers": request.num_layers, **more},
    )
