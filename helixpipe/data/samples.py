"""Samples of different lengths: which documents are trained on, how much of each, and in which order.

A sample is one document, or its beginning: never a part of two. A document of n + 1 ids, the end of document
included, is n training tokens, each predicting the next id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helixpipe.data.index_file import LOSS_MODE, Index

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class DocumentSamples:
    """The samples of a dataset, in the order of its documents.

    Attributes:
        documents: [n] number of each sample's document.
        lengths: [n] training tokens of each sample, at least one.
        truncated: samples that are not whole documents.
        lost_tokens: training tokens of those documents beyond the longest sample.
        too_short: documents left out because they have fewer than two ids: nothing to predict.
        without_loss: documents left out because a prompt fills the whole sample.
    """

    documents: Integers
    lengths: Integers
    truncated: int
    lost_tokens: int
    too_short: int
    without_loss: int

    def __len__(self) -> int:
        return len(self.documents)


def document_samples(
    index: Index, max_seq_length: int | None = None, documents: range | None = None
) -> DocumentSamples:
    """The samples of an index that has been checked.

    Args:
        index: of the dataset.
        max_seq_length: training tokens after which a document is cut off; None for none.
        documents: consecutive ones to take; None for all.

    Raises:
        ValueError: a length below 1, or no sample at all.
    """
    if max_seq_length is not None and max_seq_length < 1:
        raise ValueError(f"--max-seq-length must be at least 1, not {max_seq_length}")
    chosen = range(index.num_documents) if documents is None else documents
    offsets = index.document_offsets(chosen.start, chosen.stop).astype(np.int64)
    whole = np.diff(offsets) - 1
    longest = int(whole.max(initial=0)) if max_seq_length is None else max_seq_length
    lengths = np.minimum(whole, longest)
    is_long_enough = whole >= 1
    has_loss = is_long_enough & _loss_within(index, chosen, offsets, lengths)
    kept = np.flatnonzero(has_loss)
    if not len(kept):
        raise ValueError(
            f"{index.path}: none of {len(chosen)} documents has a token to learn: give a longer "
            "--max-seq-length, or prepare other documents"
        )
    return DocumentSamples(
        documents=kept + chosen.start,
        lengths=lengths[kept],
        truncated=int((whole > longest)[kept].sum()),
        lost_tokens=int((whole - lengths)[kept].sum()),
        too_short=int((~is_long_enough).sum()),
        without_loss=int((is_long_enough & ~has_loss).sum()),
    )


def _loss_within(index: Index, documents: range, offsets: Integers, lengths: Integers) -> NDArray[np.bool_]:
    """Whether any of a document's ids 1 to ``length``, those that its sample predicts, is no prompt's."""
    if index.modes is None:
        return np.ones(len(lengths), dtype=bool)
    bounds = np.asarray(index.document_indices[documents.start : documents.stop + 1])
    sequences = slice(int(bounds[0]), int(bounds[-1]))
    document = np.repeat(np.arange(len(lengths)), np.diff(bounds))
    first = index.pointers[sequences] // index.dtype.itemsize - offsets[document]
    end = np.minimum(first + index.lengths[sequences], lengths[document] + 1)
    learned = (index.modes[sequences] == LOSS_MODE) & (end > np.maximum(first, 1))
    return np.bincount(document[learned], minlength=len(lengths)) > 0


class ShuffledOrder:
    """Samples in a random order, every one once per epoch, each epoch in an order of its own.

    A position counts samples from the beginning of training, over all epochs: it is all that a resumed job
    needs to know. The order depends on nothing but the number of samples, the seed and the epoch.

    Args:
        num_samples: of the dataset.
        seed: 0 to 2^32 - 1.
        shuffles_first: False for samples that are shuffled already: the first epoch takes them as they come.
    """

    def __init__(self, num_samples: int, seed: int, *, shuffles_first: bool = True) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"--seed must be from 0 to {2**32 - 1}, not {seed}")
        if num_samples < 1:
            raise ValueError("there is no sample to put in an order")
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._permutation = np.zeros(0, dtype=np.int64)
        self._shuffles_first = shuffles_first

    def samples(self, position: int, count: int) -> Integers:
        """[count] numbers of the samples at ``position`` and after it."""
        parts = []
        while count:
            epoch, start = divmod(position, self.num_samples)
            part = self._of_epoch(epoch)[start : start + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _of_epoch(self, epoch: int) -> Integers:
        if epoch != self._epoch:
            # NumPy keeps this old generator's numbers the same in all its releases, which it does not promise
            # for the new ones: a job may be resumed after an upgrade.
            chance = np.random.RandomState([self.seed, epoch])
            self._permutation = (
                chance.permutation(self.num_samples).astype(np.int64)
                if epoch or self._shuffles_first
                else np.arange(self.num_samples, dtype=np.int64)
            )
            self._epoch = epoch
        return self._permutation
