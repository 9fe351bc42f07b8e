"""Times of a layer's pieces and of the model's ends, on Megatron's modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.spec import LayerPart
from helixpipe.plan.cost_model import PieceCost, Workload
from helixpipe.profiling.stopwatch import Stopwatch, Times


def measure_pieces(
    model: SegmentedGPTModel, workload: Workload, stopwatch: Stopwatch, device: torch.device
) -> dict[str, PieceCost]:
    """Times of every piece of ``workload`` on ``device``.

    A run of pieces is timed as segments run it, and its time is shared out by the times of the single pieces:
    so sums are right, and the split is as right as it can be.
    """
    return _Measurement(model, workload, stopwatch, device).pieces()


class _Measurement:
    def __init__(
        self, model: SegmentedGPTModel, workload: Workload, stopwatch: Stopwatch, device: torch.device
    ) -> None:
        self.model = model
        self.workload = workload
        self.stopwatch = stopwatch
        self.layer: Any = model.decoder.layers["0"]  # Megatron's TransformerLayer
        self.dtype = model.config.params_dtype
        self.device = device
        s, b = workload.seq_length, workload.micro_batch_size
        shapes = model.edge_shapes(0, s, b)
        self.query, self.key, self.value, self.hidden = (self._random(shape) for shape in shapes)
        self.context = self._random(model.edge_shapes(1, s, b)[0])
        self.tokens = torch.randint(model.vocab_size, (b, s), device=device)
        self.positions = torch.arange(s, device=device).expand(b, s)

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def pieces(self) -> dict[str, PieceCost]:
        """Every piece of :data:`PIECES`."""
        model, times = self.model, self.stopwatch.times
        layer = self.layer
        mlp, attention = layer.mlp, layer.self_attention
        before = self._shared(
            times(lambda x: model._run_parts(layer, 0, LayerPart.PRE, (x,)), [self.hidden]),
            {
                "norm1": times(layer.input_layernorm, [self.hidden]),
                "qkv": times(attention.get_query_key_value_tensors, [self.hidden]),
            },
        )
        activated = mlp.linear_fc1(self.hidden)[0].shape[-1] // (2 if self.workload.model.gated else 1)
        wide = self._random((self.workload.seq_length, self.workload.micro_batch_size, activated))
        after = self._shared(
            times(
                lambda o, x: model._run_parts(layer, 0, LayerPart.POST, (o, x)), [self.context, self.hidden]
            ),
            {
                "proj": times(lambda o, x: attention.linear_proj(o)[0] + x, [self.context, self.hidden]),
                "norm2": times(layer.pre_mlp_layernorm, [self.hidden]),
                "fc1": times(self._fc1, [self.hidden]),
                "fc2": times(lambda a, x: mlp.linear_fc2(a)[0] + x, [wide, self.hidden]),
            },
        )
        core = times(
            lambda q, k, v: model.forward_segment(1, (q, k, v, self.hidden))[0],
            [self.query, self.key, self.value],
        )
        ends = {
            "embedding": times(
                lambda t, i: model.embedding(input_ids=t, position_ids=i), [self.tokens, self.positions]
            ),
            "head": times(self._head, [self.hidden]),
        }
        found = {**before, **after, "core": core, **ends}
        weights = self._weight_times()
        return {
            name: PieceCost(t.forward, max(0.0, t.backward - weights.get(name, 0.0)), weights.get(name, 0.0))
            for name, t in found.items()
        }

    def _head(self, hidden: Tensor) -> Tensor:
        """The mean loss, as the last segment computes it from the last layer's output."""
        model = self.model
        assert model.decoder.final_layernorm is not None
        weight = model.embedding.word_embeddings.weight if model.output_layer.weight is None else None
        logits, _ = model.output_layer(model.decoder.final_layernorm(hidden), weight=weight)
        output: Tensor = model.compute_language_model_loss(self.tokens, logits).mean()
        return output

    def _fc1(self, hidden: Tensor) -> Tensor:
        """The MLP's first matrix and activation function, as Megatron's MLP without fused kernels."""
        mlp = self.layer.mlp
        wide, bias = mlp.linear_fc1(hidden)
        if bias is not None:
            wide = wide + bias
        if not self.workload.model.gated:
            activated: Tensor = mlp.activation_func(wide)
            return activated
        gate, up = wide.chunk(2, dim=-1)
        product: Tensor = mlp.activation_func(gate) * up
        return product

    @staticmethod
    def _shared(whole: Times, parts: Mapping[str, Times]) -> dict[str, Times]:
        forward = sum(part.forward for part in parts.values())
        backward = sum(part.backward for part in parts.values())
        return {
            name: Times(whole.forward * part.forward / forward, whole.backward * part.backward / backward)
            for name, part in parts.items()
        }

    def _weight_times(self) -> dict[str, float]:
        """Milliseconds of the product that makes each matrix's weight gradient."""
        tokens = self.workload.tokens
        layer = self.layer
        embedding = self.model.embedding.word_embeddings.weight
        head = self.model.output_layer.weight
        matrices = {
            "qkv": layer.self_attention.linear_qkv.weight,
            "proj": layer.self_attention.linear_proj.weight,
            "fc1": layer.mlp.linear_fc1.weight,
            "fc2": layer.mlp.linear_fc2.weight,
            "head": embedding if head is None else head,
        }
        found = {}
        for name, matrix in matrices.items():
            into, out = self._random((tokens, matrix.shape[1])), self._random((tokens, matrix.shape[0]))
            found[name] = self.stopwatch.plain(partial(out.t().matmul, into))
        return found
