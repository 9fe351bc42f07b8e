"""A rank of a job whose nodes hold their data on disks of their own, or on one that they share."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from job_settings import job_settings

from helixpipe.data.prefix import describe_prefix
from megatron.pretrain.data import gpt, index_cache


def dataset_config(prefix, cache=None, seq_length=16, more=""):
    """What training asks Megatron for, of a tenth of the documents for validation."""
    words = f"--seq-length {seq_length} --data-path {prefix} --split 90,10,0 --seed 3 --eval-iters 1"
    words += f" --global-batch-size 24 {more}"  # for any number of ranks
    settings = job_settings(words, describe_prefix(prefix))
    data = replace(settings.data, data_cache_path=None if cache is None else Path(cache))
    return gpt.dataset_config(data, settings.training)


def indices(dataset):
    """The three arrays, as lists."""
    found = (dataset.document_index, dataset.sample_index, dataset.shuffle_index)
    return [array.tolist() for array in found]


def indices_on_a_node(folders, cache, readers):
    """Stand in the folder of this rank's node and build; what each part holds, and how often it was computed.

    Args:
        folders: of each rank's node, with a copy of the dataset called data.
        cache: as --data-cache-path, None for the default.
        readers: ranks that read data.
    """
    rank = dist.get_rank()
    os.chdir(folders[rank])
    computed = []
    original = index_cache.CachedGPTDataset._computed

    def count(self):
        computed.append(self.index_split.name)
        return original(self)

    index_cache.CachedGPTDataset._computed = count
    try:
        parts = index_cache.build_datasets(
            dataset_config("data", cache), [40, 4, 0], reads_data=rank in readers
        )
    except ValueError as error:
        return str(error), computed
    return [part and indices(part) for part in parts], computed
