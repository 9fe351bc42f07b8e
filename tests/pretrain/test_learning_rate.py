"""Learning rates and weight decay over a job: Megatron's options give Megatron's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helixpipe.data.prefix import DatasetInfo
from megatron.pretrain.model import _build_scheduler
from megatron.pretrain.settings.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
CORE = Path(os.environ.get("HELIXPIPE_CORES", ROOT / "build/cores")) / "0.17.1"
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--max-position-embeddings 32 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --data-path unused"
)
DATASET = DatasetInfo(
    prefix="unused", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)
# The same scheduler out of Megatron's own program.
RATES_OF_CORE = """
import argparse, json, sys
from types import SimpleNamespace
from megatron.training import training
from megatron.training.arguments import add_megatron_arguments
found = []
for line in json.loads(sys.argv[1]):
    args = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(line.split())
    args.use_checkpoint_opt_param_scheduler = False
    for name in ("start_weight_decay", "end_weight_decay"):
        if getattr(args, name) is None:
            setattr(args, name, args.weight_decay)
    training.get_args = lambda: args
    groups = [{"default_config": True}]
    scheduler = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=groups))
    rows = []
    for _ in range(24):
        rows.append([groups[0]["lr"], groups[0]["weight_decay"]])
        scheduler.step(8)
    found.append(rows)
print(json.dumps(found))
"""
LINES = (
    "--train-iters 20 --lr-warmup-iters 3 --lr-decay-style linear",
    "--train-iters 20 --lr-warmup-fraction 0.23 --lr-decay-iters 15 --lr-decay-style cosine",
    "--train-samples 165 --lr-warmup-samples 21 --lr-decay-style cosine",
    "--train-samples 165 --lr-decay-samples 99 --lr-warmup-fraction 0.1 --lr-warmup-init 2e-4",
    "--train-iters 20 --lr-decay-style WSD --lr-wsd-decay-iters 7 --lr-warmup-iters 2",
    "--train-samples 160 --lr-decay-style WSD --lr-wsd-decay-samples 50 --lr-wsd-decay-style minus_sqrt",
    "--train-iters 20 --start-weight-decay 0.01 --end-weight-decay 0.1 --weight-decay-incr-style cosine",
    "--train-iters 20 --start-weight-decay 0.01 --end-weight-decay 0.1 --weight-decay-incr-style linear",
)


@pytest.fixture
def parse(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    return lambda more: parse_arguments(f"{MODEL} {more}".split(), DATASET)


def rates_of(settings, count=24):
    """Learning rate and weight decay of the first iterations."""
    groups = [{"default_config": True}]
    scheduler = _build_scheduler(settings.learning_rate, SimpleNamespace(param_groups=groups))
    rows = []
    for _ in range(count):
        rows.append([groups[0]["lr"], groups[0]["weight_decay"]])
        scheduler.step(settings.training.global_batch_size)
    return rows


@pytest.mark.slow
def test_rates_are_those_of_megatrons_program(parse):
    if not CORE.is_dir():
        pytest.skip(f"no megatron-core is unpacked in {CORE}")
    environment = os.environ | {"PYTHONPATH": f"{CORE}{os.pathsep}{ROOT / 'tests/support/cores'}"}
    lines = json.dumps([f"{MODEL} {line}" for line in LINES])
    command = [sys.executable, "-W", "ignore", "-c", RATES_OF_CORE, lines]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert [rates_of(parse(line)) for line in LINES] == theirs


def test_a_fraction_of_the_decay_is_the_warm_up(parse):
    rates = [rate for rate, _ in rates_of(parse(LINES[1]))]
    # 0.23 of 15 iterations are 3.45.
    assert rates[:4] == pytest.approx([0, 1e-3 / 3.45, 2e-3 / 3.45, 3e-3 / 3.45], rel=1e-12)
    assert 9e-4 < rates[4] < 1e-3
    assert rates[16:] == [1e-4] * 8


def test_samples_count_iterations(parse):
    settings = parse(LINES[2])
    assert settings.training.train_iters == 20  # 165 samples are 20 batches of 8 and a rest
    assert [rate for rate, _ in rates_of(settings, 3)] == pytest.approx([0, 8e-3 / 21, 16e-3 / 21], rel=1e-12)
    assert settings.learning_rate.job == 165


def test_the_last_part_decays_by_itself(parse):
    rates = [rate for rate, _ in rates_of(parse(LINES[4]))]
    assert rates[2:14] == [1e-3] * 12
    assert rates[20] == pytest.approx(1e-4)
    assert sorted(rates[13:21], reverse=True) == rates[13:21]


def test_weight_decay_grows(parse):
    decays = [decay for _, decay in rates_of(parse(LINES[7]))]
    assert decays[:3] == pytest.approx([0.01, 0.0145, 0.019])
    assert decays[20:] == pytest.approx([0.1] * 4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "one of the arguments --train-iters --train-samples is required"),
        ("--train-iters 2 --train-samples 16", "--train-samples: not allowed with argument --train-iters"),
        ("--train-samples 7", "--train-samples 7 is less than one --global-batch-size 8"),
        ("--train-samples 80 --lr-decay-iters 8", "--lr-decay-iters .* use --lr-decay-samples"),
        ("--train-samples 80 --lr-warmup-iters 8", "--lr-warmup-iters .* use --lr-warmup-samples"),
        ("--train-iters 8 --lr-decay-samples 8", "--lr-decay-samples .* use --lr-decay-iters"),
        ("--train-iters 8 --lr-wsd-decay-samples 8", "--lr-wsd-decay-samples .* use --lr-wsd-decay-iters"),
        ("--train-iters 8 --lr-warmup-iters 8", "--lr-warmup-iters 8 must be smaller .* use at most 7"),
        ("--train-samples 64 --lr-warmup-samples 64", "--lr-warmup-samples 64 must .* use at most 63"),
        ("--train-iters 8 --lr-warmup-iters 1 --lr-warmup-fraction 0.1", "--lr-warmup-fraction and"),
        ("--train-iters 8 --lr-warmup-init 1", "--lr-warmup-init 1.0 is above --lr 0.001"),
        ("--train-iters 8 --decoupled-min-lr 1", "--decoupled-min-lr needs --decoupled-lr"),
        ("--train-iters 8 --decoupled-lr 1e-5", "--decoupled-lr 1e-05 is below"),
        ("--train-iters 8 --lr-decay-style WSD", "--lr-decay-style WSD and --lr-wsd-decay-iters need"),
        ("--train-iters 8 --lr-wsd-decay-iters 3", "--lr-decay-style WSD and --lr-wsd-decay-iters need"),
        ("--train-iters 8 --lr-wsd-decay-iters 9 --lr-decay-style WSD", "9 leaves no room .* at most 8"),
        ("--train-iters 8 --lr-wsd-decay-style linear", "--lr-wsd-decay-style needs --lr-decay-style WSD"),
        ("--train-iters 8 --start-weight-decay 0.1", "need --weight-decay-incr-style linear"),
        ("--train-iters 8 --weight-decay-incr-style linear", "needs --start-weight-decay and"),
        (
            "--train-iters 8 --weight-decay-incr-style linear --start-weight-decay 1 --end-weight-decay 0",
            "--start-weight-decay 1.0 is above",
        ),
    ],
)
def test_contradictions_are_refused(parse, more, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(more)
    assert "\n" not in str(caught.value)
