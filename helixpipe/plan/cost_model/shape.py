"""Models: the sizes that decide what a transformer costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a GPT or Llama.

    Attributes:
        name: for people.
        num_layers: transformer layers L.
        hidden_size: h.
        num_heads: query heads.
        num_kv_heads: key/value heads; equal to ``num_heads`` without grouped queries.
        head_dim: channels of a head.
        ffn_hidden_size: width of the MLP.
        vocab_size: words.
        gated: the MLP has a gate (SwiGLU): its first matrix is twice as wide.
        tied: the head shares the embedding's weights.
        windows: of every layer, how many tokens its attention sees, 0 for all before; empty if all see all.
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

    def __post_init__(self) -> None:
        if len(self.windows) not in (0, self.num_layers) or min(self.windows, default=0) < 0:
            raise ValueError(
                f"model {self.name}: windows must be {self.num_layers} numbers of tokens, one for each "
                f"layer, 0 for all tokens; found {self.windows!r:.60}"
            )
        for key, value in self.__dict__.items():
            if type(value) is int and value < 1:
                raise ValueError(f"model {self.name}: {key} must be at least 1, not {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model {self.name}: num_heads {self.num_heads} must be a multiple of num_kv_heads "
                f"{self.num_kv_heads}"
            )

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of all key heads, or of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def fc1_size(self) -> int:
        """Output width of the MLP's first matrix."""
        return self.ffn_hidden_size * (2 if self.gated else 1)

    @property
    def attention_parameters(self) -> Mapping[str, int]:
        """Weights of the attention block's matrices in one layer."""
        return {
            "qkv": self.hidden_size * (self.query_size + 2 * self.kv_size),
            "proj": self.hidden_size * self.query_size,
        }

    @property
    def mlp_parameters(self) -> Mapping[str, int]:
        """Weights of the MLP's matrices in one layer."""
        return {
            "fc1": self.hidden_size * self.fc1_size,
            "fc2": self.hidden_size * self.ffn_hidden_size,
        }

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer; norms and biases are left out, a thousandth of it."""
        return sum(self.attention_parameters.values()) + sum(self.mlp_parameters.values())

    @property
    def embedding_parameters(self) -> int:
        """Weights of the word embedding, and of an untied head."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.num_layers * self.layer_parameters + self.embedding_parameters * (1 if self.tied else 2)

    def forward_flops(self, seq_length: int) -> float:
        """Floating-point operations of one sequence's forward pass, causal attention at half its square."""
        linear = 2.0 * seq_length * (self.num_layers * self.layer_parameters + self.embedding_parameters)
        shares = (self.core_share(layer, seq_length) for layer in range(self.num_layers))
        return linear + sum(shares) * self.core_flops(seq_length)

    def core_flops(self, seq_length: int) -> float:
        """Operations of one layer's causal attention forward: two products over half of the s x s square."""
        return 2.0 * seq_length * seq_length * self.query_size

    def core_share(self, layer: int, seq_length: int) -> float:
        """What a layer's window leaves of causal attention: of the triangle, a band along its long side."""
        window = self.windows[layer] if self.windows else 0
        if window == 0 or window >= seq_length:
            return 1.0
        return (2 * seq_length - window) * window / seq_length**2

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """``full``, or ``window`` and its tokens, for every layer; empty names where all layers are alike."""
        if len(set(self.windows)) < 2:
            return ("",) * self.num_layers
        return tuple(f"window{window}" if window else "full" for window in self.windows)


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
