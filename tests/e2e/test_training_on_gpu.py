"""Whole jobs over NCCL, whose ranks may share a GPU: the losses of 1F1B under every kind of schedule."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from jobs import MODEL, metrics_of, run

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(280),
]
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
# On two ranks, where no number is given. "parallel" has two pipelines of two tensor-parallel stages.
JOBS = {
    "interleaved": "--pipeline-schedule 1f1b --num-layers-per-virtual-pipeline-stage 1",
    "zb-h1": "--pipeline-schedule zb-h1",
    "zb-v": "--pipeline-schedule zb-v",
    "helix": "--pipeline-schedule helix --recompute-without-attention --mlp-chunk-size 32",
    "block": "--pipeline-schedule helix --attention-range block --head-placement spread --num-fold 1",
    "interlocked": "--pipeline-schedule helix --round-order interlocked --split-weight-gradients",
    "sliced-helix": "--pipeline-schedule sliced-helix",
    "seq1f1b": "--pipeline-schedule seq1f1b --num-slices 3",
}
FOUR_RANKS = {
    "helix-4": "--pipeline-schedule helix --pipeline-model-parallel-size 4",
    "parallel": f"--pipeline-schedule helix --pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 "
    f"--sequence-parallel {SHARDED}",
    "replicas": f"--pipeline-schedule helix --pipeline-model-parallel-size 2 {SHARDED}",
}


@pytest.fixture(scope="module")
def train(corpus, tmp_path_factory):
    """``train(words, ranks)``: losses and norms of gradients by iteration, and what was printed."""

    @cache
    def start(words: str, ranks: int) -> tuple[list[float], list[float], str]:
        metrics = tmp_path_factory.mktemp("job") / "metrics.jsonl"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        files = ["--data-path", str(corpus), "--metrics-jsonl", str(metrics)]
        job = [*torchrun, "pretrain_gpt.py", *MODEL, *files, *words.split()]
        finished = run([sys.executable, *job], 200, NCCL_DEBUG="WARN")
        assert finished.code == 0, finished.output + finished.errors
        rows = metrics_of(metrics)
        return [row["lm_loss"] for row in rows], [row["grad_norm"] for row in rows], finished.output

    return start


def compare(train, words, ranks, dtype):
    plain, plain_norms, _ = train(f"--pipeline-schedule 1f1b {dtype}", 1)
    losses, norms, _ = train(f"{words} {dtype}", ranks)
    assert len(losses) == 4
    # In 16 bits every schedule rounds messages and sums at places of its own.
    assert losses == pytest.approx(plain, rel=2e-3 if dtype else 2e-5)
    assert norms == pytest.approx(plain_norms, rel=5e-2 if dtype else 1e-3)


@pytest.mark.parametrize("dtype", ["", "--bf16"], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_learn_what_one_learns(train, name, dtype):
    compare(train, f"{JOBS[name]} --pipeline-model-parallel-size 2", 2, dtype)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_learn_what_one_learns(train, name):
    compare(train, FOUR_RANKS[name], 4, "--bf16")


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")
@pytest.mark.parametrize("attention", ["te-cudnn", "auto"])
@pytest.mark.parametrize("attention_range", ["core", "block"])
def test_under_transformer_engine(train, attention, attention_range):
    """Its attention takes the views of messages as they are."""
    engine = f"--bf16 --transformer-impl transformer_engine --attention-backend {attention}"
    helix = f"--pipeline-schedule helix --attention-range {attention_range} --pipeline-model-parallel-size 2"
    compare(train, f"{helix} --recompute-without-attention", 2, engine)
