"""The job under ``--pipeline-schedule elastic``: its arguments, and its batches with their plans."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron.core import parallel_state

from helixpipe.elastic import ElasticJob, costs_from_json
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.schedule import ELASTIC
from megatron.training.data.elastic import ElasticBatches, make_shared_planner
from megatron.training.data.prefix import DatasetInfo
from megatron.training.data.variable_length import VariableLengthDataset

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
        type=int,
        help="longest sample; documents are cut off there, and never joined (default: --seq-length)",
    )


def derive_elastic(args: argparse.Namespace) -> None:
    """Check what belongs to the elastic schedule, and set ``args.elastic_job``; None for other schedules.

    Raises:
        ValueError: one line that names the argument and what to use instead.
    """
    args.elastic_job = None
    if args.pipeline_schedule != ELASTIC:
        for name in _ONLY_ELASTIC:
            if getattr(args, name) is not None:
                raise ValueError(f"{_flag(name)} is for --pipeline-schedule elastic; leave it out")
        return
    _refuse(args)
    if args.elastic_costs is None or args.memory_limit_gib is None:
        raise ValueError(
            "--pipeline-schedule elastic needs --elastic-costs FILE, as python -m helixpipe elastic-costs "
            "writes it, and --memory-limit-gib N, of one GPU"
        )
    if args.max_seq_length is None:
        args.max_seq_length = args.seq_length
    if args.position_embedding_type == "learned_absolute" and (
        args.max_seq_length > args.max_position_embeddings
    ):
        raise ValueError(
            f"--max-seq-length {args.max_seq_length} is longer than the model's --max-position-embeddings "
            f"{args.max_position_embeddings}; shorten the one or raise the other"
        )
    # Chunks differ in tokens: nothing else gives every token the same weight.
    args.calculate_per_token_loss = True
    args.elastic_job = _job(args)


def _job(args: argparse.Namespace) -> ElasticJob:
    costs = costs_from_json(args.elastic_costs.read_text(encoding="utf-8"))
    if costs.tensor_parallel != args.tensor_model_parallel_size:
        raise ValueError(
            f"--elastic-costs {args.elastic_costs} are for tensor-parallel size {costs.tensor_parallel}, the "
            f"job has {args.tensor_model_parallel_size}; make them anew for this size"
        )
    return ElasticJob(
        costs=costs,
        num_stages=args.pipeline_model_parallel_size,
        num_layers=args.num_layers,
        memory_limit_bytes=int(args.memory_limit_gib * 2**30),
    )


def _refuse(args: argparse.Namespace) -> None:
    unused = {
        "--micro-batch-size": args.micro_batch_size != 1,
        "--num-fold": args.num_fold is not None,
        "--attention-range": args.attention_range is not None,
        "--head-placement": args.head_placement is not None,
        "--recompute-granularity": args.recompute_granularity is not None,
        "--recompute-without-attention": bool(args.recompute_without_attention),
        "--eval-iters": args.eval_iters != 0,
        "--num-workers": args.num_workers != 0,
        "--data-cache-path": args.data_cache_path is not None,
        "--eod-mask-loss": args.eod_mask_loss,
    }
    for flag, is_used in unused.items():
        if is_used:
            advice = "give 1" if flag == "--micro-batch-size" else "leave it out"
            raise ValueError(
                f"the elastic schedule cannot honour {flag}: batches are whole documents, and plans decide "
                f"how they are cut, packed and recomputed; {advice}"
            )


class ElasticTraining(Iterator[ElasticBatch]):
    """Endless iterator over this replica's batches, each with its plan; collective.

    Args:
        args: parsed arguments.
        consumed_samples: sequences already trained on, over all replicas.

    Raises:
        ValueError: a split without documents, or fewer sequences in a batch than replicas.
    """

    def __init__(self, args: argparse.Namespace, consumed_samples: int) -> None:
        dataset = VariableLengthDataset(args.dataset, args.max_seq_length, _training_documents(args))
        state = {
            "consumed_samples": consumed_samples,
            "seed": args.seed,
            "num_samples": len(dataset),
            "max_seq_length": args.max_seq_length,
        }
        self._batches = ElasticBatches(
            dataset,
            make_shared_planner(args.elastic_job),
            global_batch_size=args.global_batch_size,
            seed=args.seed,
            replica=parallel_state.get_data_parallel_rank(),
            num_replicas=parallel_state.get_data_parallel_world_size(),
            state=state,
        )

    def __next__(self) -> ElasticBatch:
        """The next batch; the one after it begins to be planned."""
        step = next(self._batches)
        return ElasticBatch(step.planned.plan, step.sequences, step.loss_masks)

    def close(self) -> None:
        """End the planning process."""
        self._batches.close()


def _training_documents(args: argparse.Namespace) -> range:
    """The documents of the first part of ``--split``, rounded as Megatron rounds."""
    weights = [float(part) for part in args.split.split(",")]
    info: DatasetInfo = args.dataset
    count = round(weights[0] / sum(weights) * float(info.num_documents))
    if not count:
        raise ValueError(
            f"--split {args.split} leaves none of the {info.num_documents} documents for training; give it "
            "more weight, or prepare more documents"
        )
    return range(count)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
