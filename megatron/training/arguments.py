"""Command-line arguments, with Megatron's names, and the checks that need no process group."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from helixpipe.commands.parser import Parser, flag_of, require_positive
from helixpipe.megatron_adapter.schedule import ELASTIC, EXECUTABLE, make_schedule
from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.attention_range import AttentionSizes, cheapest_range
from helixpipe.plan.schedules import V_SHAPED
from helixpipe.plan.schedules.helix import DEFAULT_FOLD
from helixpipe.plan.schedules.request import ATTENTION_RANGES, HEAD_PLACEMENTS
from helixpipe.runtime.trace import NullClock
from megatron.training.auto import AUTO, choose_schedule
from megatron.training.data.gpt import check_split
from megatron.training.data.prefix import DatasetInfo, check_token_ids, inspect_prefix
from megatron.training.elastic import add_elastic_arguments, derive_elastic
from megatron.training.memory import add_memory_arguments, memory_saving


def parse_arguments(
    command_line: Sequence[str] | None = None, dataset: DatasetInfo | None = None
) -> argparse.Namespace:
    """Parse and check the arguments, and derive the sizes that follow from them.

    The world size is taken from ``WORLD_SIZE``, as torchrun sets it. No process group is needed, and none
    is built before everything here has been found to fit.

    Args:
        command_line: arguments without the program's name; ``sys.argv`` if None.
        dataset: stands in for the files of ``--data-path``, for programs that make up their data.

    Raises:
        ValueError: one line that names the argument, its value and what to use instead.
    """
    args = build_parser().parse_args(command_line)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.rank = int(os.environ.get("RANK", "0"))
    _derive_layout(args)
    _derive_model(args)
    _check_training(args)
    args.dataset, args.choice = dataset, None
    if args.pipeline_schedule == AUTO:
        args.dataset = dataset or _inspect_data(args)
        args.padded_vocab_size = _pad_vocabulary(args)
        args.choice = choose_schedule(args)
    _check_schedule(args)
    derive_elastic(args)
    _check_recompute(args)
    if args.attention_range == AUTO:
        args.attention_range = _choose_range(args)
    args.schedule_request = _schedule_request(args)
    # Refuses what cannot be executed, and every combination of sizes that the schedule cannot run.
    make_schedule(args.pipeline_schedule, args.schedule_request, NullClock())
    _check_split_backward(args)
    args.dataset = args.dataset or _inspect_data(args)
    args.padded_vocab_size = _pad_vocabulary(args)
    args.memory_saving = memory_saving(args)
    _make_output_folders(args)
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser alone."""
    parser = Parser(prog="pretrain_gpt.py", description="Pre-train a GPT under a pipeline schedule.")
    _add_schedule_arguments(parser)
    _add_model_arguments(parser)
    add_memory_arguments(parser)
    add_elastic_arguments(parser)
    _add_training_arguments(parser)
    _add_data_arguments(parser)
    _add_output_arguments(parser)
    return parser


