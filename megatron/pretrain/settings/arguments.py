"""Command-line arguments, with Megatron's names, and the checks that need no process group."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from helixpipe.commands.parser import flag_of
from helixpipe.commands.tokenizer_arguments import tokenizer_settings
from helixpipe.data.corpus_record import checked_corpus
from helixpipe.data.prefix import DatasetInfo, describe_prefix
from helixpipe.data.text_tokenizers import TokenizerSettings
from helixpipe.elastic.search.choice import SCHEDULES as FAMILIES
from helixpipe.layers.spec import Implementation, check_implementation
from helixpipe.plan.build import find_schedule
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.execution import Execution
from helixpipe.plan.schedules import Schedule
from megatron.pretrain.checkpoint.comparison import changeable
from megatron.pretrain.checkpoint.files import is_same_folder
from megatron.pretrain.data.gpt import check_split
from megatron.pretrain.data.mock import describe_mock
from megatron.pretrain.settings.context_parallel import check_shared_sequences
from megatron.pretrain.settings.data_sources import Blend, Corpora, choose_blend, summary_of
from megatron.pretrain.settings.elastic_choice import choose_elastic
from megatron.pretrain.settings.elastic_job import ELASTIC_AUTO, derive_elastic
from megatron.pretrain.settings.ending import ending_of
from megatron.pretrain.settings.experts import check_expert_ranks
from megatron.pretrain.settings.housekeeping import housekeeping_of
from megatron.pretrain.settings.job import JobSettings, cache_folder, topics_of
from megatron.pretrain.settings.learning_rate import derive_length, learning_rate_of
from megatron.pretrain.settings.megatron_command_line import note_of, other_defaults, translate
from megatron.pretrain.settings.parser import build_parser
from megatron.pretrain.settings.precision import precision_of
from megatron.pretrain.settings.profiling import profiling_settings
from megatron.pretrain.settings.range_choice import choose_range
from megatron.pretrain.settings.recomputation import asked_levels, memory_saving
from megatron.pretrain.settings.schedule import (
    AUTO,
    DEFAULT_SCHEDULE,
    DEFAULT_WITH_VIRTUAL_STAGES,
    ScheduleSettings,
    plan_ahead,
    plan_request,
    read_plan,
    settings_for,
)
from megatron.pretrain.settings.schedule_choice import choose_schedule, known_costs, workload_of
from megatron.pretrain.settings.schedule_limits import check_execution, check_sinks
from megatron.pretrain.settings.sizes import derive_layout, derive_model
from megatron.pretrain.settings.slices import cut_sequences
from megatron.pretrain.settings.stages import needless_of_stages
from megatron.pretrain.settings.watching import watching_of


def parse_arguments(
    command_line: Sequence[str] | None = None,
    dataset: DatasetInfo | None = None,
    *,
    makes_folders: bool = True,
) -> JobSettings:
    """Parse and check the arguments, derive the sizes that follow from them, and freeze the result.

    The world size is taken from ``WORLD_SIZE``, as torchrun sets it. No process group is needed, and none
    is built before everything here has been found to fit.

    Args:
        command_line: arguments without the program's name; ``sys.argv`` if None.
        dataset: stands in for the files of ``--data-path``, for programs that make up their data.
        makes_folders: makes those that the job writes to, and sees whether it can.

    Raises:
        ValueError: one line that names the argument, its value and what to use instead.
    """
    translated = translate(sys.argv[1:] if command_line is None else command_line)
    parser = build_parser()
    args = parser.parse_args(translated.words, argparse.Namespace(**translated.defaults))
    args.world_size, args.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    derive_length(args)
    needless = (*translated.needless, *derive_layout(args))
    derive_model(args)
    precision = precision_of(args)
    args.params_dtype = precision.dtype
    learning_rate, housekeeping, watching = learning_rate_of(args), housekeeping_of(args), watching_of(args)
    _check_training(args)
    args.dataset = dataset
    choose_blend(args)
    args.tokenizer = _tokenizer(args)
    schedule = _choose_schedule(args)
    args.dataset = args.dataset or _inspect_data(args, schedule.execution)
    args.ends_at_documents = args.reset_attention_mask and schedule.execution.joins_documents
    args.padded_vocab_size = _pad_vocabulary(args)
    args.memory_saving = memory_saving(args)
    if args.transformer_impl is not None:
        check_implementation(Implementation(args.transformer_impl))
    profiling = profiling_settings(args)
    if makes_folders:
        watching.check_packages()
        _make_output_folders(args)
    options = {action.dest: getattr(args, action.dest) for action in parser._actions if action.dest != "help"}
    return JobSettings(
        **topics_of(vars(args)),
        schedule=schedule,
        precision=precision,
        learning_rate=learning_rate,
        elastic_job=args.elastic_job,
        ending=ending_of(args),
        housekeeping=housekeeping,
        watching=watching,
        profiling=profiling,
        workload=workload_of(args),
        needless_flags=note_of((*needless, *needless_of_stages(args))),
        other_defaults=other_defaults(translated, args),
        options=MappingProxyType(options),
    )


def _choose_schedule(args: argparse.Namespace) -> ScheduleSettings:
    """Plan the schedule that is asked for, or choose one; where data is needed for that, inspect it."""
    plan, reason = None, ""
    if args.plan is not None:
        plan = read_plan(args)
    elif args.pipeline_schedule is None:
        has_stages = args.num_layers_per_virtual_pipeline_stage is not None
        args.pipeline_schedule = DEFAULT_WITH_VIRTUAL_STAGES if has_stages else DEFAULT_SCHEDULE
    if args.pipeline_schedule == AUTO:
        check_shared_sequences(args, None, is_chosen=True)
        args.dataset = args.dataset or _inspect_data(args, Execution.MEGATRON)
        args.padded_vocab_size = _pad_vocabulary(args)
        plan, reason = choose_schedule(args)
    elif args.pipeline_schedule == ELASTIC_AUTO:
        # What goes with helix goes with 1F1B, too.
        _check_schedule(args, find_schedule(FAMILIES[0]), is_chosen=False)
        args.dataset = args.dataset or _inspect_data(args, Execution.CHUNKS)
        reason = choose_elastic(args)
    entry = find_schedule(args.pipeline_schedule)
    _check_schedule(args, entry, is_chosen=plan is not None and bool(reason))
    derive_elastic(args)
    _check_recompute(args)
    is_open = args.attention_range == AUTO
    if plan is None and (is_open or args.round_order == "interlocked"):
        args.dataset = args.dataset or _inspect_data(args, Execution.SEGMENTS)
        args.padded_vocab_size = _pad_vocabulary(args)
        costs = known_costs(args)
        if is_open:
            plan, reason = choose_range(args, plan_request(args, entry, costs))
        else:
            plan = plan_ahead(args, entry, costs)
    parameters = {} if plan is None else plan.parameters
    attention_range = args.attention_range or parameters.get("attention_range")
    check_sinks(args, entry.execution, None if attention_range is None else str(attention_range))
    plan = plan or plan_ahead(args, entry)
    if plan is not None and plan.slices:
        args.dataset = args.dataset or _inspect_data(args, Execution.SLICES)
        args.padded_vocab_size = _pad_vocabulary(args)
        plan = cut_sequences(args, plan)
    return settings_for(args, plan, reason)


def _check_training(args: argparse.Namespace) -> None:
    check_expert_ranks(args)
    for name in ("save_interval", "keep_checkpoints"):
        if getattr(args, name) is not None and args.save is None:
            raise ValueError(f"{flag_of(name)} {getattr(args, name)} needs --save DIR")
    if args.check_gradients_every is not None and args.data_parallel_size * args.context_parallel_size == 1:
        raise ValueError(
            f"--check-gradients-every {args.check_gradients_every} compares data-parallel ranks, and there "
            "is only one; leave it out"
        )
    for name, default in (
        ("async_save", False),
        ("set_aside_checkpoints", False),
        ("on_save_failure", "stop"),
    ):
        if getattr(args, name) != default and args.save is None:
            raise ValueError(f"{flag_of(name)} needs --save DIR")
    for name in ("load_fallback", "finetune", "no_load_optim"):
        if getattr(args, name) and args.load is None:
            raise ValueError(f"{flag_of(name)} needs --load DIR")
    if args.finetune and args.save is not None and is_same_folder(args.load, args.save):
        raise ValueError(
            f"--finetune begins anew with the weights of --load {args.load}; give a --save of its own"
        )
    if args.allow_changed:
        _check_allowed(args)
    if args.pretrained_checkpoint is not None and args.optimizer == "sgd":
        raise ValueError("--pretrained-checkpoint needs --optimizer adam; sgd has no form for checkpoints")
    if args.optimizer == "sgd" and (args.use_distributed_optimizer or args.save or args.load):
        raise ValueError(
            "--optimizer sgd has no form for checkpoints and shards; use adam, or leave out --save, --load "
            "and --use-distributed-optimizer"
        )


def _check_allowed(args: argparse.Namespace) -> None:
    if args.load is None and args.pretrained_checkpoint is None:
        raise ValueError("--allow-changed needs --load DIR or --pretrained-checkpoint DIR")
    for name in args.allow_changed:
        if name not in changeable():
            raise ValueError(
                f"--allow-changed {name}: that cannot change, or may change anyhow; choose from "
                f"{', '.join(changeable())}"
            )


def _check_schedule(args: argparse.Namespace, entry: Schedule, *, is_chosen: bool) -> None:
    check_execution(args, entry.execution)
    is_mixed = args.part_blends is not None or (args.blend is not None and args.blend.is_mixed)
    if entry.execution is not None and not entry.execution.joins_documents and is_mixed:
        raise ValueError(
            f"--pipeline-schedule {args.pipeline_schedule} blends no datasets; give --data-path one prefix "
            "and no weight"
        )
    check_shared_sequences(args, entry.execution, is_chosen=is_chosen)
    if args.log_throughput and not entry.plans_ahead:
        raise ValueError("--log-throughput counts sequences of one length; leave it out with elastic batches")
    if args.attention_range == AUTO and entry.execution is Execution.ROUNDS:
        raise ValueError(
            f"--attention-range {AUTO} does not apply to {args.pipeline_schedule}, whose batches are all for "
            "one model; name the range"
        )
    if args.attention_range == AUTO and "attention_range" not in entry.options:
        raise ValueError(f"--attention-range does not apply to {args.pipeline_schedule}; remove it")
    is_used = is_chosen or args.attention_range == AUTO or args.round_order == "interlocked"
    if args.hardware is not None and not (
        is_used or (entry.execution is not None and entry.execution.has_slices)
    ):
        raise ValueError(
            "--hardware is for --pipeline-schedule auto, --attention-range auto, --round-order "
            "interlocked and schedules of slices; leave it out"
        )
    if entry.execution is Execution.SLICES and asked_levels(args) not in (None, Recompute.NONE):
        raise ValueError(
            f"{args.pipeline_schedule} recomputes by --recompute-granularity; leave --recompute-levels and "
            "--recompute-without-attention out"
        )
    if entry.execution is not None and entry.execution.cuts_layers and args.recompute_granularity is not None:
        raise ValueError(
            f"{args.pipeline_schedule} recomputes by --recompute-without-attention; leave "
            "--recompute-granularity out or use 1f1b"
        )


def _check_recompute(args: argparse.Namespace) -> None:
    if args.recompute_granularity == "selective" and "mlp" in args.recompute_modules and args.add_bias_linear:
        # Megatron's checkpoint takes the bias that its MLP returns for its own output, and recurses for ever.
        raise ValueError("--recompute-modules mlp needs --disable-bias-linear")
    of_mlp, needed = ("mlp", "moe") if args.num_experts is not None else ("moe", "mlp")
    is_mixed = args.moe_layer_freq != 1  # some layers have one, others the other
    if args.recompute_granularity == "selective" and of_mlp in args.recompute_modules and not is_mixed:
        with_them = "with" if needed == "moe" else "without"
        raise ValueError(
            f"--recompute-modules {of_mlp} finds none in a model {with_them} --num-experts; use {needed}"
        )
    if args.recompute_granularity == "full" and None in (args.recompute_method, args.recompute_num_layers):
        raise ValueError("--recompute-granularity full needs --recompute-method and --recompute-num-layers")
    if args.recompute_granularity != "full" and (args.recompute_method or args.recompute_num_layers):
        raise ValueError("--recompute-method and --recompute-num-layers need --recompute-granularity full")


def _tokenizer(args: argparse.Namespace) -> TokenizerSettings | None:
    if args.tokenizer_type is None and args.vocab_size is not None:
        raise ValueError(
            "--vocab-size needs --tokenizer-type; add it, or leave it out: the data have a tokenizer"
        )
    return tokenizer_settings(args)


def _inspect_data(args: argparse.Namespace, execution: Execution) -> DatasetInfo:
    if args.mock_data:
        return describe_mock(args.tokenizer, execution)
    if args.part_blends is None:
        args.corpora = _inspect_blend(args, execution, args.blend, args.split)
        return summary_of(args.corpora)
    args.parts = tuple(
        blend and Corpora(_inspect_blend(args, execution, blend, "100,0,0"), blend.weights)
        for blend in args.part_blends
    )
    found = [info for part in args.parts if part is not None for info in part.infos]
    args.corpora = tuple({info.prefix: info for info in found}.values())
    return summary_of(args.corpora)


def _inspect_blend(
    args: argparse.Namespace, execution: Execution, blend: Blend, split: str
) -> tuple[DatasetInfo, ...]:
    return tuple(_inspect_corpus(args, execution, prefix, split) for prefix in blend.prefixes)


def _inspect_corpus(args: argparse.Namespace, execution: Execution, prefix: str, split: str) -> DatasetInfo:
    info = describe_prefix(prefix, args.tokenizer)
    folder = cache_folder(prefix, args.data_cache_path)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # The first rank of each node looks at all of the data, once: the others find its record.
        checked_corpus(info, folder)
    if execution.joins_documents and info.has_prompts:
        raise ValueError(
            f"{prefix} has prompts, on which there must be no loss, but --pipeline-schedule "
            f"{args.pipeline_schedule} joins documents and would learn them; use elastic, or prepare the "
            "data without --prompt-key"
        )
    if execution.joins_documents and info.num_tokens <= args.seq_length:
        raise ValueError(
            f"{prefix} holds {info.num_tokens} tokens, not even one sequence of --seq-length "
            f"{args.seq_length}; prepare more text or use at most {info.num_tokens - 1}"
        )
    if execution.joins_documents:
        _check_cache_folder(folder)
    check_split(split, info, with_validation=args.eval_iters > 0 and args.part_blends is None)
    return info


def _check_cache_folder(folder: Path) -> None:
    """A folder that cannot be written to may do if an earlier job has filled it: known once data is built."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if not folder.is_dir() or not any(folder.glob("*.npy")):
            raise ValueError(
                f"the index cache cannot be written to {folder} ({error.strerror}); give a --data-cache-path "
                "that may be written to"
            ) from error


