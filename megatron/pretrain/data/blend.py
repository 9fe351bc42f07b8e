"""Blends of datasets: the samples of Megatron's own builder, in its order.

Each dataset is asked for its share of the job's samples and a little more, and the blend takes from that one
whose share is furthest behind. So the order depends on how long the job is, as in Megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split, normalize

from megatron.pretrain.data.index_cache import CachedGPTDataset, build_datasets
from megatron.pretrain.settings.data_sources import Weights
from megatron.pretrain.settings.job import TrainingSettings


class SampleBlend(BlendedDataset):
    """Megatron's blend, whose order every rank computes in its memory."""

    datasets: Sequence[CachedGPTDataset]
    dataset_index: np.ndarray
    dataset_sample_index: np.ndarray

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """The sample, as its dataset has it."""
        dataset = self.datasets[int(self.dataset_index[idx])]
        return dataset[int(self.dataset_sample_index[idx])]


def samples_of_parts(training: TrainingSettings) -> list[int]:
    """How many samples Megatron's program asks of the training, validation and test part."""
    evaluations = training.train_iters // training.eval_interval + 1
    batches = (training.train_iters, evaluations * training.eval_iters, training.eval_iters)
    return [count * training.global_batch_size for count in batches]


def build_blends(
    configs: Sequence[GPTDatasetConfig], weights: Weights, num_samples: Sequence[int], *, reads_data: bool
) -> list[SampleBlend | None]:
    """The training, validation and test part of a blend; collective over all ranks.

    Args:
        configs: of each dataset, as :func:`build_datasets` takes them.
        weights: of each; None for all of its samples once.
        num_samples: of each part, over the job.
        reads_data: False on ranks that get None for every part.

    Raises:
        DataError: as :func:`build_datasets`.
    """
    shares: Sequence[Sequence[int | None]] = [[None] * len(num_samples) for _ in configs]
    targets: Sequence[Sequence[int]] = []
    if weights is not None:
        shared = normalize(list(weights))
        targets = _get_size_per_split_per_dataset(shared, list(num_samples))
        surplus = configs[0].mid_level_dataset_surplus
        shares = _get_size_per_split_per_dataset(shared, list(num_samples), surplus=surplus)
    built = [
        build_datasets(config, share, reads_data=reads_data)
        for config, share in zip(configs, shares, strict=True)
    ]
    parts: list[SampleBlend | None] = []
    for part, asked in enumerate(num_samples):
        datasets = [of_dataset[part] for of_dataset in built]
        if datasets[0] is None:
            parts.append(None)
        elif weights is not None:
            size = sum(target[part] for target in targets)
            parts.append(_blend(datasets, normalize(list(weights)), size))
        else:
            lengths = [len(dataset) for dataset in datasets if dataset is not None]
            parts.append(_blend(datasets, lengths, min(asked, sum(lengths))))
    return parts


def build_part(
    configs: Sequence[GPTDatasetConfig], weights: Weights, part: Split, size: int, *, reads_data: bool
) -> Any:
    """One part from all documents of datasets of its own; collective over all ranks.

    Args:
        configs: of each dataset, as :func:`build_datasets` takes them but for what they are split into.
        weights: of each; None for all of its samples once.
        part: which.
        size: samples of it, over the job.
        reads_data: False on ranks that get None.
    """
    sizes = [size if other is part else 0 for other in Split]
    for config in configs:
        config.split_matrix = [(0.0, 1.0) if other is part else None for other in Split]
    if len(configs) == 1:
        return build_datasets(configs[0], sizes, reads_data=reads_data)[part.value]
    return build_blends(configs, weights, sizes, reads_data=reads_data)[part.value]


def _blend(datasets: Sequence[Any], weights: Sequence[float], size: int) -> SampleBlend:
    config = datasets[0].config
    folder, config.path_to_cache = config.path_to_cache, None
    try:
        return SampleBlend(datasets, weights, size, config)
    finally:
        config.path_to_cache = folder
