"""The cost of a chunk on a stage: time and memory (InfiniPipe, arXiv 2509.21275, section 4.2).

All coefficients are of one layer, so that they hold for any number of layers and stages: the paper's
``alpha1``, ``alpha2``, ``beta1`` and ``M_token`` are L times ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.costs.layer_cut import CutLevel, LayerCut
from helixpipe.plan.simulation.network import Network


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Milliseconds of one direction, forward or backward.

    Attributes:
        attention_ms: alpha1, per layer and squared token on one GPU; an uncut sequence of s tokens has s^2.
        token_ms: alpha2, per layer and token on one GPU: everything that is linear.
        layer_ms: beta1, per layer and chunk, whatever its size.
        communication_ms: per layer and token between the GPUs of a stage, at the tensor-parallel size of the
            costs. Fitted costs have it in ``token_ms``, from which measurements cannot tell it.
        head_ms: per token on one GPU, of the final norm, the head and the loss on the last stage.
    """

    attention_ms: float
    token_ms: float
    layer_ms: float = 0.0
    communication_ms: float = 0.0
    head_ms: float = 0.0

    def layer_time(self, area: float, tokens: float, tensor_parallel: int) -> float:
        """Milliseconds of one layer: ``T_comp`` without the head, plus communication."""
        computed = self.attention_ms * area + self.token_ms * tokens
        return computed / tensor_parallel + self.communication_ms * tokens + self.layer_ms


