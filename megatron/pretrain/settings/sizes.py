"""Sizes that follow from the arguments: the layout of the ranks, and the model's."""

from __future__ import annotations

import argparse
import math

from megatron.pretrain.settings.experts import derive_experts
from megatron.pretrain.settings.layers import check_layers
from megatron.pretrain.settings.positions import check_positions


def derive_layout(args: argparse.Namespace) -> tuple[str, ...]:
    """Set the data-parallel size and the number of micro batches.

    Returns:
        Flags that change nothing in this layout.

    Raises:
        ValueError: sizes that do not fit together; the message says which would.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp = args.context_parallel_size
    ranks = tp * pp * cp
    if args.world_size % ranks:
        shared = f" x context-parallel size {cp}" if cp > 1 else ""
        raise ValueError(
            f"world size {args.world_size} cannot be split into tensor-parallel size {tp} x "
            f"pipeline-parallel size {pp}{shared}; start a multiple of {ranks} ranks "
            f"(torchrun --nproc-per-node {ranks})"
        )
    args.data_parallel_size = args.world_size // ranks
    step = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % step:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x data-parallel size {args.data_parallel_size}; "
            f"use {nearest(args.global_batch_size, step)}"
        )
    args.num_microbatches = args.global_batch_size // step
    # As in Megatron: one rank has the whole sequence anyway.
    needless = ("--sequence-parallel",) if args.sequence_parallel and tp == 1 else ()
    args.sequence_parallel = args.sequence_parallel and tp > 1
    _check_length(args)
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        raise ValueError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")
    return needless


def _check_length(args: argparse.Namespace) -> None:
    """Ranks that share a sequence have parts of one length, with context parallelism two of each."""
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    of_tensor = tp if args.sequence_parallel else 1
    if args.seq_length % of_tensor and cp == 1:
        raise ValueError(
            f"--seq-length {args.seq_length} must be a multiple of --tensor-model-parallel-size {tp} "
            f"with --sequence-parallel; use {nearest(args.seq_length, tp)}"
        )
    step = math.lcm(2 * cp, of_tensor * cp)
    if cp > 1 and args.seq_length % step:
        raise ValueError(
            f"--seq-length {args.seq_length} must be a multiple of {step} for --context-parallel-size {cp}"
            f"{' and --sequence-parallel' if of_tensor > 1 else ''}; use {nearest(args.seq_length, step)}"
        )


def derive_model(args: argparse.Namespace) -> None:
    """Set the sizes of the model that were left out.

    Raises:
        ValueError: sizes that do not fit together; the message says which would.
    """
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    if args.kv_channels is None:
        if args.hidden_size % heads:
            raise ValueError(
                f"--hidden-size {args.hidden_size} must be a multiple of --num-attention-heads {heads}; "
                f"use {nearest(args.hidden_size, heads)}, or give --kv-channels"
            )
        args.kv_channels = args.hidden_size // heads
    if heads % tp:
        raise ValueError(
            f"--num-attention-heads {heads} must be a multiple of --tensor-model-parallel-size {tp}; "
            f"use {nearest(heads, tp)}"
        )
    if not args.group_query_attention:
        if args.num_query_groups != 1:
            raise ValueError("--num-query-groups needs --group-query-attention")
        args.num_query_groups = heads
    if heads % args.num_query_groups:
        raise ValueError(
            f"--num-query-groups {args.num_query_groups} must divide --num-attention-heads {heads}; "
            f"use {_nearest_divisors(args.num_query_groups, heads)}"
        )
    groups = args.num_query_groups
    if groups % tp and tp % groups:
        raise ValueError(
            f"--num-query-groups {groups} must be a multiple or a divisor of "
            f"--tensor-model-parallel-size {tp}; use {_nearest_groups(groups, heads, tp)}"
        )
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = 4 * args.hidden_size
    if args.ffn_hidden_size % tp:
        raise ValueError(
            f"--ffn-hidden-size {args.ffn_hidden_size} must be a multiple of --tensor-model-parallel-size "
            f"{tp}; use {nearest(args.ffn_hidden_size, tp)}"
        )
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.seq_length > args.max_position_embeddings:
        raise ValueError(
            f"--seq-length {args.seq_length} is longer than the model's --max-position-embeddings "
            f"{args.max_position_embeddings}; use at most {args.max_position_embeddings}, or raise the other"
        )
    check_positions(args)
    check_layers(args)
    derive_experts(args)


def nearest(value: int, factor: int) -> str:
    """The multiples of ``factor`` around ``value``, for a message."""
    below = value - value % factor
    return " or ".join(str(v) for v in (below, below + factor) if v > 0)


def _nearest_divisors(value: int, of: int) -> str:
    return _around(value, [divisor for divisor in range(1, of + 1) if of % divisor == 0])


def _nearest_groups(value: int, heads: int, tp: int) -> str:
    """Key/value heads that query heads and tensor-parallel ranks can share."""
    return _around(value, [g for g in range(1, heads + 1) if heads % g == 0 and (g % tp == 0 or tp % g == 0)])


def _around(value: int, valid: list[int]) -> str:
    nearest = [v for v in valid if v < value][-1:] + [v for v in valid if v > value][:1]
    return " or ".join(map(str, nearest))
