"""Megatron-LM's own training program, from the wheels that ship it: stock 1F1B beside schedules of ours.

Every job is torchrun with gloo ranks and Megatron's mock data. Both schedules start from one checkpoint, for
Megatron draws new weights rank by rank. The wheels are unpacked by ``make test-cores``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from unpack_cores import VERSIONS

ROOT = Path(__file__).resolve().parents[2]
CORES = Path(os.environ.get("HELIXPIPE_CORES", ROOT / "build/cores"))
SUPPORT = ROOT / "tests/support"
SCRIPT = SUPPORT / "megatron_lm/pretrain_gpt.py"
MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --lr-decay-iters 100 --tokenizer-type NullTokenizer
    --vocab-size 64 --mock-data --split 90,5,5 --num-workers 0 --transformer-impl local --attention-dropout 0
    --hidden-dropout 0 --distributed-backend gloo --use-cpu-initialization --no-gradient-accumulation-fusion
    --no-persist-layer-norm --no-bias-gelu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion
    --no-rope-fusion --ckpt-format torch_dist --save-interval 1000 --log-interval 1 --eval-iters 2
    --eval-interval 12 --override-opt_param-scheduler
""".split()
ITERATION = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) .*?grad norm: (\S+) ")
EVALUATION = re.compile(r"validation loss at iteration (\d+) (?:on \w+ set )?\| lm loss value: (\S+) ")
# Losses are printed with seven digits, norms with three after the point.
LOSS, NORM = 1e-5, 2e-3

HELIX = "--pipeline-schedule helix"
OTHERS = (
    f"{HELIX} --attention-range block --head-placement spread",
    f"{HELIX} --num-fold 1 --round-order interlocked --split-weight-gradients --recompute-levels none",
    "--pipeline-schedule zb-h1",
    "--pipeline-schedule sliced-helix --head-placement spread",
)


class Log(NamedTuple):
    """What a job has printed, by iteration: loss and norm of the gradient; loss of evaluations."""

    steps: dict[int, tuple[float, float]]
    evaluations: dict[int, float]
    output: str


def launch(version: str, ranks: int, arguments: str, *, with_us: bool | None = None) -> tuple[int, str]:
    """Run the script; ``with_us`` through our module, by default where the arguments name a schedule."""
    if with_us is None:
        with_us = "--pipeline-schedule" in arguments
    paths = (CORES / version, SUPPORT / "cores", SUPPORT / "megatron_lm", ROOT)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    module = ["-m", "helixpipe.megatron_lm"] if with_us else []
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *module, str(SCRIPT), *MODEL, *arguments.split()]
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT
    )
    return finished.returncode, finished.stdout + finished.stderr


def train(version: str, ranks: int, arguments: str, *, with_us: bool | None = None) -> Log:
    code, output = launch(version, ranks, arguments, with_us=with_us)
    assert code == 0, output[-3000:]
    steps = {int(i): (float(loss), float(norm)) for i, loss, norm in ITERATION.findall(output)}
    return Log(steps, {int(i): float(loss) for i, loss in EVALUATION.findall(output)}, output)


def assert_equal(found: Log, wanted: Log, iterations: Sequence[int]) -> None:
    assert set(found.steps) >= set(iterations)
    for i in iterations:
        (loss, norm), (wanted_loss, wanted_norm) = found.steps[i], wanted.steps[i]
        assert loss == pytest.approx(wanted_loss, abs=LOSS)
        assert norm == pytest.approx(wanted_norm, abs=NORM)


def unpacked(version: str) -> pytest.MarkDecorator:
    reason = f"no megatron-core {version} in {CORES}; make test-cores unpacks it"
    return pytest.mark.skipif(not (CORES / version).is_dir(), reason=reason)


def each_version(*ranks: int) -> list[object]:
    return [pytest.param(v, n, marks=unpacked(v), id=f"{v}-{n}") for v in VERSIONS for n in ranks]


