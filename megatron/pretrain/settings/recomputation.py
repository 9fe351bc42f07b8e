"""Arguments that trade time for memory: recomputation without attention, chunked MLP and loss."""

from __future__ import annotations

import argparse

from helixpipe.commands.ranges import Whole
from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.plan.chunk_size import automatic_size
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.cost_model.levels import parse_levels
from helixpipe.plan.schedules import SCHEDULES
from megatron.pretrain.settings.layers import GATES

AUTO_SIZE = "auto"
# What ``--recompute-granularity`` names.
BY_GRANULARITY = {"selective": Recompute.SELECTIVE, "full": Recompute.FULL}
# A slice of logits exists in the model's precision and in fp32, in bf16 together three times as wide.
_COPIES_OF_LOGITS = 3


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    group = parser.add_argument_group("memory")
    add = group.add_argument
    add(
        "--recompute-without-attention",
        action=argparse.BooleanOptionalAction,
        help="the same as --recompute-levels without-attention; --no-…: as --recompute-levels none",
    )
    add(
        "--recompute-levels",
        metavar="LEVEL[:LAYERS,LEVEL:LAYERS…]",
        help="what backward passes compute again. products: norms, rotary positions, activation functions; "
        "without-attention: QKV and the MLP's first product, too; none. For all layers, or for so many each, "
        "from the first on, like products:20,none:12 (default: without-attention for helix, else none)",
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
    levels = job_levels(args)
    if levels is not Recompute.NONE and args.recompute_granularity is not None:
        flag = "--recompute-levels" if args.recompute_levels else "--recompute-without-attention"
        raise ValueError(
            f"{flag} and --recompute-granularity {args.recompute_granularity} are two ways to do the same; "
            "leave one out"
        )
    if args.mlp_chunk_size is not None:
        if args.transformer_impl == "transformer_engine":
            raise ValueError(
                "--mlp-chunk-size needs Megatron's own linear layers; use --transformer-impl local"
            )
        again = {"mlp", "moe"}.intersection(args.recompute_modules)
        if args.recompute_granularity == "selective" and again:
            raise ValueError(
                f"--mlp-chunk-size recomputes the MLP by itself; leave {again.pop()} out of "
                "--recompute-modules"
            )
    return MemorySaving(levels, mlp_chunk_size(args), _loss_chunk_size(args))


def job_levels(args: argparse.Namespace) -> Recompute | tuple[Recompute, ...]:
    """What layers compute again, all or each: as asked for, else by the schedule's default."""
    levels = asked_levels(args)
    if levels is None:
        by_default = SCHEDULES[args.pipeline_schedule].recomputes_by_default
        levels = Recompute.WITHOUT_ATTENTION if by_default else Recompute.NONE
    return levels


def asked_levels(args: argparse.Namespace) -> Recompute | tuple[Recompute, ...] | None:
    """What layers shall compute again, all or each; None without a word.

    Raises:
        ValueError: a level that is unknown, or layers that are not those of the model.
    """
    text, again = args.recompute_levels, args.recompute_without_attention
    if text is None:
        return None if again is None else Recompute.WITHOUT_ATTENTION if again else Recompute.NONE
    if again is not None:
        raise ValueError("--recompute-levels says what --recompute-without-attention says; leave one out")
    try:
        return parse_levels(text, args.num_layers)
    except ValueError as error:
        raise ValueError(f"--recompute-levels {error}") from None


def mlp_chunk_size(args: argparse.Namespace) -> int | None:
    """Tokens of the sequence for which norm2 and MLP run at a time; None for all."""
    is_gated = any(getattr(args, gate) for gate in GATES)
    width = args.ffn_hidden_size * (2 if is_gated else 1) // args.tensor_model_parallel_size
    return _chosen(args, args.mlp_chunk_size, width)


def _loss_chunk_size(args: argparse.Namespace) -> int | None:
    width = _COPIES_OF_LOGITS * args.padded_vocab_size // args.tensor_model_parallel_size
    return _chosen(args, args.loss_chunk_size, width)


def _chosen(args: argparse.Namespace, size: int | str | None, width: int) -> int | None:
    if not isinstance(size, str):
        return size
    parts = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return automatic_size(args.seq_length, width, args.hidden_size // parts)