def _add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallelism and schedule")
    add = group.add_argument
    add(
        "--pipeline-schedule",
        default="1f1b",
        metavar="{" + ",".join((AUTO, *EXECUTABLE, ELASTIC)) + "}",
        help="auto: the fastest that fits, as python -m helixpipe advise predicts",
    )
    add("--hardware", help="auto: h20, h100, h200, a800, a file of rates or a profile (default: this GPU)")
    add(
        "--memory-limit-gib",
        type=float,
        help="of one GPU: elastic and auto stay below it, the others warn close to it (default: all that the "
        "GPU has; auto: the hardware's less 4 GiB)",
    )
    add("--num-fold", type=int, help="helix: micro batches per slot (default 2)")
    add(
        "--attention-range",
        metavar="{" + ",".join((*ATTENTION_RANGES, AUTO)) + "}",
        help="helix: pieces that the attention rank runs: attention alone, norm1 to attention, norm1 to the "
        "projection (default core; auto: the range with the smallest messages)",
    )
    add(
        "--head-placement",
        metavar="{" + ",".join(HEAD_PLACEMENTS) + "}",
        help="helix: ranks that run the head and the loss (default first, with the weights; spread: all)",
    )
    add("--tensor-model-parallel-size", type=int, default=1)
    add("--pipeline-model-parallel-size", type=int, default=1)
    add("--num-layers-per-virtual-pipeline-stage", type=int, help="interleaved: layers per model chunk")
    add("--sequence-parallel", action="store_true")
    add("--use-distributed-optimizer", action="store_true")
    add("--overlap-grad-reduce", action="store_true")
    add("--overlap-param-gather", action="store_true")
    add("--recompute-granularity", choices=("selective", "full"), help="not for helix")
    add("--recompute-method", choices=("uniform", "block"))
    add("--recompute-num-layers", type=int)
    add(
        "--recompute-modules",
        nargs="+",
        choices=("core_attn", "mlp"),
        default=["core_attn"],
        help="for --recompute-granularity selective (default: core_attn)",
    )
    add("--distributed-timeout-minutes", type=int, default=10)
    add(
        "--hang-timeout-s",
        type=float,
        metavar="S",
        help="longest wait or operation before the job ends as hung; 0: no limit (default: 3 x the median of "
        "the phase, at least 5 s in a step and 60 s elsewhere; --distributed-timeout-minutes the first time)",
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--transformer-impl", choices=("local", "transformer_engine"), help="default: what is installed")
    add("--num-layers", type=int, required=True)
    add("--hidden-size", type=int, required=True)
    add("--ffn-hidden-size", type=int)
    add("--num-attention-heads", type=int, required=True)
    add("--kv-channels", type=int)
    add("--group-query-attention", action="store_true")
    add("--num-query-groups", type=int, default=1)
    add("--seq-length", type=int, required=True)
    add("--max-position-embeddings", type=int, help="default: the sequence length")
    add("--position-embedding-type", choices=("learned_absolute", "rope", "none"), default="learned_absolute")
    add("--rotary-base", type=int, default=10000)
    add("--rotary-percent", type=float, default=1.0)
    add("--rotary-seq-len-interpolation-factor", type=float)
    add("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    add("--norm-epsilon", type=float, default=1e-5)
    add("--swiglu", action="store_true")
    add("--qk-layernorm", action="store_true")
    add("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    add("--add-qkv-bias", action="store_true")
    add("--untie-embeddings-and-output-weights", action="store_true")
    add("--make-vocab-size-divisible-by", type=int, default=128)
    add("--attention-dropout", type=float, default=0.0, help="only 0: the flash kernels have none")
    add("--hidden-dropout", type=float, default=0.0)
    add("--init-method-std", type=float, default=0.02)


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--micro-batch-size", type=int, required=True)
    add("--global-batch-size", type=int, required=True)
    add("--train-iters", type=int, required=True)
    add("--optimizer", choices=("adam", "sgd"), default="adam")
    add("--lr", type=float, required=True)
    add("--min-lr", type=float, default=0.0)
    add("--lr-decay-style", choices=("constant", "linear", "cosine", "inverse-square-root"), default="linear")
    add("--lr-decay-iters", type=int, help="default: --train-iters")
    add("--lr-warmup-iters", type=int, default=0)
    add("--weight-decay", type=float, default=0.01)
    add("--clip-grad", type=float, default=1.0)
    add("--adam-beta1", type=float, default=0.9)
    add("--adam-beta2", type=float, default=0.999)
    add("--adam-eps", type=float, default=1e-8)
    add("--sgd-momentum", type=float, default=0.9)
    add("--bf16", action="store_true", help="bfloat16 weights, fp32 gradients and optimizer; default fp32")
    add("--calculate-per-token-loss", action="store_true")
    add("--seed", type=int, default=1234)
    add(
        "--check-gradients-every",
        type=int,
        metavar="N",
        help="compare gradients and weights of data-parallel ranks every so many iterations",
    )
    add("--eval-interval", type=int, default=1000)
    add("--eval-iters", type=int, default=0)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-path", required=True, metavar="PREFIX", help="as tools/prepare_data.py wrote it")
    add("--split", default="969,30,1", help="documents for training, validation, test")
    add("--data-cache-path", type=Path, help="default: the folder cache beside the data")
    add("--num-workers", type=int, default=0, help="processes that read ahead")
    add("--eod-mask-loss", action="store_true", help="no loss at ends of documents")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--log-interval", type=int, default=1)
    add("--metrics-jsonl", type=Path, metavar="PATH", help="one JSON object per iteration")
    add("--trace-dir", type=Path, metavar="DIR", help="the measured timeline of every iteration")
    add(
        "--failure-dir",
        type=Path,
        metavar="DIR",
        help="stacks after a hang (default: DIR/failures of --save)",
    )
    add("--save", type=Path, metavar="DIR")
    add("--save-interval", type=int, help="also save every so many iterations, not only at the end")
    add("--keep-checkpoints", type=int, metavar="N", help="of --save: only the last N (default: all)")
    add("--async-save", action="store_true", help="write checkpoints while training goes on")
    add(
        "--on-save-failure",
        choices=("stop", "continue"),
        default="stop",
        help="a full disk: stop (default), or train on with the checkpoints before it; the last save must "
        "succeed",
    )
    add("--load", type=Path, metavar="DIR", help="go on from the latest checkpoint there")
    add("--load-fallback", action="store_true", help="from an older one if the latest is damaged")


def _derive_layout(args: argparse.Namespace) -> None:
    require_positive(
        args,
        (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers", "hidden_size",
            "num_attention_heads", "num_query_groups", "seq_length", "micro_batch_size", "global_batch_size",
            "train_iters", "make_vocab_size_divisible_by", "log_interval", "eval_interval",
            "ffn_hidden_size", "kv_channels", "max_position_embeddings",
            "num_layers_per_virtual_pipeline_stage", "recompute_num_layers", "distributed_timeout_minutes",
            "save_interval", "keep_checkpoints", "num_fold", "check_gradients_every", "max_seq_length",
        ),
    )  # fmt: skip
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (tp * pp):
        raise ValueError(
            f"world size {args.world_size} cannot be split into tensor-parallel size {tp} x "
            f"pipeline-parallel size {pp}; start a multiple of {tp * pp} ranks "
            f"(torchrun --nproc-per-node {tp * pp})"
        )
    args.data_parallel_size = args.world_size // (tp * pp)
    step = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % step:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x data-parallel size {args.data_parallel_size}; "
            f"use {_nearest(args.global_batch_size, step)}"
        )
    args.num_microbatches = args.global_batch_size // step
    if args.sequence_parallel and tp == 1:
        raise ValueError("--sequence-parallel needs --tensor-model-parallel-size of 2 or more")
    if args.sequence_parallel and args.seq_length % tp:
        raise ValueError(
            f"--seq-length {args.seq_length} must be a multiple of --tensor-model-parallel-size {tp} "
            f"with --sequence-parallel; use {_nearest(args.seq_length, tp)}"
        )
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        raise ValueError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")


def _derive_model(args: argparse.Namespace) -> None:
    heads, tp = args.num_attention_heads, args.tensor_model_parallel_size
    if args.kv_channels is None:
        if args.hidden_size % heads:
            raise ValueError(
                f"--hidden-size {args.hidden_size} must be a multiple of --num-attention-heads {heads}; "
                f"use {_nearest(args.hidden_size, heads)}, or give --kv-channels"
            )
        args.kv_channels = args.hidden_size // heads
    if heads % tp:
        raise ValueError(
            f"--num-attention-heads {heads} must be a multiple of --tensor-model-parallel-size {tp}; "
            f"use {_nearest(heads, tp)}"
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
            f"{tp}; use {_nearest(args.ffn_hidden_size, tp)}"
        )
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.seq_length > args.max_position_embeddings:
        raise ValueError(
            f"--seq-length {args.seq_length} is longer than the model's --max-position-embeddings "
            f"{args.max_position_embeddings}; use at most {args.max_position_embeddings}, or raise the other"
        )
    if args.attention_dropout:
        raise ValueError(
            f"--attention-dropout {args.attention_dropout} is not supported by the flash kernels; use 0"
        )
    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float32


def _check_training(args: argparse.Namespace) -> None:
    for name in (
        "lr", "min_lr", "weight_decay", "clip_grad", "lr_warmup_iters", "eval_iters", "num_workers", "seed",
    ):  # fmt: skip
        # Written so that NaN is refused, too.
        if not getattr(args, name) >= 0:
            raise ValueError(f"{flag_of(name)} must be 0 or more, not {getattr(args, name)}")
    if args.hang_timeout_s is not None and not args.hang_timeout_s >= 0:
        raise ValueError(f"--hang-timeout-s must be 0 or more, not {args.hang_timeout_s}; 0 means no limit")
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters
    if args.lr_warmup_iters >= args.lr_decay_iters:
        raise ValueError(
            f"--lr-warmup-iters {args.lr_warmup_iters} must be smaller than --lr-decay-iters "
            f"{args.lr_decay_iters}; use at most {args.lr_decay_iters - 1}"
        )
    if args.min_lr > args.lr:
        raise ValueError(f"--min-lr {args.min_lr} is above --lr {args.lr}; use at most that")
    for name in ("save_interval", "keep_checkpoints"):
        if getattr(args, name) is not None and args.save is None:
            raise ValueError(f"{flag_of(name)} {getattr(args, name)} needs --save DIR")
    if args.check_gradients_every is not None and args.data_parallel_size == 1:
        raise ValueError(
            f"--check-gradients-every {args.check_gradients_every} compares data-parallel ranks, and there "
            "is only one; leave it out"
        )
    for name, default in (("async_save", False), ("on_save_failure", "stop")):
        if getattr(args, name) != default and args.save is None:
            raise ValueError(f"{flag_of(name)} needs --save DIR")
    if args.load_fallback and args.load is None:
        raise ValueError("--load-fallback needs --load DIR")
    if args.optimizer == "sgd" and (args.use_distributed_optimizer or args.save or args.load):
        raise ValueError(
            "--optimizer sgd has no form for checkpoints and shards; use adam, or leave out --save, --load "
            "and --use-distributed-optimizer"
        )


def _check_schedule(args: argparse.Namespace) -> None:
    if args.choice is None and args.hardware is not None:
        raise ValueError("--hardware is for --pipeline-schedule auto; leave it out")
    if args.memory_limit_gib is not None and not args.memory_limit_gib > 0:
        raise ValueError(f"--memory-limit-gib must be above 0, not {args.memory_limit_gib:g}")
    if args.pipeline_schedule == "helix" and args.recompute_granularity is not None:
        raise ValueError(
            "helix recomputes by --recompute-without-attention; leave --recompute-granularity out or use 1f1b"
        )
    if args.pipeline_schedule in V_SHAPED and not args.untie_embeddings_and_output_weights:
        raise ValueError(
            f"{args.pipeline_schedule} has two stages per rank and needs separate weights for embedding and "
            "head; add --untie-embeddings-and-output-weights"
        )


def _choose_range(args: argparse.Namespace) -> str:
    """The attention range with the smallest messages between two GPUs."""
    tp, groups = args.tensor_model_parallel_size, args.num_query_groups
    tokens = args.micro_batch_size * args.seq_length
    sizes = AttentionSizes(
        tokens=tokens,
        residual_tokens=tokens // tp if args.sequence_parallel else tokens,
        hidden_size=args.hidden_size,
        query_size=args.num_attention_heads // tp * args.kv_channels,
        kv_size=max(groups // tp, 1) * args.kv_channels,
        element_bytes=args.params_dtype.itemsize,
        # As the model is wrapped: gradients are added up in fp32.
        gradient_bytes=torch.float32.itemsize,
    )
    return cheapest_range(sizes, args.num_fold or DEFAULT_FOLD)


def _check_recompute(args: argparse.Namespace) -> None:
    if args.recompute_granularity == "selective" and "mlp" in args.recompute_modules and args.add_bias_linear:
        # Megatron's checkpoint takes the bias that its MLP returns for its own output, and recurses for ever.
        raise ValueError("--recompute-modules mlp needs --disable-bias-linear")
    if args.recompute_granularity == "full" and None in (args.recompute_method, args.recompute_num_layers):
        raise ValueError("--recompute-granularity full needs --recompute-method and --recompute-num-layers")
    if args.recompute_granularity != "full" and (args.recompute_method or args.recompute_num_layers):
        raise ValueError("--recompute-method and --recompute-num-layers need --recompute-granularity full")


def _schedule_request(args: argparse.Namespace) -> ScheduleRequest:
    per_chunk = args.num_layers_per_virtual_pipeline_stage
    args.virtual_stages = None
    if per_chunk is not None:
        if args.pipeline_schedule != "interleaved":
            raise ValueError("--num-layers-per-virtual-pipeline-stage is for --pipeline-schedule interleaved")
        step = args.pipeline_model_parallel_size * per_chunk
        args.virtual_stages, rest = divmod(args.num_layers, step)
        if rest:
            raise ValueError(
                f"--num-layers {args.num_layers} must be a multiple of --pipeline-model-parallel-size x "
                f"--num-layers-per-virtual-pipeline-stage ({args.pipeline_model_parallel_size} x "
                f"{per_chunk}); use {_nearest(args.num_layers, step)}"
            )
    has_chunks = args.virtual_stages is not None and args.virtual_stages > 1
    if args.pipeline_schedule == "interleaved" and not (has_chunks and args.pipeline_model_parallel_size > 1):
        raise ValueError(
            "interleaved needs two or more pipeline ranks and model chunks per rank; set "
            "--num-layers-per-virtual-pipeline-stage below --num-layers / --pipeline-model-parallel-size"
        )
    return ScheduleRequest(
        num_layers=args.num_layers,
        num_ranks=args.pipeline_model_parallel_size,
        num_microbatches=args.num_microbatches,
        num_fold=args.num_fold,
        virtual_stages=args.virtual_stages,
        attention_range=args.attention_range,
        head_placement=args.head_placement,
    )


def _check_split_backward(args: argparse.Namespace) -> None:
    if args.pipeline_schedule == ELASTIC:
        return
    plan = build_plan(args.pipeline_schedule, args.schedule_request)
    if plan.splits_backward and args.transformer_impl == "transformer_engine":
        raise ValueError(
            f"{args.pipeline_schedule} computes weight gradients apart, which --transformer-impl "
            "transformer_engine cannot; use local, or another schedule"
        )


def _inspect_data(args: argparse.Namespace) -> DatasetInfo:
    info = inspect_prefix(args.data_path)
    check_token_ids(args.data_path, info)
    parts = args.split.split(",")
    # Megatron finds the numbers by their digits and points: 1e3 would be two of them.
    is_plain = all(re.fullmatch(r" *([0-9]+\.?[0-9]*|\.[0-9]+) *", part) for part in parts)
    if len(parts) != 3 or not is_plain or float(parts[0]) == 0:
        raise ValueError(
            f"--split {args.split!r} must be three weights for train, valid, test, like 969,30,1"
        )
    if args.pipeline_schedule != ELASTIC and info.has_prompts:
        raise ValueError(
            f"{args.data_path} has prompts, on which there must be no loss, but --pipeline-schedule "
            f"{args.pipeline_schedule} joins documents and would learn them; use elastic, or prepare the "
            "data without --prompt-key"
        )
    if args.pipeline_schedule != ELASTIC and info.num_tokens <= args.seq_length:
        raise ValueError(
            f"{args.data_path} holds {info.num_tokens} tokens, not even one sequence of --seq-length "
            f"{args.seq_length}; prepare more text or use at most {info.num_tokens - 1}"
        )
    check_split(args.split, info, with_validation=args.eval_iters > 0)
    return info


def _make_output_folders(args: argparse.Namespace) -> None:
    """Found out now, and not when the first checkpoint is due."""
    metrics_folder = None if args.metrics_jsonl is None else args.metrics_jsonl.parent
    for flag, folder in (
        ("--save", args.save),
        ("--trace-dir", args.trace_dir),
        ("--metrics-jsonl", metrics_folder),
    ):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Tells of a read-only file system, too.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{flag}: cannot write to the folder {folder} ({error.strerror}); give another path"
            ) from error


def _pad_vocabulary(args: argparse.Namespace) -> int:
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-args.dataset.vocab_size // multiple) * multiple


def _nearest(value: int, factor: int) -> str:
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