@pytest.mark.parametrize(
    "version",
    [
        *(pytest.param(version, marks=[unpacked(version), pytest.mark.slow]) for version in VERSIONS[:-1]),
        pytest.param(VERSIONS[-1], marks=unpacked(VERSIONS[-1])),
    ],
)
def test_helix_trains_and_evaluates_as_1f1b_does(tmp_path, version):
    """From one checkpoint, two iterations and an evaluation."""
    size = "--pipeline-model-parallel-size 2"
    saved = train(version, 2, f"{size} --train-iters 1 --eval-iters 0 --save {tmp_path}")
    stock = train(version, 2, f"{size} --train-iters 3 --load {tmp_path}")
    helix = train(version, 2, f"{size} --train-iters 3 --load {tmp_path} {HELIX}")
    assert set(saved.steps) == {1}
    assert_equal(helix, stock, range(2, 4))
    assert helix.evaluations[3] == pytest.approx(stock.evaluations[3], abs=LOSS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("version", "ranks"), each_version(2, 4))
def test_ten_iterations_are_those_of_1f1b_and_runs_change_over(tmp_path, version, ranks):
    """Ten iterations and an evaluation from one checkpoint; what each saves goes on under the other."""
    size = f"--pipeline-model-parallel-size {ranks}"
    train(version, ranks, f"{size} --train-iters 2 --eval-iters 0 --save {tmp_path}/start")
    stock = train(version, ranks, f"{size} --train-iters 15 --load {tmp_path}/start")
    for number, schedule in enumerate((HELIX, *OTHERS)):
        here = f"{tmp_path}/{number}"
        ours = train(
            version, ranks, f"{size} --train-iters 12 --load {tmp_path}/start --save {here} {schedule}"
        )
        assert_equal(ours, stock, range(3, 13))
        assert ours.evaluations[12] == pytest.approx(stock.evaluations[12], abs=LOSS)
        back = train(version, ranks, f"{size} --train-iters 15 --load {here}")
        # The second step after a load is printed as the mean of both.
        assert_equal(back, stock, (13, 15))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "layout",
    [
        "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --calculate-per-token-loss",
        "--pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
    ],
)
@pytest.mark.parametrize(("version", "ranks"), each_version(4))
def test_other_parallelism_of_theirs_goes_with_it(tmp_path, version, ranks, layout):
    train(version, ranks, f"{layout} --train-iters 2 --eval-iters 0 --save {tmp_path}")
    stock = train(version, ranks, f"{layout} --train-iters 6 --load {tmp_path}")
    for schedule in (HELIX, OTHERS[0]):
        ours = train(version, ranks, f"{layout} --train-iters 6 --load {tmp_path} {schedule}")
        assert_equal(ours, stock, range(3, 7))


@pytest.mark.slow
@pytest.mark.parametrize(("version", "ranks"), each_version(2))
def test_without_the_option_everything_is_as_without_us(version, ranks):
    size = "--pipeline-model-parallel-size 2 --train-iters 4"
    alone = train(version, ranks, size, with_us=False)
    beside = train(version, ranks, size, with_us=True)
    assert (beside.steps, beside.evaluations) == (alone.steps, alone.evaluations)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--use-rope-scaling", "--use-mup"])
@pytest.mark.parametrize(("version", "ranks"), each_version(2))
def test_an_option_that_segments_do_not_know_stops_every_rank_with_one_line(version, ranks, option):
    code, output = launch(
        version,
        ranks,
        f"--pipeline-model-parallel-size 2 --train-iters 2 --position-embedding-type rope {option} {HELIX}",
    )
    assert code != 0
    lines = [line for line in output.splitlines() if "helixpipe.megatron_lm: rank" in line]
    assert {re.search(r"rank (\d)", line).group(1) for line in lines} <= {"0", "1"}
    assert lines
    assert all("does not know" in line for line in lines)
