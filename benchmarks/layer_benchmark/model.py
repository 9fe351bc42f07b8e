"""A model of a few layers with embedding, head and loss: how much memory a step takes at a length."""

from __future__ import annotations

from typing import Any

import torch

from helixpipe.layers.gpt import build_gpt
from helixpipe.layers.spec import LOCAL
from layer_benchmark.measure import MemoryMeter, now_s, prepare, wrapped
from layer_benchmark.shapes import SHAPES, make_config, saving_of

# Adam's two moments and the weights in fp32, which lie beside weights and gradients during a step.
_OPTIMIZER_BYTES = 12


def measure_model(task: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One step of forward, loss and backward: its seconds and peaks. Logits are cut for every method."""
    prepare(device)
    shape, length, method = SHAPES[task["shape"]], task["seq_length"], task["method"]
    config = make_config(shape, method, task["num_layers"], device, dtype)
    model = build_gpt(
        config,
        LOCAL,
        saving_of(shape, method, length, loss=True),
        vocab_size=shape.vocab_size,
        max_sequence_length=length,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    ).to(device)
    model = wrapped(config, model)
    count = sum(parameter.numel() for parameter in model.parameters())
    optimizer_state = torch.empty(_OPTIMIZER_BYTES * count, dtype=torch.uint8, device=device)
    tokens = torch.randint(shape.vocab_size, (1, length), device=device)
    positions = torch.arange(length, device=device).unsqueeze(0)
    meter = MemoryMeter(device)
    meter.start()
    started = now_s()
    model.zero_grad_buffer()
    loss = model(tokens, positions, None, labels=tokens).float().mean()
    loss.backward()
    value = float(loss)  # waits for the device
    assert value == value, "the loss is not a number"
    return {
        "step_s": now_s() - started,
        "static_bytes": optimizer_state.numel() + sum(p.nbytes for p in model.parameters()) + 4 * count,
        "limit_bytes": torch.cuda.mem_get_info()[1] if device.type == "cuda" else 0,
        **meter.peaks(),
    }
