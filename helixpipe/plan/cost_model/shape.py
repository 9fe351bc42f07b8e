"""Models: the sizes that decide what a transformer costs, and how many weights it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helixpipe.plan.layer_patterns import kinds_of_mlps
from helixpipe.plan.windows import join_kinds, kinds_of_windows


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in the place of the MLP, in all layers or some.

    Attributes:
        count: experts that tokens are routed to.
        active: those of them that a token passes.
        ffn_hidden_size: width of one.
        shared_ffn_hidden_size: width of the experts that every token passes, together; 0 without.
        dense_layers: numbers, from 0, of the layers without, whose MLP has the model's ``ffn_hidden_size``.
    """

    count: int
    active: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int = 0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count or self.ffn_hidden_size < 1:
            raise ValueError(
                f"{self.active} of {self.count} experts of width {self.ffn_hidden_size} cannot be active; "
                "give at least 1, at most all, and a width above 0"
            )
        if self.shared_ffn_hidden_size < 0 or min(self.dense_layers, default=0) < 0:
            raise ValueError("the width of shared experts and dense layers' numbers must not be negative")


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), as training computes it.

    Attributes:
        query_rank: channels of the queries' latent; 0 if queries have none.
        key_value_rank: channels of the latent of keys and values.
        rope_head_dim: channels of a head that carry positions, which all heads' keys share.
        value_head_dim: channels of a head's values.
    """

    query_rank: int
    key_value_rank: int
    rope_head_dim: int
    value_head_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        name: for people.
        num_layers: transformer layers L.
        hidden_size: h.
        num_heads: query heads.
        num_kv_heads: key/value heads; equal to ``num_heads`` without grouped queries.
        head_dim: channels of a head's queries and keys, and of its values unless attention is latent.
        ffn_hidden_size: width of the MLP.
        vocab_size: words.
        gated: the MLP has a gate (SwiGLU): its first matrix is twice as wide.
        tied: the head shares the embedding's weights.
        windows: of every layer, how many tokens its attention sees, 0 for all before; empty if all see all.
        experts: in the place of the MLP; None for a dense model.
        latent: of latent attention; None for queries, keys and values straight from the hidden state.
        other_parameters: weights outside of the large matrix products, of all layers together: norms, biases,
            routers, attention sinks and learned positions. They are counted and cost nothing.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    gated: bool
    tied: bool
    windows: tuple[int, ...] = ()
    experts: Experts | None = None
    latent: LatentAttention | None = None
    other_parameters: int = 0

    def __post_init__(self) -> None:
        if len(self.windows) not in (0, self.num_layers) or min(self.windows, default=0) < 0:
            raise ValueError(
                f"model {self.name}: windows must be {self.num_layers} numbers of tokens, one for each "
                f"layer, 0 for all tokens; found {self.windows!r:.60}"
            )
        for key, value in self.__dict__.items():
            if type(value) is int and value < (key != "other_parameters"):
                raise ValueError(f"model {self.name}: {key} must be at least 1, not {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model {self.name}: num_heads {self.num_heads} must be a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )
        dense = () if self.experts is None else self.experts.dense_layers
        if max(dense, default=0) >= self.num_layers:
            raise ValueError(f"model {self.name}: a dense layer {max(dense)} of {self.num_layers} layers")

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Channels of all key heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Channels of all key heads and all value heads together."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim)

    @property
    def value_head_dim(self) -> int:
        """Channels of a head's values."""
        return self.latent.value_head_dim if self.latent else self.head_dim

    @property
    def attention_size(self) -> int:
        """Channels of attention's output."""
        return self.num_heads * self.value_head_dim

    @property
    def mlp_width(self) -> int:
        """Channels between the MLP's matrices that a token passes."""
        if self.experts is None:
            return self.ffn_hidden_size
        return self.experts.active * self.experts.ffn_hidden_size + self.experts.shared_ffn_hidden_size

    @property
    def fc1_size(self) -> int:
        """Output width of the MLP's first matrices that a token passes."""
        return self.mlp_width * (2 if self.gated else 1)

    @property
    def latent_parameters(self) -> int:
        """Weights of the matrices that make latents, which tensor parallelism does not cut."""
        if self.latent is None:
            return 0
        latents = self.latent.query_rank + self.latent.key_value_rank + self.latent.rope_head_dim
        return self.hidden_size * latents

    @property
    def attention_parameters(self) -> Mapping[str, int]:
        """Weights of the attention block's matrices in one layer."""
        qkv = self.hidden_size * (self.query_size + self.key_value_size)
        if self.latent is not None:
            from_latent = self.num_heads * (self.head_dim - self.latent.rope_head_dim + self.value_head_dim)
            queries = (self.latent.query_rank or self.hidden_size) * self.query_size
            qkv = self.latent_parameters + queries + self.latent.key_value_rank * from_latent
        return {"qkv": qkv, "proj": self.hidden_size * self.attention_size}

    @property
    def mlp_parameters(self) -> Mapping[str, int]:
        """Weights of the MLP's matrices in one layer that a token passes."""
        return {"fc1": self.hidden_size * self.fc1_size, "fc2": self.hidden_size * self.mlp_width}

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's matrices that a token passes."""
        return sum(self.attention_parameters.values()) + sum(self.mlp_parameters.values())

    def has_experts(self, layer: int) -> bool:
        """True for a layer with a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def mlp_share(self, layer: int) -> float:
        """The width of a layer's MLP over ``mlp_width``: some layers of a mixture may be dense."""
        if self.experts is None or self.has_experts(layer):
            return 1.0
        return self.ffn_hidden_size / self.mlp_width

    def expert_parameters(self, layer: int) -> int:
        """Weights of the experts that a layer's tokens are routed to, all of them."""
        if self.experts is None or not self.has_experts(layer):
            return 0
        return self.experts.count * self._matrices(self.experts.ffn_hidden_size)

    def dense_parameters(self, layer: int) -> int:
        """Weights of a layer's MLP, or shared experts, that all tokens pass."""
        if self.experts is None or not self.has_experts(layer):
            return self._matrices(self.ffn_hidden_size)
        return self._matrices(self.experts.shared_ffn_hidden_size)

    def _matrices(self, width: int) -> int:
        return self.hidden_size * width * (3 if self.gated else 2)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the word embedding, and of an untied head."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights."""
        layers = self.num_layers * sum(self.attention_parameters.values())
        layers += sum(self.expert_parameters(i) + self.dense_parameters(i) for i in range(self.num_layers))
        return layers + self.embedding_parameters * (1 if self.tied else 2) + self.other_parameters

    def forward_flops(self, seq_length: int) -> float:
        """Floating-point operations of one sequence's forward pass, causal attention at half its square."""
        layers = range(self.num_layers)
        attention, mlp = (sum(p.values()) for p in (self.attention_parameters, self.mlp_parameters))
        weights = self.num_layers * attention + sum(self.mlp_share(layer) for layer in layers) * mlp
        linear = 2.0 * seq_length * (weights + self.embedding_parameters)
        shares = (self.core_share(layer, seq_length) for layer in layers)
        return linear + sum(shares) * self.core_flops(seq_length)

    def core_flops(self, seq_length: int) -> float:
        """Operations of one layer's causal attention forward: two products over half of the s x s square."""
        return 1.0 * seq_length * seq_length * (self.query_size + self.attention_size)

    def core_share(self, layer: int, seq_length: int) -> float:
        """What a layer's window leaves of causal attention: of the triangle, a band along its long side."""
        window = self.windows[layer] if self.windows else 0
        if window == 0 or window >= seq_length:
            return 1.0
        return (2 * seq_length - window) * window / seq_length**2

    @property
    def only_planned(self) -> tuple[str, ...]:
        """What the model has that plans know, and training does not."""
        return () if self.latent is None else ("latent attention",)

    @property
    def beside_dense(self) -> tuple[str, ...]:
        """What the model has beside dense layers that attend to all tokens before."""
        has = {
            "experts": self.experts is not None,
            "windows": any(self.windows),
            "latent attention": self.latent is not None,
        }
        return tuple(name for name, is_there in has.items() if is_there)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """What a layer has of its own, ``full`` attention, ``window`` and its tokens, a ``dense`` MLP or
        ``experts``, for every layer; empty names where all layers are alike.
        """
        mlps = kinds_of_mlps([self.has_experts(layer) for layer in range(self.num_layers)])
        return join_kinds(*filter(None, (kinds_of_windows(self.windows), mlps))) or ("",) * self.num_layers


