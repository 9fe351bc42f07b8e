"""The job under ``--pipeline-schedule elastic``: its arguments, and its batches with their plans."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from helixpipe.elastic import ElasticJob, costs_from_json
from helixpipe.elastic.background import PlannedBatch
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.schedule import ELASTIC
from megatron.training.data.elastic import (
    ElasticBatches,
    EvaluationBatches,
    Identity,
    identity_of,
    make_shared_planner,
)
from megatron.training.data.prefix import DatasetInfo
from megatron.training.data.variable_length import VariableLengthDataset
from megatron.training.metrics import Planning

_ONLY_ELASTIC = ("elastic_costs", "max_seq_length")
# Parts of --split.
_TRAINING, _VALIDATION = 0, 1


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
        # Chunks are padded only where tensor-parallel ranks share the sequence.
        costs=replace(costs, token_multiple=costs.tensor_parallel if args.sequence_parallel else 1),
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
        data: :attr:`identity` of the data that they were from; None for a new job, or one that another
            schedule has begun.

    Attributes:
        identity: what tells the data apart that a position is in, for checkpoints.

    Raises:
        ValueError: a split without documents, or fewer sequences in a batch than replicas.
        DataError: a checkpoint that was made with other data or settings of it.
    """

    def __init__(
        self, args: argparse.Namespace, consumed_samples: int = 0, data: Identity | None = None
    ) -> None:
        dataset = VariableLengthDataset(args.dataset, args.max_seq_length, _documents(args, _TRAINING))
        self.identity = identity_of(dataset, args.seed)
        self._planned: PlannedBatch | None = None
        self._batches = ElasticBatches(
            dataset,
            make_shared_planner(args.elastic_job),
            global_batch_size=args.global_batch_size,
            state={"consumed_samples": consumed_samples, **(data or self.identity)},
            **_share(args),
        )

    def __next__(self) -> ElasticBatch:
        """The next batch; the one after it begins to be planned."""
        step = next(self._batches)
        self._planned = step.planned
        return ElasticBatch(step.planned.plan, step.sequences, step.loss_masks)

    def planning(self) -> Planning:
        """What is to be told of the last batch's plan."""
        assert self._planned is not None
        return Planning.of(self._planned)

    def close(self) -> None:
        """End the planning process."""
        self._batches.close()


class ElasticValidation(Iterator[ElasticBatch]):
    """Endless iterator over this replica's validation batches, which go on where evaluations ended.

    Args:
        args: parsed arguments, with ``--eval-iters``.
        iteration: the last finished one; tells how much of the data was seen.

    Raises:
        ValueError: no document in the split has a token to learn.
    """

    def __init__(self, args: argparse.Namespace, iteration: int) -> None:
        dataset = VariableLengthDataset(args.dataset, args.max_seq_length, _documents(args, _VALIDATION))
        evaluated = iteration // args.eval_interval * args.eval_iters
        self._batches = EvaluationBatches(
            dataset,
            args.elastic_job,
            global_batch_size=args.global_batch_size,
            consumed_samples=evaluated * args.global_batch_size,
            **_share(args),
        )

    def __next__(self) -> ElasticBatch:
        """The next batch with its chunks."""
        return ElasticBatch(*next(self._batches))


def _share(args: argparse.Namespace) -> dict[str, int]:
    return {
        "seed": args.seed,
        "replica": parallel_state.get_data_parallel_rank(),
        "num_replicas": parallel_state.get_data_parallel_world_size(),
    }


def _documents(args: argparse.Namespace, part: int) -> range:
    """The documents of one part of ``--split``, which has been checked, rounded as Megatron rounds."""
    info: DatasetInfo = args.dataset
    bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))[part]
    return range(*(round(bound * float(info.num_documents)) for bound in bounds))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
