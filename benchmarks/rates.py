"""What the planner takes a GPU for, beside what it does: products, copies, attention, a layer's pieces.

    python benchmarks/rates.py --hardware h100

The rates of ``helixpipe advise`` come from data sheets and publications. Here they stand beside a measurement
of the same thing: a ratio of measured and predicted time above 1 means that the planner promises too much.

* ``device``: a copy, and products of the layer's sizes, for as long as ``--seconds``.
* ``attention``: backends that work here, on whole sequences and on the last of eight slices.
* ``pieces``: a layer of the model as ``helixpipe profile`` measures it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from layer_benchmark.measure import timed  # noqa: E402

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import REPEATS, Real, Whole  # noqa: E402
from helixpipe.layers.attention.choice import BACKENDS, choose, place  # noqa: E402
from helixpipe.layers.attention.interface import AttentionBackend, AttentionProblem  # noqa: E402
from helixpipe.plan.cost_model import (  # noqa: E402
    HARDWARE,
    MODELS,
    Hardware,
    ModelShape,
    PieceCost,
    Workload,
    predict_pieces,
)
from helixpipe.profiling import profile  # noqa: E402

PARTS = ("device", "attention", "pieces")
# An attention's slice is the last of so many: its queries see all keys but its own later ones.
_SLICES = 8
# Operations of the backward over those of the forward: five products for two.
_BACKWARD = 2.5


class Row(NamedTuple):
    """One comparison, in milliseconds; 0 predicted where the planner has no rate for it."""

    name: str
    predicted_ms: float
    measured_ms: float
    note: str = ""


# What a piece takes in each.
_PASSES: tuple[tuple[str, Callable[[PieceCost], float]], ...] = (
    ("forward", lambda cost: cost.forward),
    ("backward", lambda cost: cost.backward + cost.weight),
)


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(
        prog="benchmark_rates", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--hardware", choices=HARDWARE, required=True, help="what the planner calls this GPU")
    add("--model", choices=MODELS, default="llama-7b")
    add("--seq-lengths", nargs="+", type=Whole(least=128), default=[2048, 8192, 32768, 131072])
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--backends", nargs="+", choices=BACKENDS, help="of attention (default: those that have a rate)")
    add("--repeats", type=REPEATS, default=3)
    add("--seconds", type=Real(above=0.0, most=600.0), default=1.0, help="of each product")
    return parser


def main() -> int:
    """Print a table for each part; 2 if there is no GPU."""
    options = build_parser().parse_args()
    if not torch.cuda.is_available():
        print("benchmark_rates: no GPU was found; the rates are those of GPUs", file=sys.stderr)
        return 2
    run = _Run(HARDWARE[options.hardware], MODELS[options.model], options)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, against {options.hardware}")
    for part in options.parts:
        print(f"\n{part:44}{'predicted ms':>13}{'measured ms':>13}{'ratio':>7}")
        for row in getattr(run, part)():
            predicted = f"{row.predicted_ms:13.3f}" if row.predicted_ms else f"{'':13}"
            ratio = f"{row.measured_ms / row.predicted_ms:7.2f}" if row.predicted_ms else f"{'':7}"
            print(f"{row.name:44}{predicted}{row.measured_ms:13.3f}{ratio}  {row.note}", flush=True)
    return 0


class _Run:
    """One start of the program."""

    def __init__(self, hardware: Hardware, model: ModelShape, options: argparse.Namespace) -> None:
        self.hardware = hardware
        self.model = model
        self.lengths: list[int] = options.seq_lengths
        self.backends: list[str] = options.backends or [name for name in BACKENDS if self._machine(name)]
        self.repeats: int = options.repeats
        self.seconds: float = options.seconds
        self.gpu = torch.device("cuda")

    def device(self) -> Iterator[Row]:
        """Products for as long as a GPU needs to reach its power limit, and a copy."""
        hardware, model, tokens = self.hardware, self.model, 16384
        source = torch.randn(2**30, device="cuda").to(torch.bfloat16)
        target = torch.empty_like(source)
        moved = 2 * source.nbytes
        peak = hardware.memory_gb_per_s * 1e6
        measured = self._steady(lambda: target.copy_(source))
        yield Row(
            "copy",
            moved / peak / hardware.memory_efficiency,
            measured,
            f"{moved / measured / peak:.2f} of the peak",
        )
        for name, rows, columns in (
            ("qkv", model.hidden_size, model.query_size + model.key_size * 2),
            ("fc1", model.hidden_size, model.fc1_size),
            ("fc2", model.mlp_width, model.hidden_size),
        ):
            left = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
            right = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
            operations = 2.0 * tokens * rows * columns
            peak = hardware.tflops * 1e9
            measured = self._steady(lambda left=left, right=right: left @ right)
            share = operations / measured / peak
            yield Row(
                f"{name}: {tokens} x {rows} x {columns}",
                operations / peak / hardware.matmul_efficiency,
                measured,
                f"{share:.2f} of the peak",
            )

    def attention(self) -> Iterator[Row]:
        """Forward and backward of one sequence's attention, all heads of a layer."""
        for name in self.backends:
            backend = self._backend(name)
            if isinstance(backend, str):
                yield Row(name, 0.0, 0.0, backend)
                continue
            for length in self.lengths:
                yield from self._attention(name, backend, length, length)
            yield from self._attention(name, backend, self.lengths[-1] // _SLICES, self.lengths[-1])

    def _attention(self, name: str, backend: AttentionBackend, queries: int, keys: int) -> Iterator[Row]:
        heads, groups, size = self.model.num_heads, self.model.num_kv_heads, self.model.head_dim

        def random(num_heads: int, tokens: int) -> torch.Tensor:
            # As Megatron's projection lays them out.
            flat = torch.randn(tokens, 1, num_heads, size, device="cuda", dtype=torch.bfloat16)
            return flat.permute(1, 2, 0, 3)

        query, grad = random(heads, queries), random(heads, queries)
        key, value = random(groups, keys), random(groups, keys)
        causal = queries == keys
        scale = size**-0.5
        results: list[object] = []

        def forward() -> None:
            results[:] = [backend.forward(query, key, value, scale, causal=causal)]

        def backward() -> None:
            backend.backward(grad, query, key, value, results[0], scale, causal=causal)  # type: ignore[arg-type]

        operations = 4.0 * queries * keys * heads * size * (0.5 if causal else 1.0)
        try:
            times = [self._median(forward), self._median(backward)]
        except RuntimeError as error:
            yield Row(f"{name} {queries} x {keys}", 0.0, 0.0, str(error).splitlines()[0][:90])
            return
        machine = self._machine(name)
        predicted = PieceCost(0.0, 0.0)
        if machine is not None:
            # Of the whole sequence, of which a slice has a part.
            predicted = predict_pieces(Workload(model=self.model, seq_length=keys), machine).times["core"]
        part = operations / self.model.core_flops(keys)
        for (kind, of_piece), ms, count in zip(_PASSES, times, (1.0, _BACKWARD), strict=True):
            reached = count * operations / ms / (self.hardware.tflops * 1e9)
            note = f"{reached:.2f} of the peak"
            yield Row(f"{name} {kind} {queries} x {keys}", part * of_piece(predicted), ms, note)

    def pieces(self) -> Iterator[Row]:
        """A layer's pieces at every length, and their sum."""
        for length in self.lengths:
            workload = Workload(model=self.model, seq_length=length)
            predicted = predict_pieces(workload, self.hardware).times
            measured = profile(workload, repeats=self.repeats, alive=1).times
            layer = [name for name in predicted if name not in ("embedding", "head")]
            rows: dict[str, tuple[PieceCost, PieceCost]] = {
                name: (predicted[name], measured[name]) for name in predicted
            }
            for kind, ms in _PASSES:
                for name, (before, found) in rows.items():
                    yield Row(f"{name} {kind} {length}", ms(before), ms(found))
                sums = [sum(ms(rows[name][i]) for name in layer) for i in (0, 1)]
                yield Row(f"LAYER {kind} {length}", *sums)

    def _backend(self, name: str) -> AttentionBackend | str:
        problem = AttentionProblem(
            *place(), torch.bfloat16, self.model.head_dim, self.model.num_heads, self.model.num_kv_heads
        )
        try:
            return choose(name, problem).backend
        except ValueError as error:
            return str(error)

    def _machine(self, backend: str) -> Hardware | None:
        """With the rates of a backend; None where none were published."""
        return self.hardware.with_attention(backend) if self.hardware.has_attention(backend) else None

    def _median(self, function: Callable[[], object]) -> float:
        return statistics.median(timed(function, self.gpu, self.repeats))

    def _steady(self, function: Callable[[], object]) -> float:
        """Of calls for so many seconds, the median of the second half."""
        count = max(4, round(self.seconds * 1e3 / self._median(function)))
        return statistics.median(timed(function, self.gpu, count)[count // 2 :])


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"\n{time.monotonic() - started:.0f} s")
    sys.exit(code)
