"""Endless iterators over a replica's elastic batches, for training and for validation."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core import parallel_state

from helixpipe.elastic.service.background import PlannedBatch
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from megatron.pretrain.data.elastic_batches import (
    TRAINING,
    VALIDATION,
    ElasticBatches,
    EvaluationBatches,
    documents_of,
    identity_of,
    make_shared_planner,
)
from megatron.pretrain.data.variable_length import VariableLengthDataset
from megatron.pretrain.metrics import Planning
from megatron.pretrain.settings.job import JobSettings


class ElasticTraining(Iterator[ElasticBatch]):
    """Endless iterator over this replica's batches, each with its plan; collective.

    Args:
        settings: of the job.
        position: in the order of sequences: how many were trained on, over all replicas.

    Raises:
        ValueError: a split without documents, or fewer sequences in a batch than replicas.
    """

    def __init__(self, settings: JobSettings, position: int = 0) -> None:
        dataset, job, training = training_dataset(settings), settings.elastic_job, settings.training
        assert job is not None
        self._planned: PlannedBatch | None = None
        self._batches = ElasticBatches(
            dataset,
            make_shared_planner(job),
            global_batch_size=training.global_batch_size,
            state={"consumed_samples": position, **identity_of(dataset, training.seed)},
            **_share(training.seed),
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


def validation_batches(settings: JobSettings, evaluated: int) -> EvaluationBatches | None:
    """Endless iterator over this replica's validation batches; None where nothing is evaluated.

    Args:
        settings: of the job.
        evaluated: how many validation samples were seen; evaluations go on where they ended.

    Raises:
        ValueError: no document in the split has a token to learn.
    """
    training, job = settings.training, settings.elastic_job
    if not training.eval_iters:
        return None
    assert job is not None
    return EvaluationBatches(
        _dataset(settings, VALIDATION),
        job,
        global_batch_size=training.global_batch_size,
        consumed_samples=evaluated,
        **_share(training.seed),
    )


def _share(seed: int) -> dict[str, int]:
    return {
        "seed": seed,
        "replica": parallel_state.get_data_parallel_rank(),
        "num_replicas": parallel_state.get_data_parallel_world_size(),
    }


def training_dataset(settings: JobSettings) -> VariableLengthDataset:
    """The documents that are trained on."""
    return _dataset(settings, TRAINING)


def _dataset(settings: JobSettings, part: int) -> VariableLengthDataset:
    longest = settings.training.max_seq_length
    assert longest is not None
    return documents_of(settings.data.dataset, settings.data.split, longest, part)
