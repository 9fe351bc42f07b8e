"""What a job asks for that not every schedule has, whether it is named or to be chosen.

Every check raises ``ValueError`` with one line that names the option and what to use instead.
"""

from __future__ import annotations

import argparse

from helixpipe.layers.attention.choice import UNFUSED
from helixpipe.layers.spec import ranges_with_sinks
from helixpipe.plan.execution import Execution
from helixpipe.plan.schedules.helix import DEFAULT_ATTENTION_RANGE
from megatron.pretrain.settings.experts import check_experts_under


def check_execution(args: argparse.Namespace, execution: Execution | None) -> None:
    """Attention, documents and experts that an execution does not have."""
    _check_attention(args, execution)
    check_documents(args, execution)
    check_experts_under(args, execution)


def _check_attention(args: argparse.Namespace, execution: Execution | None) -> None:
    if execution is None or not execution.cuts_sequences:
        return
    if args.attention_dropout or args.attention_backend in UNFUSED:
        flag = (
            "--attention-dropout"
            if args.attention_dropout
            else f"--attention-backend {args.attention_backend}"
        )
        raise ValueError(
            f"{flag} does not go with {args.pipeline_schedule}, whose attention runs by parts of sequences; "
            "use --attention-dropout 0 and another --attention-backend"
        )


def check_documents(args: argparse.Namespace, execution: Execution | None) -> None:
    """Attention that ends at documents, over slices of several sequences, whose documents end elsewhere."""
    is_sliced = execution is not None and execution.has_slices
    if is_sliced and args.reset_attention_mask and args.micro_batch_size > 1:
        raise ValueError(
            f"--reset-attention-mask with {args.pipeline_schedule} needs --micro-batch-size 1, not "
            f"{args.micro_batch_size}"
        )


def check_sinks(args: argparse.Namespace, execution: Execution | None, attention_range: str | None) -> None:
    """Learned sinks, which some attention ranges lend where a layer is cut at its attention."""
    if args.softmax_type != "learnable" or execution is None or not execution.cuts_layers:
        return
    found = attention_range or DEFAULT_ATTENTION_RANGE
    lending = ranges_with_sinks(has_slices=execution.cuts_sequences)
    if found not in lending:
        raise ValueError(
            f"--softmax-type learnable under {args.pipeline_schedule} needs --attention-range "
            f"{' or '.join(lending)}, which lends sinks, not {found}"
        )


def check_weight_gradients(args: argparse.Namespace, *, splits_backward: bool) -> None:
    """Weight gradients apart, which Megatron's own linear layers alone can leave for later."""
    if splits_backward and args.transformer_impl == "transformer_engine":
        raise ValueError(
            f"{args.pipeline_schedule} computes weight gradients apart, which --transformer-impl "
            "transformer_engine cannot; use local, or another schedule"
        )