def _make_output_folders(args: argparse.Namespace) -> None:
    """Found out now, and not when the first checkpoint is due."""
    metrics_folder = None if args.metrics_jsonl is None else args.metrics_jsonl.parent
    memory_history = watching_of(args).memory_history
    if metrics_folder is not None and args.metrics_jsonl.exists() and not args.metrics_jsonl.is_file():
        raise ValueError(f"--metrics-jsonl {args.metrics_jsonl} is not a file; give another path")
    for flag, folder in (
        ("--save", args.save),
        ("--trace-dir", args.trace_dir),
        ("--tensorboard-dir", args.tensorboard_dir),
        ("--metrics-jsonl", metrics_folder),
        ("--memory-snapshot-path", memory_history and memory_history.parent),
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
    """Rows of the embedding: the same for every layout, unlike Megatron's.

    Padding takes part in the softmax, so it would change the loss, and what fits a checkpoint.
    """
    size, multiple, tp = (
        args.dataset.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size,
    )  # fmt: skip
    padded = -(-size // multiple) * multiple
    if args.padded_vocab_size is not None:
        return _given_rows(args.padded_vocab_size, size, tp)
    if padded % tp:
        raise ValueError(
            f"--make-vocab-size-divisible-by {multiple} pads the vocabulary of {size} to {padded}, which "
            f"--tensor-model-parallel-size {tp} does not divide; use {math.lcm(multiple, tp)}"
        )
    return int(padded)


def _given_rows(rows: int, vocabulary: int, tp: int) -> int:
    """``--padded-vocab-size``, found to fit."""
    if rows < vocabulary or rows % tp:
        least = -(-vocabulary // tp) * tp
        raise ValueError(
            f"--padded-vocab-size {rows} must be a multiple of --tensor-model-parallel-size {tp} and "
            f"hold the vocabulary of {vocabulary}; use {least} or more"
        )
    return rows