def _llama(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int
) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        gated=True,
        tied=False,
    )


def _gpt(name: str, layers: int, hidden: int, heads: int) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden_size=4 * hidden,
        vocab_size=50304,  # GPT-2's 50257, padded to a multiple of 128
        gated=False,
        tied=True,
    )


MODELS: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        # Llama 1, table 2 of arXiv 2302.13971; Llama 2 70B, arXiv 2307.09288.
        _llama("llama-7b", 32, 4096, 32, 32, 11008, 32000),
        _llama("llama-13b", 40, 5120, 40, 40, 13824, 32000),
        _llama("llama-70b", 80, 8192, 64, 8, 28672, 32000),
        # Llama 3, table 3 of arXiv 2407.21783.
        _llama("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
        _llama("llama3-70b", 80, 8192, 64, 8, 28672, 128256),
        _llama("llama3-405b", 126, 16384, 128, 8, 53248, 128256),
        # GPT-3, table 2.1 of arXiv 2005.14165 (1.3B with 16 heads of 128, as is usual; 3B is its 2.7B).
        _gpt("gpt-1.3b", 24, 2048, 16),
        _gpt("gpt-3b", 32, 2560, 32),
        _gpt("gpt-7b", 32, 4096, 32),
        # Qwen's published config.json files.
        _llama("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064),
        _llama("qwen3-8b", 36, 4096, 32, 8, 12288, 151936),
    )
}


def size_of(source: str, found: Mapping[str, Any], keys: tuple[str, ...], default: int | None = None) -> int:
    """The first of ``keys`` that is there, a whole number above 0; ``ValueError`` for anything else."""
    for key in keys:
        value = found.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not str(value).isdigit() or int(value) < 1:
            raise ValueError(f"model {source}: {key} must be a whole number above 0, found {value!r:.40}")
        return int(value)
    if default is None:
        raise ValueError(f"model {source}: {' or '.join(keys)} is missing")
    return default
