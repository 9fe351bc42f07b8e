"""Jobs of Megatron-LM's own training program, from the wheels that ship it, and what they print.

The wheels are unpacked by ``make test-cores``, which says where in ``HELIXPIPE_CORES``. Every job is torchrun
with gloo ranks and Megatron's mock data.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from jobs import search_path
from unpack_cores import VERSIONS

ROOT = Path(__file__).resolve().parents[2]
CORES = Path(os.environ.get("HELIXPIPE_CORES", ROOT / "build/cores"))
SUPPORT = ROOT / "tests/support"
SCRIPT = SUPPORT / "megatron_lm/pretrain_gpt.py"
MODEL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --tokenizer-type NullTokenizer
    --vocab-size 64 --mock-data --split 90,5,5 --num-workers 0 --transformer-impl local --attention-dropout 0
    --hidden-dropout 0 --distributed-backend gloo --use-cpu-initialization --no-gradient-accumulation-fusion
    --no-persist-layer-norm --no-bias-gelu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion
    --no-rope-fusion --ckpt-format torch_dist --save-interval 1000 --log-interval 1 --eval-iters 2
    --eval-interval 12 --override-opt_param-scheduler
""".split()
ITERATION = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+) .*?grad norm: (\S+) ")
EVALUATION = re.compile(r"validation loss at iteration (\d+) (?:on (\w+) set )?\| lm loss value: (\S+) ")
# Losses are printed with seven digits, norms with three after the point.
LOSS, NORM = 1e-5, 2e-3

HELIX = "--pipeline-schedule helix"
OTHERS = (
    f"{HELIX} --attention-range block --head-placement spread",
    f"{HELIX} --num-fold 1 --round-order interlocked --split-weight-gradients --recompute-levels none",
    "--pipeline-schedule zb-h1",
    "--pipeline-schedule sliced-helix --head-placement spread",
    "--pipeline-schedule seq1f1b --num-slices 3",
)
TWO_CHUNKS = ("zb-v", "dualpipe-v", "v-half", "v-min")


class Log(NamedTuple):
    """What a job has printed: loss and norm of the gradient by iteration; losses by iteration and set.

    The set of an evaluation between iterations is not named.
    """

    steps: dict[int, tuple[float, float]]
    evaluations: dict[tuple[int, str], float]
    output: str


def launch(
    version: str,
    ranks: int,
    arguments: str,
    *,
    with_us: bool | None = None,
    kill_rank: tuple[int, str] | None = None,
) -> tuple[int, str]:
    """Run the script; the exit code and all that was printed.

    Args:
        version: of megatron-core.
        ranks: processes.
        arguments: beside :data:`MODEL`.
        with_us: through our module; by default where the arguments name a schedule.
        kill_rank: a rank, and what is printed before it is killed.
    """
    if with_us is None:
        with_us = "--pipeline-schedule" in arguments
    paths = (CORES / version, SUPPORT / "cores", SUPPORT / "megatron_lm", ROOT)
    environment = os.environ | {
        "PYTHONPATH": search_path(*paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    module = ["-m", "helixpipe.megatron_lm"] if with_us else []
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *module, str(SCRIPT), *MODEL, *arguments.split()]
    # Megatron wants the length of the decay in what the job's length is in.
    if "--train-samples" not in arguments:
        command += ["--lr-decay-iters", "100"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        # Far more than any needs, for the machine may be busy.
        deadline = threading.Timer(900, process.kill)
        deadline.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if kill_rank is not None and kill_rank[1] in line:
                os.kill(_process_of(kill_rank[0], process.pid), signal.SIGKILL)
                kill_rank = None
        deadline.cancel()
        return process.wait(), "".join(lines)


def _process_of(rank: int, launcher: int) -> int:
    """The process of a rank among a launcher's children, by its environment."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (found,) = [
        int(child) for child in children if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text()
    ]
    return found


def has_tensorboard() -> bool:
    """True if its library is installed."""
    return find_spec("tensorboard") is not None


def scalars_to(folder: Path) -> str:
    """The arguments that write scalars, where they can be written."""
    return f" --tensorboard-dir {folder}" if has_tensorboard() else ""


def read_scalars(folder: Path, name: str) -> dict[int, float]:
    """The values of one scalar by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def train(version: str, ranks: int, arguments: str, *, with_us: bool | None = None) -> Log:
    code, output = launch(version, ranks, arguments, with_us=with_us)
    assert code == 0, output[-3000:]
    steps = {int(i): (float(loss), float(norm)) for i, loss, norm in ITERATION.findall(output)}
    evaluations = {(int(i), name): float(loss) for i, name, loss in EVALUATION.findall(output)}
    return Log(steps, evaluations, output)


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
