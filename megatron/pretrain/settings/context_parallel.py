"""What goes with ``--context-parallel-size``, whose ranks share every sequence."""

from __future__ import annotations

import argparse

from helixpipe.layers.attention.choice import UNFUSED
from helixpipe.plan.execution import Execution
from helixpipe.refusals import refuse
from megatron.pretrain.settings.schedule import AUTO


def check_shared_sequences(args: argparse.Namespace, execution: Execution | None, *, is_chosen: bool) -> None:
    """``ValueError`` for what attention over a context group does not have, or has costs that are not known.

    Args:
        args: parsed, with the schedule that was asked for or chosen.
        execution: of the schedule.
        is_chosen: the schedule was left to us.
    """
    size = args.context_parallel_size
    if size == 1:
        return
    unsupported = {
        f"--pipeline-schedule {args.pipeline_schedule}, which cuts sequences itself,": (
            execution is not None and execution.cuts_sequences
        ),
        f"--attention-backend {args.attention_backend}": args.attention_backend in UNFUSED,
        "--window-size": args.window_size is not None,
        "--attn-logit-softcapping": args.attn_logit_softcapping is not None,
        f"--softmax-type {args.softmax_type}": args.softmax_type != "vanilla",
        "--reset-attention-mask": args.reset_attention_mask,
        "--eod-mask-loss without --calculate-per-token-loss": (
            args.eod_mask_loss and not args.calculate_per_token_loss
        ),
        f"--attention-range {AUTO}": args.attention_range == AUTO,
        f"--pipeline-schedule {AUTO}": is_chosen,
    }
    refuse(unsupported, f"{{}} does not go with --context-parallel-size {size}; leave one out")
    if args.attention_dropout:
        # Perhaps by default.
        raise ValueError(
            f"--attention-dropout {args.attention_dropout:g} does not go with --context-parallel-size "
            f"{size}; use --attention-dropout 0"
        )
