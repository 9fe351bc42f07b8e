"""Micro batches from an indexed dataset, through Megatron's GPTDataset."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from helixpipe.data.corpus_record import known_corpus
from helixpipe.data.prefix import DatasetInfo
from helixpipe.data.samples import ShuffledOrder
from helixpipe.layers.documents import documents_of
from megatron.pretrain.data.blend import build_blends, build_part, samples_of_parts
from megatron.pretrain.data.index_cache import build_datasets, documents_of_part
from megatron.pretrain.data.mock import build_mock_datasets, mock_content
from megatron.pretrain.settings.job import DataSettings, JobSettings, TrainingSettings, cache_folder

Batch = dict[str, torch.Tensor]

# Megatron draws whole epochs until it has so many samples. Asked for those of the whole job, it would order
# all epochs together, so that a longer job saw other samples from the start.
_ONE_EPOCH = [1, 1, 1]


class PrefixTokenizer:
    """What Megatron's datasets ask of a tokenizer, from the headers of a dataset and its index's hash."""

    def __init__(self, info: DatasetInfo, index: str) -> None:
        self.vocab_size = info.vocab_size
        self.eod = info.eod
        # Part of the key of the index cache: a dataset prepared anew under the same name must not meet the
        # indices of the old one, and a copy on another node has the same.
        self.unique_identifiers = OrderedDict(vocab_size=info.vocab_size, eod=info.eod, index=index)

    @property
    def pad(self) -> int:
        """There is no padding token: documents are joined, never padded."""
        raise NotImplementedError

    @property
    def eos(self) -> int:
        """Not distinguished from the end of document."""
        raise NotImplementedError


def build_iterators(
    settings: JobSettings, position: int, evaluated: int = 0
) -> tuple[Iterator[Batch] | None, Iterator[Batch] | None]:
    """Endless iterators over this data-parallel rank's training and validation micro batches.

    Every sample comes once per epoch, in an order that does not depend on how long the job is.

    None where this rank's share of the schedule reads no data. Collective: every rank must call it. The split
    must have passed :func:`check_split`.

    Args:
        settings: of the job; its schedule has one plan for all batches.
        position: in the order of training samples: how many were seen, over all data-parallel ranks.
        evaluated: how many validation samples were seen.

    Raises:
        DataError: an index cache that is damaged or cannot be written.
    """
    plan = settings.schedule.plan
    assert plan is not None, "schedules of chunks have batches of their own"
    reads: Collection[int] = plan.read_by(parallel_state.get_pipeline_model_parallel_rank())
    if settings.data.ends_at_documents:
        # Every rank attends to some of every micro batch, and finds its documents without asking another.
        reads = range(settings.training.num_microbatches)
    train, valid, _ = _datasets(settings, reads_data=bool(reads))
    if train is None:
        return None, None
    train_batches = _batches(settings, train, position, reads)
    if not settings.training.eval_iters:
        return train_batches, None
    return train_batches, _batches(settings, valid, evaluated, reads)


def _datasets(settings: JobSettings, *, reads_data: bool) -> Sequence[Any]:
    """The training, validation and test part; collective, with None for every part on ranks without data."""
    data, training = settings.data, settings.training
    if not data.is_blend:
        config = dataset_config(data, training)
        if data.mock_data:
            return build_mock_datasets(config, _ONE_EPOCH) if reads_data else [None] * len(_ONE_EPOCH)
        return build_datasets(config, _ONE_EPOCH, reads_data=reads_data)
    sizes = samples_of_parts(training)
    if not data.parts:
        configs = [dataset_config(data, training, corpus) for corpus in data.corpora]
        return build_blends(configs, data.weights, sizes, reads_data=reads_data)
    built = [None] * len(Split)
    for part, source in zip(Split, data.parts if training.eval_iters else data.parts[:1], strict=False):
        assert source is not None, "every part that is used has data"
        configs = [dataset_config(data, training, corpus) for corpus in source.infos]
        built[part.value] = build_part(
            configs, source.weights, part, sizes[part.value], reads_data=reads_data
        )
    return built


def dataset_config(
    data: DataSettings, training: TrainingSettings, corpus: DatasetInfo | None = None
) -> GPTDatasetConfig:
    """What Megatron's datasets are built from; without files, Megatron splits its documents evenly.

    Args:
        data, training: of the job.
        corpus: of its datasets; the only one if None.
    """
    corpus = corpus or data.dataset
    config = GPTDatasetConfig(
        random_seed=training.seed,
        sequence_length=training.seq_length,
        blend=None if data.mock_data else ([corpus.prefix], None),
        split=None if data.mock_data else data.split,
        path_to_cache=None if data.mock_data else str(cache_folder(corpus.prefix, data.data_cache_path)),
        tokenizer=PrefixTokenizer(corpus, _index_hash(data, corpus)),
        # Done for a whole micro batch in DocumentBatches: Megatron's takes a step for every document.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=data.eod_mask_loss,
        mmap_bin_files=data.mmap_bin_files,
        create_attention_mask=False,
    )
    # Only what is used is built: from a split without documents Megatron draws samples for ever.
    needed = ["training", "validation"] if training.eval_iters else ["training"]
    config.split_matrix[len(needed) :] = [None] * (3 - len(needed))
    return config


def _index_hash(data: DataSettings, corpus: DatasetInfo) -> str:
    if data.mock_data:
        return mock_content(corpus)
    return known_corpus(corpus, cache_folder(corpus.prefix, data.data_cache_path)).index_hash


def check_split(split: str, info: DatasetInfo, *, with_validation: bool) -> None:
    """``ValueError`` if no document falls to a part that is used, for which Megatron would draw for ever."""
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    needed = ["training", "validation"] if with_validation else ["training"]
    for name, bounds in zip(needed, matrix, strict=False):
        if bounds is None or not documents_of_part(bounds, info.num_documents):
            raise ValueError(
                f"--split {split} leaves none of the {info.num_documents} documents for {name}; give it at "
                f"least {100 / info.num_documents:.2g}% of the weight, or prepare more documents"
                f"{', or use --eval-iters 0' if name == 'validation' else ''}"
            )


class OwnMicroBatches(Iterator[Batch]):
    """Those micro batches of every iteration that this rank reads; for the others, :meth:`skip` is called.

    Args:
        batches: the rank's own, one after the other.
        reads: which they are of an iteration.
        count: micro batches of an iteration.
    """

    def __init__(self, batches: Iterator[Batch], reads: Collection[int], count: int) -> None:
        self._batches = batches
        self._is_own = cycle([i in reads for i in range(count)])

    def __next__(self) -> Batch:
        assert next(self._is_own), "this micro batch is another rank's"
        return next(self._batches)

    def skip(self) -> None:
        """Pass over a micro batch, which the sampler has left out."""
        assert not next(self._is_own), "this micro batch must be read"


class DocumentBatches(Iterator[dict[str, Any]]):
    """Micro batches with what follows from where their documents end.

    Args:
        batches: with tokens [b, s].
        eod: the token that ends a document.
        reset_position_ids: positions begin anew in every document, as Megatron's dataset has them.
        reset_attention_mask: add the ``documents``, within which attention stays.
    """

    def __init__(
        self, batches: Iterator[Batch], eod: int, *, reset_position_ids: bool, reset_attention_mask: bool
    ) -> None:
        self._batches = batches
        self._eod = eod
        self._resets_positions = reset_position_ids
        self._resets_mask = reset_attention_mask

    def __next__(self) -> dict[str, Any]:
        batch: dict[str, Any] = next(self._batches)
        documents = documents_of(batch["tokens"], self._eod)
        if self._resets_positions:
            batch["position_ids"] = documents.positions
        if self._resets_mask:
            batch["documents"] = documents
        return batch


def _batches(
    settings: JobSettings, dataset: GPTDataset, position: int, reads: Collection[int]
) -> Iterator[Batch]:
    num_workers = settings.data.num_workers
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=_sampler(settings.training, len(dataset), position, frozenset(reads)),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_process_group if num_workers > 0 else None,
    )
    batches: Iterator[Batch] = iter(loader)
    data = settings.data
    if data.reset_position_ids or data.reset_attention_mask:
        batches = DocumentBatches(
            batches,
            data.dataset.eod,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
        )
    if data.ends_at_documents:
        return batches  # nobody skips what everybody needs
    return OwnMicroBatches(batches, reads, settings.training.num_microbatches)


def _leave_process_group(worker: int) -> None:
    """torchrun sends SIGTERM to a rank's whole process group, but the rank still needs its readers."""
    os.setpgid(0, 0)


def _sampler(
    training: TrainingSettings, length: int, position: int, reads: Collection[int]
) -> Iterator[list[int]]:
    """Sample numbers of this rank, micro batch by micro batch, epoch after epoch.

    Of the micro batches of an iteration only those that the rank ``reads``.

    Consecutive micro batches of a global batch interleave over data-parallel ranks, so a job that
    goes on with another data-parallel size sees the same global batches.
    """
    size, rank = training.micro_batch_size, parallel_state.get_data_parallel_rank()
    # Megatron has shuffled the first epoch.
    order = ShuffledOrder(length, training.seed, shuffles_first=False)
    position += rank * size
    for micro_batch in cycle(range(training.num_microbatches)):
        if micro_batch in reads:
            yield order.samples(position, size).tolist()
        position += size * parallel_state.get_data_parallel_world_size()
