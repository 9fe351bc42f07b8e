"""Which valid plans an execution can carry out, and for which job a plan is."""

from __future__ import annotations

from collections.abc import Sequence

from helixpipe.plan.execution import Execution
from helixpipe.plan.operation import Kind
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ATTENTION_RANGES
from helixpipe.plan.stage_layers import STAGE_LAYERS, layers_of_stages, spell_stage_layers


def check_executable(plan: Plan, execution: Execution) -> None:
    """Check a valid plan against what an execution can do.

    Raises:
        ValueError: one line that says what the execution cannot do.
    """
    if not plan.has_backward:
        raise ValueError("the plan has no backward pass; training needs one")
    if execution.has_slices:
        _check_slices(plan)
    elif plan.slices or plan.micro_batch_names:
        raise ValueError(
            "the plan cuts sequences into slices, which only schedules of slices execute; plan with one"
        )
    if execution.cuts_layers:
        _check_segments(plan)
    else:
        _check_stages(plan)
    if execution is Execution.SLICES and not stages_follow_ranks(plan):
        raise ValueError("the plan does not have stage r alone on rank r, which slices need; place it there")


def check_fits(plan: Plan, *, num_layers: int, num_ranks: int, num_microbatches: int) -> None:
    """Check a plan against the job that is to run it.

    Raises:
        ValueError: one line with both sizes.
    """
    for what, planned, wanted in (
        ("layers (--num-layers)", plan.parameters.get("num_layers"), num_layers),
        ("pipeline ranks (--pipeline-model-parallel-size)", plan.num_ranks, num_ranks),
        (
            "micro batches (--global-batch-size / --micro-batch-size / data-parallel size)",
            plan.num_sequences,
            num_microbatches,
        ),
    ):
        if planned != wanted:
            raise ValueError(f"the plan is for {planned} {what}, the job has {wanted}; make one a match")


def check_stages_fit(plan: Plan, stage_layers: Sequence[int] | None) -> None:
    """``ValueError`` unless a plan's stages have the layers that a job's have, None for all alike."""
    planned = plan.parameters.get(STAGE_LAYERS, "as many in each")
    wanted = "as many in each" if stage_layers is None else spell_stage_layers(stage_layers)
    if planned != wanted:
        raise ValueError(
            f"the plan is for layers by stage {planned}, the job has {wanted}; make one a match with "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"
        )


def stages_follow_ranks(plan: Plan) -> bool:
    """True if rank r has stage r and no other: where Megatron puts the stages of a model."""
    return [plan.owner_of(segment) for segment in range(plan.num_segments)] == list(range(plan.num_ranks))


def _check_slices(plan: Plan) -> None:
    """Every sequence in as many slices, one after the other, on stages that follow the ranks."""
    per_sequence = len(plan.slices[0]) if plan.slices else 0
    numbers = [i for group in plan.slices for i in group]
    if numbers != list(range(plan.num_microbatches)) or any(len(g) != per_sequence for g in plan.slices):
        raise ValueError(
            "the plan does not cut all sequences into as many slices, numbered one after the other; give "
            'every sequence as many in "slices"'
        )
    if plan.splits_backward:
        raise ValueError("the plan computes weight gradients apart, which slices do not; leave W out")


def _check_stages(plan: Plan) -> None:
    if plan.loans:
        raise ValueError("the plan lends weights, which whole layers do not; leave the loans out")
    ranks = [set(row) for row in plan.placement]
    for segment, row in enumerate(ranks):
        if len(row) > 1:
            raise ValueError(
                f"segment {segment} is placed on {len(row)} ranks, but its weights are on one; place all its "
                "micro batches there"
            )
    counts = {sum(rank in row for row in ranks) for rank in range(plan.num_ranks)}
    layers = layers_of_stages(plan)
    if len(counts) > 1:
        raise ValueError(
            f"{layers[-1].stop} layers in {plan.num_segments} segments on {plan.num_ranks} ranks are not "
            "shared out evenly; give every segment as many layers and every rank as many segments as the "
            "others"
        )
    if len({len(own) for own in layers}) > 1 and not stages_follow_ranks(plan):
        raise ValueError(
            "the plan has stages of different numbers of layers, which need stage r alone on rank r; place "
            "it there"
        )
    for segment in (0, plan.num_segments - 1):
        order = plan.orders[plan.owner_of(segment)]
        found = [op.micro_batch for op in order if op.segment == segment and op.kind is Kind.F]
        if found != sorted(found):
            raise ValueError(
                f"segment {segment} runs micro batches in the order {found!s:.60}, but data is read one "
                "micro batch after the other; run them from 0 up"
            )


def segments_per_layer(plan: Plan) -> int:
    """Of a plan that cuts layers: QKV that slices compute beside attention has a segment of its own."""
    return 3 if plan.slices and plan.parameters.get("attention_range") != "core" else 2


def _check_segments(plan: Plan) -> None:
    num_layers, attention_range = plan.parameters.get("num_layers"), plan.parameters.get("attention_range")
    per_layer = segments_per_layer(plan)
    if not isinstance(num_layers, int) or plan.num_segments != per_layer * num_layers + 1:
        raise ValueError(f"{num_layers} layers cut at their attention are not {plan.num_segments} segments")
    if attention_range not in ATTENTION_RANGES:
        raise ValueError(
            f'the plan\'s "attention_range" is {attention_range!r:.40}; it must be one of '
            f"{', '.join(ATTENTION_RANGES)}"
        )
    lent = {(loan.segment, i): loan.owner for loan in plan.loans for i in loan.micro_batches}
    for segment, row in enumerate(plan.placement):
        piece = segment % per_layer
        if piece == per_layer - 1 and attention_range == ("core" if per_layer == 2 else "qkv"):
            if any((segment, i) in lent for i in range(plan.num_microbatches)):
                raise ValueError(f"segment {segment}, attention alone, has no weights to lend")
            continue
        owner = plan.owner_of(segment - piece)
        for micro_batch, rank in enumerate(row):
            if lent.get((segment, micro_batch), rank) != owner:
                raise ValueError(
                    f"segment {segment} of micro batch {micro_batch} is placed on rank {rank}, its weights "
                    f"are on rank {owner}; place it there or lend them"
                )