@dataclass(frozen=True, kw_only=True)
class ChunkCosts:
    """What chunks cost on a stage of ``d_s`` GPUs.

    Bytes per token are of all GPUs of a stage together; each holds a ``tensor_parallel``-th of them.

    Attributes:
        source: where the coefficients come from, for people.
        forward, backward: times.
        token_bytes: ``M_token``, that one layer keeps per token until its backward.
        input_bytes: ``e D``, a layer's input per token: what is kept of a checkpointed layer, and the size of
            a message.
        kv_bytes: ``2 e D_kv``, keys and values of one layer per token.
        kv_gradient_bytes: of their gradients, which are summed in fp32; ``kv_bytes`` if None, the paper's.
        logits_bytes: ``M_logits``, that the last stage keeps per token beside its layers.
        head_workspace_bytes: that exist per token while the last stage computes the logits or their gradient.
        layer_workspace_bytes: that exist per token in the backward of a layer, beside what it kept.
        tensor_parallel: ``d_s``, GPUs that share a stage.
        token_multiple: of which every chunk's tokens must be one, and to which it is padded: ``d_s`` with
            sequence parallelism, else 1.
        layer_state_bytes: weights, gradients and optimizer states of a layer, on one GPU.
        embedding_state_bytes, head_state_bytes: of the first and the last stage beside their layers.
        shared_state_bytes: of the head's, what it shares with the embedding where both are on one GPU.
        network: links between stages; None for free messages.
        cut: how a layer's costs fall to its parts, for elastic helix; None if that is not known.
        cuts_with_weights: the same for attention ranges whose weights are lent.
    """

    source: str
    forward: PassTime
    backward: PassTime
    token_bytes: float
    input_bytes: float
    kv_bytes: float
    kv_gradient_bytes: float | None = None
    logits_bytes: float = 0.0
    head_workspace_bytes: float = 0.0
    layer_workspace_bytes: float = 0.0
    tensor_parallel: int = 1
    token_multiple: int = 1
    layer_state_bytes: int = 0
    embedding_state_bytes: int = 0
    head_state_bytes: int = 0
    shared_state_bytes: int = 0
    network: Network | None = None
    cut: LayerCut | None = None
    cuts_with_weights: tuple[LayerCut, ...] = ()

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel must be at least 1, not {self.tensor_parallel}")
        if self.token_multiple not in (1, self.tensor_parallel):
            raise ValueError(
                f"token_multiple is 1 or, with sequence parallelism, tensor_parallel "
                f"({self.tensor_parallel}), not {self.token_multiple}"
            )
        if self.shared_state_bytes > self.head_state_bytes:
            raise ValueError(
                f"shared_state_bytes ({self.shared_state_bytes}) are among head_state_bytes "
                f"({self.head_state_bytes}) and cannot be more"
            )
        if self.forward.token_ms + self.backward.token_ms <= 0:
            raise ValueError("token_ms must be above 0 forward or backward: every token costs time")
        if self.token_bytes < self.input_bytes + self.kv_bytes:
            raise ValueError(
                f"token_bytes ({self.token_bytes:g}) is what a layer keeps, and holds its input and keys and "
                f"values: it cannot be below input_bytes + kv_bytes ({self.input_bytes + self.kv_bytes:g})"
            )

    def layer_ms(self, area: float, tokens: float) -> float:
        """Milliseconds of one layer in both directions: the measure by which chunks are made equal."""
        d_s = self.tensor_parallel
        return self.forward.layer_time(area, tokens, d_s) + self.backward.layer_time(area, tokens, d_s)

    def padded(self, chunk: Chunk) -> int:
        """Tokens that a chunk is computed with."""
        return -(-chunk.tokens // self.token_multiple) * self.token_multiple

    def padded_area(self, chunk: Chunk) -> float:
        """Area that a chunk is computed with: the padding is a sequence of its own."""
        return chunk.area + (self.padded(chunk) - chunk.tokens) ** 2

    def head_ms(self, time: PassTime, chunk: Chunk) -> float:
        """Milliseconds of the head in one direction."""
        return time.head_ms * self.padded(chunk) / self.tensor_parallel

    def recompute_ms(self, chunk: Chunk) -> float:
        """Milliseconds to compute one layer's forward again."""
        return self._layer_ms(self.forward, chunk)

    def forward_ms(self, chunk: Chunk, num_layers: int, *, is_last: bool) -> float:
        """Milliseconds of the forward on a stage of ``num_layers`` layers."""
        return self._stage_ms(self.forward, chunk, num_layers, is_last)

    def backward_ms(self, chunk: Chunk, num_layers: int, *, is_last: bool) -> float:
        """Milliseconds of the backward on a stage of ``num_layers`` layers, without recomputation."""
        return self._stage_ms(self.backward, chunk, num_layers, is_last)

    def _stage_ms(self, time: PassTime, chunk: Chunk, num_layers: int, is_last: bool) -> float:
        head_ms = self.head_ms(time, chunk) if is_last else 0.0
        return num_layers * self._layer_ms(time, chunk) + head_ms

    def _layer_ms(self, time: PassTime, chunk: Chunk) -> float:
        return time.layer_time(self.padded_area(chunk), self.padded(chunk), self.tensor_parallel)

    def activation_bytes(self, chunk: Chunk, num_layers: int, *, is_last: bool) -> int:
        """``M_act`` less ``M_dkv``: bytes on each GPU from forward to backward with nothing checkpointed."""
        per_token = num_layers * self.token_bytes + (self.logits_bytes if is_last else 0.0)
        return ceil(per_token * self.padded(chunk) / self.tensor_parallel)

    def gradient_bytes(self, chunk: Chunk, num_layers: int) -> int:
        """``M_dkv``: bytes on each GPU of the gradients that later slices add to.

        The paper counts them from the forward on; they exist from the backward of the sequence's last slice.
        """
        per_token = self.kv_bytes if self.kv_gradient_bytes is None else self.kv_gradient_bytes
        return ceil(num_layers * per_token * chunk.continued_tokens / self.tensor_parallel)

    def saved_bytes(self, chunk: Chunk) -> int:
        """Bytes on each GPU that one checkpointed layer does not keep.

        It keeps its input, and the keys and values that later slices read. A whole number, so that bytes
        are exactly linear in the number of checkpointed layers.
        """
        per_token = self.token_bytes - self.input_bytes
        saved = per_token * self.padded(chunk) - self.kv_bytes * chunk.continued_tokens
        return int(saved / self.tensor_parallel)

    def workspace_bytes(self, chunk: Chunk, *, is_last: bool, recomputes: bool) -> int:
        """Bytes on each GPU that exist only while an operation runs.

        Of a layer's backward, with the layer's whole activation where that is computed again; or of the head,
        which does not run at the same time.
        """
        layer = self.layer_workspace_bytes + (self.token_bytes if recomputes else 0.0)
        per_token = max(layer, self.head_workspace_bytes if is_last else 0.0)
        return ceil(per_token * self.padded(chunk) / self.tensor_parallel)

    def message_bytes(self, chunk: Chunk) -> int:
        """Bytes of the message between two stages, on all GPUs of a stage."""
        return ceil(self.input_bytes * self.padded(chunk))

    def state_bytes(self, stage: int, num_stages: int, num_layers: int) -> int:
        """``states(q)``: bytes on each GPU of a stage of ``num_layers`` layers whatever it computes."""
        is_first, is_last = stage == 0, stage == num_stages - 1
        ends = self.embedding_state_bytes * is_first + self.head_state_bytes * is_last
        shared = self.shared_state_bytes * (is_first and is_last)
        return num_layers * self.layer_state_bytes + ends - shared


def ideal_costs(
    *,
    balanced_length: float = 49152.0,
    backward_ratio: float = 2.0,
    token_ms: float = 1e-3,
    token_bytes: float = 17.0,
    input_bytes: float = 1.0,
    kv_bytes: float = 1.0,
) -> ChunkCosts:
    """Costs with free messages, nothing fixed and nothing beside layers: what a schedule alone decides.

    Args:
        balanced_length: tokens of a sequence whose attention takes as long as all the rest: 12 h for a GPT
            (24 h^2 linear operations per token against 2 s h), 49152 for h = 4096.
        backward_ratio: backward over forward.
        token_ms, token_bytes, input_bytes, kv_bytes: of one layer.
    """
    forward = PassTime(attention_ms=token_ms / balanced_length, token_ms=token_ms)
    backward = PassTime(
        attention_ms=backward_ratio * forward.attention_ms, token_ms=backward_ratio * forward.token_ms
    )
    return ChunkCosts(
        source="ideal",
        forward=forward,
        backward=backward,
        token_bytes=token_bytes,
        input_bytes=input_bytes,
        kv_bytes=kv_bytes,
        cut=_ideal_cut(token_bytes, input_bytes, kv_bytes),
    )


def _ideal_cut(token_bytes: float, input_bytes: float, kv_bytes: float) -> LayerCut:
    """Of a GPT, whose QKV are 3 of the 12 h^2 of a layer; attention keeps its inputs and its output."""
    attention = min(2 * input_bytes + kv_bytes, token_bytes - input_bytes)
    level = CutLevel(
        recompute="none",
        before_bytes=input_bytes,
        attention_bytes=attention,
        after_bytes=token_bytes - input_bytes - attention,
    )
    return LayerCut(
        forward_before=0.25,
        backward_before=0.25,
        into_bytes=2 * input_bytes + kv_bytes,
        out_bytes=2 * input_bytes,
        levels=(level,),
    )
