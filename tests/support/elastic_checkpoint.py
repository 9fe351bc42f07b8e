"""What a checkpoint of an elastic job says, read by Megatron's model and by jobs with other settings."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset

from helixpipe.data.samples import ShuffledOrder
from helixpipe.megatron_adapter import cpu_backend
from megatron.pretrain.checkpoint.checkpoint import load_checkpoint
from megatron.pretrain.initialize import seed_random_states
from megatron.pretrain.model import build_training_state, unwrap
from megatron.pretrain.settings.arguments import parse_arguments


def megatrons_mean_loss(
    words: list[str], prefix: Path, documents: range, position: int, count: int, longest: int
) -> float:
    """Mean token loss of ``count`` documents by the checkpoint's weights, each whole and by itself.

    Args:
        words: arguments of a job under 1F1B with ``--load``.
        prefix: of the dataset.
        documents: that samples are drawn from.
        position: in the order of samples.
        count: of samples.
        longest: tokens of a sample.
    """
    _begin()
    settings = parse_arguments(words)
    state = build_training_state(settings)
    load_checkpoint(settings, settings.checkpoint.load, state)
    model = unwrap(state.model[0]).eval()
    dataset = IndexedDataset(str(prefix))
    total, tokens = 0.0, 0
    for sample in ShuffledOrder(len(documents), settings.training.seed).samples(position, count):
        ids = torch.from_numpy(dataset[documents[sample]].astype("int64"))[: longest + 1]
        with torch.no_grad():
            losses = model(ids[None, :-1], torch.arange(len(ids) - 1)[None], None, labels=ids[None, 1:])
        total += float(losses.double().sum())
        tokens += len(ids) - 1
    return total / tokens


def refusals(jobs: list[list[str]]) -> list[str]:
    """What each job, which loads a checkpoint, says of the settings; empty if it goes on."""
    _begin()
    found = []
    for words in jobs:
        settings = parse_arguments(words)
        try:
            load_checkpoint(settings, settings.checkpoint.load, build_training_state(settings))
        except ValueError as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("")
    return found


def _begin() -> None:
    torch.set_num_threads(1)
    cpu_backend.install()
    parallel_state.initialize_model_parallel()
    seed_random_states(1)
