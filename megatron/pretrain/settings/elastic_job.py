"""The job under ``--pipeline-schedule elastic``: its arguments, checked."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from helixpipe.commands.parser import flag_of
from helixpipe.commands.ranges import Whole
from helixpipe.elastic import ChunkCosts, ElasticJob, costs_from_json
from helixpipe.elastic.round_schedule import cut_of
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.schedules.helix import DEFAULT_ATTENTION_RANGE
from helixpipe.plan.schedules.request import ATTENTION_RANGES
from helixpipe.refusals import refuse
from megatron.pretrain.settings.recomputation import job_levels
from megatron.pretrain.settings.stages import stage_layers_of

# In the place of a schedule's name: the family of plans is chosen by the data.
ELASTIC_AUTO = "elastic-auto"
_ONLY_ELASTIC = ("elastic_costs", "max_seq_length")


def add_elastic_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    add = parser.add_argument_group("elastic").add_argument
    add(
        "--elastic-costs",
        type=Path,
        metavar="FILE",
        help="what chunks cost, as python -m helixpipe elastic-costs writes it",
    )
    add(
        "--max-seq-length",
        type=Whole(),
        help="longest sample; documents are cut off there, and never joined (default: --seq-length)",
    )


def derive_elastic(args: argparse.Namespace) -> None:
    """Check what belongs to the elastic schedule, and set ``args.elastic_job``; None for other schedules.

    Raises:
        ValueError: one line that names the argument and what to use instead.
    """
    args.elastic_job = None
    if SCHEDULES[args.pipeline_schedule].plans_ahead:
        given = {flag_of(name): getattr(args, name) is not None for name in _ONLY_ELASTIC}
        refuse(given, "{} is for --pipeline-schedule elastic, elastic-helix and elastic-auto; leave it out")
        return
    _refuse(args)
    open_job = open_elastic_job(args, () if _cuts_layers(args) else stage_layers_of(args) or ())
    if args.position_embedding_type == "learned_absolute" and (
        args.max_seq_length > args.max_position_embeddings
    ):
        raise ValueError(
            f"--max-seq-length {args.max_seq_length} is longer than the model's --max-position-embeddings "
            f"{args.max_position_embeddings}; shorten the one or raise the other"
        )
    # Chunks differ in tokens: nothing else gives every token the same weight.
    args.calculate_per_token_loss = True
    args.elastic_job = replace(
        open_job,
        schedule=args.pipeline_schedule,
        recompute=_level(args, open_job.costs),
        attention_range=_attention_range(args, open_job.costs),
    )


def open_elastic_job(args: argparse.Namespace, stage_layers: tuple[int, ...] = ()) -> ElasticJob:
    """The job but for its schedule and how layers are cut; sets the longest sample.

    Args:
        args: of the job.
        stage_layers: of each stage, where they differ.

    Raises:
        ValueError: files or limits that lack, or costs of another layout.
    """
    if args.elastic_costs is None or args.memory_limit_gib is None:
        raise ValueError(
            f"--pipeline-schedule {args.pipeline_schedule} needs --elastic-costs FILE, as python -m "
            "helixpipe elastic-costs writes it, and --memory-limit-gib N, of one GPU"
        )
    if args.max_seq_length is None:
        args.max_seq_length = args.seq_length
    costs = costs_from_json(args.elastic_costs.read_text(encoding="utf-8"))
    if costs.tensor_parallel != args.tensor_model_parallel_size:
        raise ValueError(
            f"--elastic-costs {args.elastic_costs} are for tensor-parallel size {costs.tensor_parallel}, the "
            f"job has {args.tensor_model_parallel_size}; make them anew for this size"
        )
    return ElasticJob(
        # Chunks are padded only where tensor-parallel ranks share the sequence.
        costs=replace(costs, token_multiple=costs.tensor_parallel if args.sequence_parallel else 1),
        num_stages=args.pipeline_model_parallel_size,
        num_layers=args.num_layers,
        memory_limit_bytes=int(args.memory_limit_gib * 2**30),
        stage_layers=stage_layers,
    )


def _level(args: argparse.Namespace, costs: ChunkCosts) -> str | None:
    """The level of a model that is cut at its attention; None where plans decide."""
    if not _cuts_layers(args):
        return None
    level = job_levels(args)
    if isinstance(level, tuple):
        raise ValueError(
            f"--recompute-levels {args.recompute_levels}: {args.pipeline_schedule} has one level for all "
            "layers; give one"
        )
    if costs.cut is None:
        raise ValueError(
            f"--elastic-costs {args.elastic_costs} do not say how a layer's costs fall to attention and the "
            "rest; make them anew with elastic-costs or elastic-profile"
        )
    return costs.cut.level(level.value).recompute


def _attention_range(args: argparse.Namespace, costs: ChunkCosts) -> str | None:
    """The range of a model that is cut at its attention; None where layers are whole."""
    if not _cuts_layers(args):
        return None
    found: str = args.attention_range or DEFAULT_ATTENTION_RANGE
    if found not in ATTENTION_RANGES:
        raise ValueError(f"unknown attention range {found!r}; choose one of {', '.join(ATTENTION_RANGES)}")
    try:
        return cut_of(costs, found).attention_range
    except ValueError as error:
        raise ValueError(f"--elastic-costs {args.elastic_costs}: {error}") from None


def _cuts_layers(args: argparse.Namespace) -> bool:
    execution = SCHEDULES[args.pipeline_schedule].execution
    return execution is not None and execution.cuts_layers


def _refuse(args: argparse.Namespace) -> None:
    sentence = (
        "the elastic schedule cannot honour {}: batches are whole documents, and plans decide how they are "
        "cut, packed and recomputed"
    )
    cuts_layers = _cuts_layers(args)
    refuse({"--micro-batch-size": args.micro_batch_size != 1}, f"{sentence}; give 1")
    unused = {
        "--num-fold": args.num_fold is not None,
        "--num-slices": args.num_slices is not None,
        "--attention-range": args.attention_range is not None and not cuts_layers,
        "--head-placement": args.head_placement is not None,
        "--round-order": args.round_order is not None,
        "--split-weight-gradients": args.split_weight_gradients is not None,
        "--resend-context": args.resend_context is not None,
        "--recompute-granularity": args.recompute_granularity is not None,
        "--recompute-without-attention": bool(args.recompute_without_attention) and not cuts_layers,
        "--recompute-levels": args.recompute_levels is not None and not cuts_layers,
        "--num-workers": args.num_workers != 0,
        "--data-cache-path": args.data_cache_path is not None,
        "--eod-mask-loss": args.eod_mask_loss,
        "--no-mmap-bin-files": not args.mmap_bin_files,
    }
    refuse(unused, f"{sentence}; leave it out")
