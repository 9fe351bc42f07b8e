"""Samples of different lengths from an indexed dataset: whole documents, or their beginnings."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helixpipe.data.index_file import LOSS_MODE, open_index
from helixpipe.data.prefix import DatasetInfo, dataset_paths, whose_vocabulary
from helixpipe.data.samples import document_samples


class Sample(NamedTuple):
    """A sample of n training tokens.

    Attributes:
        ids: [n + 1] int64; token t is ``ids[t]``, which predicts ``ids[t + 1]``.
        loss_mask: [n] bool, whether there is loss on a prediction; None for loss on all.
    """

    ids: Tensor
    loss_mask: Tensor | None


class VariableLengthDataset:
    """Samples that never hold parts of two documents, read from disk when they are asked for.

    A document is cut off after ``max_seq_length`` training tokens, and the rest is not trained on. Left out
    are documents of fewer than two ids, and those whose prompt leaves no token with loss.

    Args:
        info: from :func:`helixpipe.data.prefix.inspect_prefix`, which has checked the files.
        max_seq_length: most training tokens of a sample.
        documents: consecutive ones to take; None for all.

    Attributes:
        samples: :class:`helixpipe.data.samples.DocumentSamples`.

    Raises:
        ValueError: no document gives a sample.
    """

    def __init__(self, info: DatasetInfo, max_seq_length: int, documents: range | None = None) -> None:
        paths = dataset_paths(info.prefix)
        self.info = info
        self.max_seq_length = max_seq_length
        self.samples = document_samples(index := open_index(paths.idx), max_seq_length, documents)
        self._index = index
        self._ids = np.memmap(paths.bin, dtype=index.dtype, mode="r")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> np.ndarray:
        """[len(self)] training tokens of each sample."""
        return self.samples.lengths

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what tells datasets apart without reading them: vocabulary, documents and lengths."""
        found = hashlib.sha256(f"{self.info.vocab_size} {self.info.num_tokens}".encode())
        found.update(self.samples.documents.tobytes())
        found.update(self.samples.lengths.tobytes())
        return found.hexdigest()

    def __getitem__(self, number: int) -> Sample:
        """Sample ``number``.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        document = int(self.samples.documents[number])
        start = int(self._index.document_offsets(document, document + 1)[0])
        count = int(self.samples.lengths[number]) + 1
        ids = self._ids[start : start + count].astype(np.int64)
        if ids.min() < 0 or ids.max() >= self.info.vocab_size:
            first = int(np.flatnonzero((ids < 0) | (ids >= self.info.vocab_size))[0])
            paths = dataset_paths(self.info.prefix)
            raise ValueError(
                f"{paths.bin}: token {first} of document {document} has id {ids[first]}, outside the "
                f"vocabulary of {self.info.vocab_size} {whose_vocabulary(self.info)}"
            )
        return Sample(torch.from_numpy(ids), self._loss_mask(document, count))

    def _loss_mask(self, document: int, count: int) -> Tensor | None:
        index = self._index
        if index.modes is None:
            return None
        sequences = slice(*index.document_indices[document : document + 2])
        has_loss = np.repeat(index.modes[sequences] == LOSS_MODE, index.lengths[sequences])
        return torch.from_numpy(has_loss[1:count])
