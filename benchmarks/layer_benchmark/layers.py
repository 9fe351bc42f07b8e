"""One transformer layer of Megatron's, forward and backward, under each way of recomputing."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from helixpipe.layers.spec import LOCAL, block_spec
from layer_benchmark.measure import MemoryMeter, clock_of, now_s, percentiles, prepare, wrapped
from layer_benchmark.shapes import SHAPES, Shape, make_config, saving_of

# The median wants some samples, however long a step takes.
_FEWEST = 3


def measure_layer(task: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Columns of one configuration: forward and backward times, kept, peak and reserved bytes."""
    prepare(device)
    shape, length = SHAPES[task["shape"]], task["seq_length"]
    layer = Layer(shape, task["method"], length, device, dtype)
    meter = MemoryMeter(device)
    layer.step()  # compiles Megatron's fused functions, fills the allocator and the libraries' workspaces
    if device.type == "cuda":
        torch.cuda.synchronize()
    meter.start()
    weights = meter.held()
    forwards, backwards = [], []
    started = now_s()
    while len(forwards) < _FEWEST or (
        len(forwards) < task["repeats"] and now_s() - started < task["budget_s"]
    ):
        marks, kept = layer.step(meter)
        forwards.append(layer.clock.elapsed_ms(marks[0], marks[1]))
        backwards.append(layer.clock.elapsed_ms(marks[1], marks[2]))
    return {
        **percentiles("forward", forwards),
        **percentiles("backward", backwards),
        "samples": len(forwards),
        "kept_bytes": kept,
        "static_bytes": weights,
        **meter.peaks(),
    }


class Layer:
    """A block of one layer, wrapped for training, and what a step needs."""

    def __init__(
        self, shape: Shape, method: str, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        config = make_config(shape, method, 1, device, dtype)
        spec = block_spec(config, LOCAL, saving=saving_of(shape, method, length))
        block = TransformerBlock(config, spec, post_layer_norm=False, post_process=False)
        self.clock = clock_of(device)
        self.model = wrapped(config, block.to(device))
        self.angles = RotaryEmbedding(
            shape.head_dim, rotary_percent=1.0, use_cpu_initialization=device.type == "cpu"
        )(length)
        self.hidden = torch.randn(length, 1, shape.hidden_size, device=device, dtype=dtype)
        self.grad = torch.randn_like(self.hidden)

    def step(self, meter: MemoryMeter | None = None) -> tuple[list[object], int]:
        """Forward and backward: marks at their ends, and the bytes that stay after the forward."""
        self.model.zero_grad_buffer()
        hidden = self.hidden.detach().requires_grad_()
        before = meter.held() if meter else 0
        marks = [self.clock.mark()]
        output: Tensor = self.model(hidden, None, rotary_pos_emb=self.angles)
        marks.append(self.clock.mark())
        # With the output, which the next layer keeps as its input.
        kept = meter.held() - before if meter else 0
        output.backward(self.grad)
        marks.append(self.clock.mark())
        return marks, kept
