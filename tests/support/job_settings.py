"""Settings of a small job, as its command line says them, without files of data."""

from __future__ import annotations

from helixpipe.data.prefix import DatasetInfo
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.job import JobSettings

DATASET = DatasetInfo("unused", 300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500)
MINIMAL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused"
)


def job_settings(words: str = "", dataset: DatasetInfo | None = DATASET) -> JobSettings:
    """Of a job with these options besides; ``WORLD_SIZE`` and ``RANK`` are taken from the environment."""
    return parse_arguments(f"{MINIMAL} {words}".split(), dataset)
