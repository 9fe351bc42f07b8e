"""What less memory costs: layers under each way of recomputing, the kernels, the longest sequence.

On a GPU, in under nine minutes, ``python benchmarks/layer.py``:

* ``kernels``: each kernel's bandwidth against a device-to-device copy, beside torch's time;
* ``longest``: how long a sequence a model of four layers takes, ours and with selective recomputation;
* ``layers``: forward and backward times, kept, peak and reserved bytes of one Llama layer of Megatron's at
  three lengths and two sizes, without recomputation, with Megatron's selective and full recomputation, and
  with ours. The core attention is the same in all of them.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from layer_benchmark.kernels import measure_kernels  # noqa: E402
from layer_benchmark.layers import measure_layer  # noqa: E402
from layer_benchmark.model import measure_model  # noqa: E402
from layer_benchmark.shapes import METHODS, SHAPES  # noqa: E402
from layer_benchmark.worker import RAN_OUT, Workers, serve  # noqa: E402

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import REPEATS, Real, Whole  # noqa: E402
from helixpipe.kernels.extension import load  # noqa: E402

PARTS = ("kernels", "longest", "layers")
COLUMNS = (
    "date", "machine", "python", "torch", "cuda", "megatron_core", "kernels", "dtype", "part", "shape",
    "seq_length", "method", "forward_ms", "forward_p20", "forward_p80", "backward_ms", "backward_p20",
    "backward_p80", "samples", "kept_bytes", "static_bytes", "peak_bytes", "reserved_bytes",
    "gigabytes_per_second", "share_of_copy", "torch_ms", "note",
)  # fmt: skip
# Longest sequences are multiples of _GRAIN, sought in steps of this share.
_GRAIN, _STEP, _TRIALS = 4096, 0.06, 3
_ROOM = 0.98  # of the device's memory
_SHARE_OF_TIME = 0.15  # that is left: a longer step is not worth a second one


def main() -> int:
    """Measure, print tables, append rows."""
    options = _options()
    if options.worker:
        return serve(lambda task: _measure(task, torch.device(options.device), _dtype(options)))
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmark_layer: no GPU was found; use --device cpu --shapes tiny", file=sys.stderr)
        return 2
    run = _Run(options)
    try:
        for part in options.parts:
            getattr(run, part)()
    finally:
        run.workers.close()
    return int(run.workers.failed)


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(
        prog="benchmark_layer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--shapes", nargs="+", choices=SHAPES, default=["7b", "8k-gqa"])
    add("--seq-lengths", nargs="+", type=Whole(least=4), default=[32768, 65536, 131072])
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add(
        "--repeats",
        type=REPEATS,
        default=10,
        help="samples of each time (default 10; fewer where steps are long)",
    )
    add(
        "--minutes",
        type=Real(above=0.0, most=1e5),
        default=8.5,
        help="what has not begun by then is left out",
    )
    add("--quick", action="store_true", help="a smoke test: short sequences, 3 samples")
    add("--output", type=Path, help="a CSV file to append to, like benchmarks/results.csv")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _options() -> argparse.Namespace:
    options = build_parser().parse_args()
    if options.quick:
        options.seq_lengths, options.repeats = [2048], 3
    return options


def _dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.device == "cuda" else torch.float32


def _measure(task: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    measure = {"kernels": measure_kernels, "layers": measure_layer, "longest": measure_model}[task["part"]]
    return measure(task, device, dtype)


class _Run:
    """One start of the program: its processes and its deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + 60 * options.minutes
        on_gpu = options.device == "cuda"
        command = [sys.executable, __file__, "--worker", "--device", options.device]
        # Megatron takes a GPU that it sees.
        hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        self.workers = Workers(command, ahead=on_gpu, environment=hidden)
        self.common = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if on_gpu else "",
            "megatron_core": importlib.metadata.version("megatron-core"),
            # Without them "ours" is measured with torch's forms: build with python -m helixpipe.kernels.
            "kernels": "csrc" if on_gpu and load() is not None else "torch",
            "dtype": str(_dtype(options)).removeprefix("torch."),
        }
        print(", ".join(f"{name} {value}" for name, value in self.common.items() if value), flush=True)

    def layers(self) -> None:
        """Longest first: what is left out when time is short is what tells least."""
        print(f"\n{'layer':8}{'tokens':>8} {'method':10}{'forward ms':>24}{'backward ms':>24}"
              f"{'total':>8}{'kept GiB':>10}{'peak':>8}{'reserved':>10}")  # fmt: skip
        for shape in self.options.shapes:
            for length in sorted(self.options.seq_lengths, reverse=True):
                baseline: dict[str, Any] | None = None
                for method in self.options.methods:
                    row = self._run("layers", shape, length, method, budget_s=5)
                    baseline = baseline or row
                    print(_layer_line(row, baseline), flush=True)

    def kernels(self) -> None:
        """At a quarter of the longest sequence: the slices that kernels see are no longer."""
        shape = self.options.shapes[0]
        length = max(self.options.seq_lengths) // 4
        found = self._task("kernels", shape, length, "")
        print(f"\n{'kernel':32}{'ms':>10}{'GB/s':>8}{'of copy':>9}{'torch ms':>10}")
        for measured in found if isinstance(found, list) else [{"method": "kernels", "note": found}]:
            row = self._add("kernels", shape, length, measured)
            print(_kernel_line(row), flush=True)

    def longest(self) -> None:
        """From two short runs, whose memory grows linearly, to lengths that are tried in earnest."""
        if self.options.device == "cpu":
            print("\nlongest sequence: left out, a CPU's allocator has no figures to find it by")
            return
        shape = self.options.shapes[0]
        print(
            f"\nlongest sequence of a model of 4 layers ({shape}), in one step of training with Adam's state"
        )
        longest = {}
        for method in ("selective", "ours"):
            if method in self.options.methods:
                longest[method] = self._longest(shape, method)
        if all(longest.get(method) for method in ("selective", "ours")):
            print(f"ours / selective: {longest['ours'] / longest['selective']:.2f}")

    def _longest(self, shape: str, method: str) -> int:
        short = [16384, 32768]
        runs = [self._run("longest", shape, length, method, num_layers=4) for length in short]
        if any("reserved_bytes" not in run for run in runs):
            print(f"{method:10} not found: {[run['note'] for run in runs]}")
            return 0
        slope = (runs[1]["reserved_bytes"] - runs[0]["reserved_bytes"]) / (short[1] - short[0])
        room = _ROOM * runs[0]["limit_bytes"] - runs[0]["reserved_bytes"]
        length = _multiple(short[0] + room / slope)
        best = 0
        for _ in range(_TRIALS):
            row = self._run("longest", shape, length, method, num_layers=4)
            fits = "reserved_bytes" in row
            shown = f"{row['reserved_bytes'] / 2**30:.1f} GiB, {row['step_s']:.1f} s" if fits else row["note"]
            print(f"{method:10}{length:>8} tokens: {shown}", flush=True)
            if fits:
                best = length
                if row["step_s"] > _SHARE_OF_TIME * (self.end - time.monotonic()):
                    break
            elif best or row["note"] != RAN_OUT:
                break
            length = _multiple(length * (1 + _STEP if fits else 1 - _STEP))
        return best

    def _run(self, part: str, shape: str, length: int, method: str, **more: Any) -> dict[str, Any]:
        return self._add(part, shape, length, self._task(part, shape, length, method, **more), method=method)

    def _task(self, part: str, shape: str, length: int, method: str, **more: Any) -> Any:
        left = self.end - time.monotonic()
        if left <= 0:
            return "out of time"
        sizes = {"part": part, "shape": shape, "seq_length": length, "method": method}
        return self.workers.run({**sizes, "repeats": self.options.repeats, **more}, left)

    def _add(self, part: str, shape: str, length: int, found: Any, **known: Any) -> dict[str, Any]:
        measured = {"note": found} if isinstance(found, str) else found
        row = {**self.common, "part": part, "shape": shape, "seq_length": length, **known, **measured}
        self._write(row)
        return row

    def _write(self, row: dict[str, Any]) -> None:
        """Append a row at once, so that a run that is ended keeps what it has measured."""
        path = self.options.output
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists() or not path.stat().st_size
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow({name: _rounded(value) for name, value in row.items()})


