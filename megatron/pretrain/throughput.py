"""Floating-point operations of training per second and GPU, and the time that is left."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from helixpipe.plan.cost_model.hardware import Hardware
from megatron.pretrain.settings.job import JobSettings
from megatron.pretrain.settings.schedule_choice import known_machine

_TFLOP = 1e12


@dataclass(frozen=True)
class ModelFlops:
    """Operations of one iteration: products of forward and backward pass, the backward twice the forward.

    What is computed again does not count. This is what Megatron-LM counts, too.

    Attributes:
        causal: with half of attention's square, which a causal mask leaves.
        whole_square: with all of it, as some publications count.
        peak: of one GPU per second, for bf16 products; 0 if it is not known.
    """

    causal: float
    whole_square: float
    peak: float

    @classmethod
    def of(cls, settings: JobSettings) -> ModelFlops:
        """Of a job with sequences that are all equally long."""
        model, length = settings.workload.model, settings.training.seq_length
        sequences = 3.0 * settings.training.global_batch_size
        causal = sequences * model.forward_flops(length)
        square = sequences * model.num_layers * model.core_flops(length)
        machine = known_machine(settings.watching.hardware, settings.model.attention_backend)
        peak = machine.tflops * _TFLOP if isinstance(machine, Hardware) else 0.0
        return cls(causal, causal + square, peak)

    def tflops(self, elapsed_ms: float, num_gpus: int) -> tuple[float, float]:
        """Per second and GPU, causal and with the whole square."""
        seconds = elapsed_ms / 1e3 * num_gpus * _TFLOP
        return self.causal / seconds, self.whole_square / seconds

    def mfu(self, elapsed_ms: float, num_gpus: int) -> float | None:
        """Share of the peak, with half of attention's square; None where the peak is not known."""
        return self.tflops(elapsed_ms, num_gpus)[0] * _TFLOP / self.peak if self.peak else None

    def text(self, elapsed_ms: float, num_gpus: int) -> str:
        """For the terminal."""
        causal, square = self.tflops(elapsed_ms, num_gpus)
        found = (
            f"throughput per GPU (TFLOP/s/GPU): {causal:.1f} | "
            f"with the whole square of attention: {square:.1f}"
        )
        share = self.mfu(elapsed_ms, num_gpus)
        return found if share is None else f"{found} | MFU: {100 * share:.1f}%"


class TimeToFinish:
    """What the iterations that are left will take, by the median of the last ones."""

    def __init__(self, num_iterations: int) -> None:
        self._num_iterations = num_iterations
        self._last: deque[float] = deque(maxlen=20)

    def after(self, iteration: int, elapsed_ms: float) -> str:
        """As hours:minutes:seconds, evaluations and saves not included; empty after the last iteration.

        Args:
            iteration: that has finished.
            elapsed_ms: it took.
        """
        self._last.append(elapsed_ms)
        left = self._num_iterations - iteration
        if left <= 0:
            return ""
        middle = sorted(self._last)[len(self._last) // 2]
        minutes, seconds = divmod(round(left * middle / 1e3), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"
