"""Global batches of sequences of different lengths, each with the plan that trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from torch import Tensor

from helixpipe.data.prefix import DatasetInfo
from helixpipe.data.samples import ShuffledOrder
from helixpipe.elastic import plan_evaluation
from helixpipe.elastic.costs.chunk_costs import ChunkCosts
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.replicas import share_out
from helixpipe.elastic.service.background import BackgroundPlanner, PlannedBatch
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.reliability.exit_codes import DataError
from helixpipe.runtime.shared_planner import SharedPlanner
from megatron.pretrain.data.index_cache import documents_of_part
from megatron.pretrain.data.variable_length import VariableLengthDataset

# Parts of --split.
TRAINING, VALIDATION = 0, 1

Identity = Mapping[str, int | str]


# What a position in the data depends on.
_WORDS = {
    "seed": "--seed {}",
    "max_seq_length": "--max-seq-length {}",
    "num_samples": "{} samples in the training data",
    "documents": "training documents of hash {!s:.12}",
}


class ElasticStep(NamedTuple):
    """What one data-parallel replica does in one iteration.

    Attributes:
        planned: the plan, and what it cost; sequence i of its recipe is ``sequences[i]``.
        sequences: [n_i + 1] int64 ids each, on the CPU, for n_i training tokens.
        loss_masks: [n_i] bool each, where there is loss; None where a dataset has no prompts.
        samples: number of each sequence in the dataset.
    """

    planned: PlannedBatch
    sequences: list[Tensor]
    loss_masks: list[Tensor] | None
    samples: tuple[int, ...]


class ElasticBatches(Iterator[ElasticStep]):
    """Endless iterator over a replica's shares of global batches, the next of which is being planned.

    All replicas draw the same global batch, in the order of :class:`ShuffledOrder`, and share it out by the
    time that sequences take, so the global batches do not depend on the number of replicas. Collective over
    the ranks of a replica.

    Args:
        dataset: to draw from.
        planner: shared by the ranks of this replica; closed by :meth:`close`.
        global_batch_size: sequences of an iteration over all replicas.
        seed: of the order.
        replica, num_replicas: which data-parallel replica this is, and of how many.
        state: from :meth:`state_dict`, to go on after the last batch that was handed out; None to begin.

    Raises:
        ValueError: fewer sequences than replicas.
        DataError: a state of other data, or of another seed or longest sample.
    """

    def __init__(
        self,
        dataset: VariableLengthDataset,
        planner: SharedPlanner,
        *,
        global_batch_size: int,
        seed: int,
        replica: int = 0,
        num_replicas: int = 1,
        state: Identity | None = None,
    ) -> None:
        if global_batch_size < num_replicas:
            raise ValueError(
                f"--global-batch-size {global_batch_size} is less than the data-parallel size "
                f"{num_replicas}; each replica needs at least one sequence"
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.consumed_samples = 0
        self._planner = planner
        self._order = ShuffledOrder(len(dataset), seed)
        self._replica = replica
        self._num_replicas = num_replicas
        if state is not None:
            self._load(state)
        self._next = self._submit()

    def __next__(self) -> ElasticStep:
        """This replica's share of the next global batch; the one after it begins to be planned.

        Raises:
            ValueError: a batch that no plan fits, or an id outside the vocabulary.
        """
        planned, samples = self._planner.result(), self._next
        self.consumed_samples += self.global_batch_size
        self._next = self._submit()
        return ElasticStep(planned, *_read(self.dataset, samples), samples)

    def close(self) -> None:
        """End the planning process; no batch can be had afterwards."""
        self._planner.close()

    def state_dict(self) -> dict[str, int | str]:
        """What is needed to go on after the last batch that was handed out; the same on all ranks."""
        return {"consumed_samples": self.consumed_samples, **identity_of(self.dataset, self._order.seed)}

    def _load(self, state: Identity) -> None:
        own = self.state_dict()
        for name, value in own.items():
            if name not in state:
                raise DataError(f"the state to go on from has no {name}: it is not one of elastic batches")
            if name != "consumed_samples" and state[name] != value:
                raise DataError(
                    f"the checkpoint was made with {_WORDS[name].format(state[name])}, this job has "
                    f"{_WORDS[name].format(value)}: samples would come twice or never; give the same data, "
                    "--split, --max-seq-length and --seed"
                )
        self.consumed_samples = int(state["consumed_samples"])

    def _submit(self) -> tuple[int, ...]:
        """Let the batch after the consumed ones be planned; this replica's samples in it."""
        samples = self._order.samples(self.consumed_samples, self.global_batch_size)
        lengths = self.dataset.lengths[samples].tolist()
        shares = share_out(lengths, self._planner.job.costs, self._num_replicas)
        own = shares[self._replica]
        self._planner.submit([lengths[i] for i in own])
        return tuple(int(samples[i]) for i in own)


