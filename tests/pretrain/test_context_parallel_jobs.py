"""``--context-parallel-size``: jobs whose ranks share sequences learn what one rank alone learns."""

from __future__ import annotations

import re

import pytest
from ranks import run_on_ranks
from training_worker import Fault, run_cases

from helixpipe.data.prefix import DatasetInfo
from megatron.pretrain.settings.arguments import parse_arguments

LINE = re.compile(r"iteration +(\d+)/.*lm loss: (\S+) .*grad norm: (\S+) .*params norm: (\S+)")
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64 --micro-batch-size 1 "
    "--global-batch-size 4 --lr 3e-3 --lr-decay-iters 4 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 99 --eval-iters 1 --eval-interval 2 --log-params-norm --position-embedding-type rope"
)
SHARDS = "--use-distributed-optimizer --overlap-grad-reduce"


def numbers(outcome):
    """Loss, norm of the gradient and of the weights, by iteration; and the loss of the evaluation."""
    assert outcome["error"] == ""
    found = [match.groups() for line in outcome["lines"] if (match := LINE.search(line))]
    evaluated = [
        line.split("lm loss value: ")[1].split()[0] for line in outcome["lines"] if "lm loss value" in line
    ]
    return {number: [float(value) for value in values] for number, *values in found} | {
        "evaluated": [float(value) for value in evaluated]
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    whole = [("--train-iters 4", Fault()), (f"--train-iters 2 --save {folder} {SHARDS}", Fault()),
             ("--train-iters 1 --bf16", Fault())]  # fmt: skip
    (alone,) = run_on_ranks(1, run_cases, whole, 1, 1, MODEL)
    line = "--context-parallel-size 2 --train-iters 4"
    shared = [(f"{line} {SHARDS} --pipeline-schedule helix", Fault()),
              (f"{line} {SHARDS} --load {folder} --check-gradients-every 1", Fault()),
              (f"{line} {SHARDS} --overlap-param-gather --train-iters 1 --bf16", Fault())]  # fmt: skip
    both = run_on_ranks(2, run_cases, shared, 1, 1, MODEL, 2)
    return alone, both[0]


@pytest.mark.slow
def test_a_shared_sequence_is_learned_as_a_whole_one(runs):
    (alone, *_), (shared, *_) = runs
    expected, found = numbers(alone), numbers(shared)
    assert list(found) == list(expected) == ["1", "2", "3", "4", "evaluated"]
    for name, values in expected.items():
        # Printed with three digits behind the point at the least.
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1.1e-3)


@pytest.mark.slow
def test_a_job_goes_on_with_shared_sequences(runs):
    (alone, *_), (_, resumed, _) = runs
    expected, found = numbers(alone), numbers(resumed)
    assert list(found) == ["3", "4", "evaluated"]
    assert found["4"] == pytest.approx(expected["4"], rel=1e-5, abs=1.1e-3)


@pytest.mark.slow
def test_ranks_of_a_shared_sequence_share_what_the_optimizer_keeps(runs):
    (*_, alone), (*_, shared) = runs
    # Of 16 bits; a norm over half of the shards would be smaller by more than a tenth.
    assert numbers(shared)["1"] == pytest.approx(numbers(alone)["1"], rel=1e-2)


@pytest.mark.slow
def test_chunks_of_interleaved_stages_share_sequences():
    line = "--num-layers 4 --train-iters 3"
    (alone,) = run_on_ranks(1, run_cases, [(line, Fault())], 1, 1, MODEL)[0]
    line += " --pipeline-model-parallel-size 2 --context-parallel-size 2 --pipeline-schedule interleaved"
    line += " --num-layers-per-virtual-pipeline-stage 1"
    (shared,) = run_on_ranks(4, run_cases, [(line, Fault())], 1, 2, MODEL, 2)[0]
    expected, found = numbers(alone), numbers(shared)
    assert list(found) == ["1", "2", "3", "evaluated"]
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1.1e-3)


DATASET = DatasetInfo("unused", 300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500)
SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused --context-parallel-size 2"
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--pipeline-schedule sliced-helix",
            "^--pipeline-schedule sliced-helix, which cuts sequences itself, ",
        ),
        (
            "--attention-dropout 0.1",
            "^--attention-dropout 0.1 does not go with --context-parallel-size 2; use --attention-dropout 0$",
        ),
        ("--attention-backend unfused", "^--attention-backend unfused does not go with"),
        ("--window-size 8,0", "^--window-size does not go with"),
        ("--attn-logit-softcapping 50", "^--attn-logit-softcapping does not go with"),
        ("--softmax-type learnable", "^--softmax-type learnable does not go with"),
        ("--reset-attention-mask", "^--reset-attention-mask does not go with"),
        ("--eod-mask-loss", "^--eod-mask-loss without --calculate-per-token-loss does not go with"),
        ("--hardware h20 --pipeline-schedule auto", "^--pipeline-schedule auto does not go with"),
        ("--seq-length 30", "^--seq-length 30 must be a multiple of 4 for .*; use 28 or 32$"),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 38",
            "of 4 for .*-parallel; use 36 or 40$",
        ),
        (
            "--pipeline-model-parallel-size 2 --context-parallel-size 4",
            "x context-parallel size 4; start a mult",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(monkeypatch, line, message):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message):
        parse_arguments(f"{SIZES} {line}".split(), DATASET)