def _multiple(length: float) -> int:
    return max(1, int(length) // _GRAIN) * _GRAIN


def _rounded(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _layer_line(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    start = f"{row['shape']:8}{row['seq_length']:>8} {row['method']:10}"
    if "forward_ms" not in row:
        return start + row["note"]
    total = row["forward_ms"] + row["backward_ms"]
    ratio = ""
    if "forward_ms" in baseline:
        ratio = f"{total / (baseline['forward_ms'] + baseline['backward_ms']):.3f}x"
    gib = {name: f"{row[name] / 2**30:.2f}" for name in ("kept_bytes", "peak_bytes", "reserved_bytes")}
    return (
        f"{start}{_spread(row, 'forward'):>24}{_spread(row, 'backward'):>24}{ratio:>8}"
        f"{gib['kept_bytes']:>10}{gib['peak_bytes']:>8}{gib['reserved_bytes']:>10}"
    )


def _spread(row: dict[str, Any], name: str) -> str:
    return f"{row[f'{name}_ms']:.2f} ({row[f'{name}_p20']:.2f}-{row[f'{name}_p80']:.2f})"


def _kernel_line(row: dict[str, Any]) -> str:
    if "note" in row:
        return f"{row['method']:32}{row['note']}"

    def cell(name: str, form: str, width: int) -> str:
        return f"{row[name]:{width}{form}}" if name in row else f"{'-':>{width}}"

    cells = cell("forward_ms", ".3f", 10) + cell("gigabytes_per_second", ".0f", 8)
    return f"{row['method']:32}{cells}{cell('share_of_copy', '.1%', 9)}{cell('torch_ms', '.3f', 10)}"


if __name__ == "__main__":
    sys.exit(main())
