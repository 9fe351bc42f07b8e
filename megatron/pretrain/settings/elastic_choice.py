"""``--pipeline-schedule elastic-auto``: elastic 1F1B or elastic helix, chosen by the job's own documents."""

from __future__ import annotations

import argparse

from helixpipe.commands.parser import flag_of
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.search.choice import SCHEDULES as FAMILIES
from helixpipe.elastic.search.family import choose_family
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.refusals import refuse
from megatron.pretrain.data.elastic_batches import TRAINING, documents_of, first_lengths
from megatron.pretrain.settings.elastic_job import ELASTIC_AUTO, open_elastic_job
from megatron.pretrain.settings.schedule_limits import check_execution, check_sinks

# Batches, from the job's first, that are planned both ways.
_NUM_BATCHES = 3
# What is chosen.
_CHOSEN = (
    "attention_range", "recompute_levels", "recompute_without_attention",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
)  # fmt: skip


def choose_elastic(args: argparse.Namespace) -> str:
    """Put a schedule that trains on documents, with its options, in the place of ``elastic-auto``.

    Layers are on other ranks under each, so one is chosen for the whole job, by the first batches that it
    trains on. Every rank, and every job that goes on from a checkpoint, comes to the same choice by itself.

    Args:
        args: parsed and checked but for the schedule, the data inspected.

    Returns:
        A line that tells what was chosen, and why.

    Raises:
        ValueError: an option that is chosen here, or nothing that fits.
    """
    given = {flag_of(name): getattr(args, name) is not None for name in _CHOSEN}
    refuse(
        given,
        f"{{}} does not apply to {ELASTIC_AUTO}, which chooses it; leave it out, or name elastic or "
        "elastic-helix",
    )
    if not args.dataset.prefix:
        raise ValueError(f"--pipeline-schedule {ELASTIC_AUTO} chooses by documents; give their --data-path")
    job = open_elastic_job(args)
    batches = first_lengths(
        documents_of(args.dataset, args.split, args.max_seq_length, TRAINING),
        job.costs,
        count=_NUM_BATCHES,
        size=args.global_batch_size,
        seed=args.seed,
        num_replicas=args.data_parallel_size,
    )
    family = choose_family(batches, job, [name for name in FAMILIES if _goes_with_job(args, name)])
    _apply(args, family.job)
    return f"{ELASTIC_AUTO} {family.reason}"


def _goes_with_job(args: argparse.Namespace, schedule: str) -> bool:
    """Whether the checks of a schedule that is named would let this one pass."""
    execution = SCHEDULES[schedule].execution
    named = argparse.Namespace(**{**vars(args), "pipeline_schedule": schedule})
    try:
        check_execution(named, execution)
        check_sinks(named, execution, None)
    except ValueError:
        return False
    return True


def _apply(args: argparse.Namespace, job: ElasticJob) -> None:
    args.pipeline_schedule = job.schedule
    args.attention_range, args.recompute_levels = job.attention_range, job.recompute
    if job.stage_layers:
        args.decoder_first_pipeline_num_layers = job.stage_layers[0]
        args.decoder_last_pipeline_num_layers = job.stage_layers[-1]