def identity_of(dataset: VariableLengthDataset, seed: int) -> dict[str, int | str]:
    """What tells the data apart that a position in it is of."""
    return {
        "seed": seed,
        "max_seq_length": dataset.max_seq_length,
        "num_samples": len(dataset),
        "documents": dataset.fingerprint,
    }


class EvaluationBatches(Iterator[ElasticBatch]):
    """Endless iterator over a replica's shares of global batches to evaluate.

    In the same order for every layout, like :class:`ElasticBatches`. Planned on the spot, by every rank for
    itself: no solver with a time limit is asked, so they find the same.

    Args:
        dataset: to draw from.
        job: what is planned for.
        global_batch_size: sequences over all replicas.
        seed: of the order.
        consumed_samples: sequences that earlier evaluations took.
        replica, num_replicas: which data-parallel replica this is, and of how many.
    """

    def __init__(
        self,
        dataset: VariableLengthDataset,
        job: ElasticJob,
        *,
        global_batch_size: int,
        seed: int,
        consumed_samples: int = 0,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self.dataset = dataset
        self.job = job
        self.global_batch_size = global_batch_size
        self.consumed_samples = consumed_samples
        self._order = ShuffledOrder(len(dataset), seed)
        self._replica = replica
        self._num_replicas = num_replicas

    def __next__(self) -> ElasticBatch:
        """This replica's share of the next global batch.

        Raises:
            ValueError: a batch that no plan fits, or an id outside the vocabulary.
        """
        samples = self._order.samples(self.consumed_samples, self.global_batch_size)
        self.consumed_samples += self.global_batch_size
        lengths = self.dataset.lengths[samples].tolist()
        own = share_out(lengths, self.job.costs, self._num_replicas)[self._replica]
        recipe = plan_evaluation([lengths[i] for i in own], self.job)
        return ElasticBatch(recipe, *_read(self.dataset, [int(samples[i]) for i in own]))


def documents_of(info: DatasetInfo, split: str, longest: int, part: int) -> VariableLengthDataset:
    """The documents of one part of ``--split``, which has been checked, of at most ``longest`` tokens."""
    bounds = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[part]
    return VariableLengthDataset(info, longest, documents_of_part(bounds, info.num_documents))


def first_lengths(
    dataset: VariableLengthDataset, costs: ChunkCosts, *, count: int, size: int, seed: int, num_replicas: int
) -> list[list[int]]:
    """Tokens of the sequences of the first ``count`` batches of ``size``, as the first replica has them."""
    order, found = ShuffledOrder(len(dataset), seed), []
    for number in range(count):
        lengths = dataset.lengths[order.samples(number * size, size)].tolist()
        own, *_ = share_out(lengths, costs, num_replicas)
        found.append([lengths[i] for i in own])
    return found


def _read(dataset: VariableLengthDataset, samples: Sequence[int]) -> tuple[list[Tensor], list[Tensor] | None]:
    """Ids and loss masks of samples."""
    found = [dataset[sample] for sample in samples]
    masks = [sample.loss_mask for sample in found if sample.loss_mask is not None]
    return [sample.ids for sample in found], masks or None


def make_shared_planner(job: ElasticJob) -> SharedPlanner:
    """A planner for this rank's replica; collective over all ranks, once Megatron's groups are built.

    Plans travel over gloo groups of their own, beside the messages of training.
    """
    own = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    everyone: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    # Every rank makes the groups of all replicas, in one order, as new_group asks for.
    replicas = sorted({tuple(ranks) for ranks in everyone})
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in replicas], backend="gloo")
    return SharedPlanner(BackgroundPlanner, job, group)
