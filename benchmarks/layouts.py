"""Run what the joint search would choose from on 2 ranks, and hold the order against what it predicts.

    python benchmarks/layouts.py --data-path runs/quickstart/stdlib [--schedules 1f1b helix] [--rounds 2]

The layer's pieces and the links are measured first, on the ranks that train. Then every candidate of
``advise --gpus 2`` that runs trains the same model on the same data, in a program of its own. Candidates take
turns, round by round, so that whatever else the machine does hits all of them alike. Printed are the times,
Kendall's tau between the two orders, and whether the fastest predicted is the fastest that ran.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import kendalltau

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import GIBIBYTES, LAYERS, REPEATS, Whole  # noqa: E402
from helixpipe.data.prefix import inspect_prefix  # noqa: E402
from helixpipe.json_input import parse_object  # noqa: E402
from helixpipe.plan.advise import read_machine, search  # noqa: E402
from helixpipe.plan.advise.joint import Finding  # noqa: E402
from helixpipe.plan.cost_model import Pieces  # noqa: E402

RANKS = 2
# The first iterations warm caches and connections up.
_WARMUP = 2


@dataclass
class Contender:
    """A candidate that was predicted, and its measured iterations.

    Attributes:
        finding: what the search says.
        elapsed_ms: of all iterations but the first ones.
    """

    finding: Finding
    elapsed_ms: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Layout, schedule and recomputation."""
        candidate = self.finding.option.candidate
        return f"{self.finding.layout.label}, {candidate.label}, recompute {candidate.recompute_label}"

    @property
    def measured_ms(self) -> float:
        """The median."""
        return statistics.median(self.elapsed_ms)


def build_parser() -> ScriptParser:
    """Model, batch, and how long to measure."""
    parser = ScriptParser(prog="benchmark_layouts", description=__doc__)
    add = parser.add_argument
    add("--data-path", required=True, help="prefix of an indexed dataset with its tokenizer")
    add("--num-layers", type=LAYERS, default=4)
    add("--hidden-size", type=Whole(), default=128)
    add("--seq-length", type=Whole(), default=4096)
    add("--global-batch-size", type=Whole(), default=4)
    add("--schedules", nargs="+", metavar="NAME", help="only these (default: all that run)")
    add("--train-iters", type=Whole(least=_WARMUP + 1), default=6, help="of each candidate and round")
    add("--rounds", type=REPEATS, default=2, help="how often all candidates run")
    add("--memory-limit-gib", type=GIBIBYTES, default=4.0, help="of a rank")
    return parser


def main() -> None:
    """Measure, predict, run, compare."""
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        profile = _profile(args, Path(folder))
        contenders = _contenders(args, profile)
        print(
            f"{len(contenders)} candidates, {args.rounds} rounds of {args.train_iters} iterations", flush=True
        )
        for _ in range(args.rounds):
            for contender in contenders:
                contender.elapsed_ms += _run(args, contender, Path(folder))
    print(report(contenders))


def report(contenders: Sequence[Contender]) -> str:
    """A table, the fastest first, and how well the orders agree."""
    ranked = sorted(contenders, key=lambda contender: contender.measured_ms)
    lines = ["| candidate | predicted ms | measured ms | predicted over measured |", "|---|---|---|---|"]
    for contender in ranked:
        predicted_ms, measured_ms = contender.finding.iteration_ms, contender.measured_ms
        numbers = f"{predicted_ms:.0f} | {measured_ms:.0f} | {predicted_ms / measured_ms:.2f}"
        lines.append(f"| {contender.label} | {numbers} |")
    pick = min(ranked, key=lambda contender: contender.finding.iteration_ms)
    over = pick.measured_ms / ranked[0].measured_ms - 1
    lines.append("")
    if len(ranked) > 1:
        predicted = [contender.finding.iteration_ms for contender in ranked]
        tau = kendalltau(predicted, [contender.measured_ms for contender in ranked]).statistic
        lines.append(f"Kendall's tau: {tau:.2f}.")
    verdict = "the fastest that ran" if pick is ranked[0] else f"{over:.1%} slower than the fastest that ran"
    lines.append(f"Picked: {pick.label}: {verdict}.")
    return "\n".join(lines)


def _model_arguments(args: argparse.Namespace) -> list[str]:
    words = (
        f"--num-layers {args.num_layers} --hidden-size {args.hidden_size} --num-attention-heads 4 "
        f"--ffn-hidden-size {args.hidden_size * 11 // 4} --swiglu --normalization RMSNorm "
        "--position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights "
        f"--seq-length {args.seq_length}"
    )
    return words.split()


def _torchrun(words: Sequence[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [*launcher, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _profile(args: argparse.Namespace, folder: Path) -> Pieces:
    script, output = folder / "model.sh", folder / "profile.json"
    script.write_text(f"pretrain_gpt.py {' '.join(_model_arguments(args))}\n", encoding="utf-8")
    words = ["-m", "helixpipe", "profile", "--model", str(script), "--seq-length", str(args.seq_length)]
    vocab_size = inspect_prefix(args.data_path).vocab_size
    _torchrun([*words, "--vocab-size", str(vocab_size), "--fp32", "--output", str(output)])
    found = read_machine(str(output))
    assert isinstance(found, Pieces)
    return found


def _contenders(args: argparse.Namespace, profile: Pieces) -> list[Contender]:
    """Everything that fits and runs, as an exhaustive search predicts it."""
    found = search(
        profile,
        profile.workload,
        num_gpus=RANKS,
        global_batch=args.global_batch_size,
        memory_limit_gib=args.memory_limit_gib,
        accept=lambda _, candidate: (
            not candidate.why_not_runnable
            and (args.schedules is None or candidate.schedule in args.schedules)
        ),
        exhaustive=True,
    )
    if not found.simulated:
        raise SystemExit("no candidate fits and runs; give other --schedules or a larger --memory-limit-gib")
    return [Contender(finding) for finding in found.simulated]


def _run(args: argparse.Namespace, contender: Contender, folder: Path) -> list[float]:
    """Milliseconds of iterations of the training program."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    chosen = " ".join(contender.finding.option.candidate.arguments(contender.finding.job)).split()
    training = f"--train-iters {args.train_iters} --lr 1e-3 --data-path {args.data_path}".split()
    _torchrun(
        ["pretrain_gpt.py", *_model_arguments(args), *chosen, *training, "--metrics-jsonl", str(metrics)]
    )
    rows = [parse_object(line, "metrics") for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [float(row["elapsed_ms"]) for row in rows[_WARMUP:]]


if __name__ == "__main__":
    main()
