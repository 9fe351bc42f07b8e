"""Arguments that trade time for memory: recomputation without attention, chunked MLP and loss."""

from __future__ import annotations

import argparse

from helixpipe.commands.ranges import Whole
from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.layers.slices import automatic_size
from helixpipe.plan.schedules import SCHEDULES

AUTO_SIZE = "auto"
# A slice of logits exists in the model's precision and in fp32, in bf16 together three times as wide.
_COPIES_OF_LOGITS = 3


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    group = parser.add_argument_group("memory")
    add = group.add_argument
    add(
        "--recompute-without-attention",
        action=argparse.BooleanOptionalAction,
        help="keep attention's output and compute norms, QKV and the MLP's first half again "
        "(default: on for helix, else off)",
    )
    add(
        "--mlp-chunk-size",
        type=Whole(word=AUTO_SIZE),
        metavar="{N,auto}",
        help="tokens of the sequence for which norm2 and the MLP run at a time (default: all)",
    )
    add(
        "--loss-chunk-size",
        type=Whole(word=AUTO_SIZE),
        metavar="{N,auto}",
        help="tokens of the sequence whose logits exist at a time (default: all)",
    )


def memory_saving(args: argparse.Namespace) -> MemorySaving:
    """What the model is to do; needs the padded vocabulary size.

    Raises:
        ValueError: options that contradict each other or do not go with the model's implementation.
    """
    again = args.recompute_without_attention
    if again is None:
        again = SCHEDULES[args.pipeline_schedule].recomputes_by_default
    if again and args.recompute_granularity is not None:
        raise ValueError(
            f"--recompute-without-attention and --recompute-granularity {args.recompute_granularity} are two "
            "ways to do the same; leave one out"
        )
    if args.mlp_chunk_size is not None:
        if args.transformer_impl == "transformer_engine":
            raise ValueError(
                "--mlp-chunk-size needs Megatron's own linear layers; use --transformer-impl local"
            )
        if args.recompute_granularity == "selective" and "mlp" in args.recompute_modules:
            raise ValueError(
                "--mlp-chunk-size recomputes the MLP by itself; leave mlp out of --recompute-modules"
            )
    return MemorySaving(again, _mlp_chunk_size(args), _loss_chunk_size(args))


def _mlp_chunk_size(args: argparse.Namespace) -> int | None:
    width = args.ffn_hidden_size * (2 if args.swiglu else 1) // args.tensor_model_parallel_size
    return _chosen(args, args.mlp_chunk_size, width)


def _loss_chunk_size(args: argparse.Namespace) -> int | None:
    width = _COPIES_OF_LOGITS * args.padded_vocab_size // args.tensor_model_parallel_size
    return _chosen(args, args.loss_chunk_size, width)


def _chosen(args: argparse.Namespace, size: int | str | None, width: int) -> int | None:
    if not isinstance(size, str):
        return size
    parts = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return automatic_size(args.seq_length, width, args.hidden_size // parts)
