"""Work: what a layer's pieces compute, move and keep, for one micro batch on one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from helixpipe.plan.chunk_size import automatic_size
from helixpipe.plan.cost_model.shape import ModelShape

# Pieces of a layer, and of the ends of the model. ``fc1`` includes the activation function, ``head`` the
# final norm and the loss.
LAYER_PIECES = ("norm1", "qkv", "core", "proj", "norm2", "fc1", "fc2")
PIECES = ("embedding", *LAYER_PIECES, "head")

# Bytes of logits per token and word: 2 for the product's result, 4 for the fp32 softmax that is kept.
_LOGIT_BYTES = 2
_SOFTMAX_BYTES = 4
_COUNTS = (
    "seq_length", "micro_batch_size", "tensor_parallel", "context_parallel", "data_parallel",
    "expert_parallel",
)  # fmt: skip
# Of a gradient that several operations add to: fp32.
GRADIENT_BYTES = 4
# In place of tokens of a chunk: as training chooses them.
AUTOMATIC = "auto"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and how it is cut.

    Attributes:
        model: its sizes.
        seq_length: tokens s of a sequence.
        micro_batch_size: sequences b of a micro batch.
        tensor_parallel: GPUs that share a layer.
        sequence_parallel: norms and residuals are cut along the sequence, too.
        context_parallel: GPUs that share each sequence, in equal parts.
        gathers_keys: each of these takes the keys and values of the whole sequence to attend to them.
        data_parallel: replicas.
        expert_parallel: GPUs of a stage that share the experts, each of which is whole on one of them.
        distributed_optimizer: optimizer states are cut over the GPUs that hold the same weights.
        whole_logits: the loss keeps the softmax of all tokens; False if it is computed in chunks.
        mlp_chunk_size: tokens of the sequence for which norm2 and MLP run at a time, ``AUTOMATIC`` for as
            many as training chooses; None for all.
        element_bytes: of activations: 2 for bf16, 4 for fp32.
        fp8_products: the products of layers, not the head's, are computed in fp8.
    """

    model: ModelShape
    seq_length: int
    micro_batch_size: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = True
    context_parallel: int = 1
    gathers_keys: bool = False
    data_parallel: int = 1
    expert_parallel: int = 1
    distributed_optimizer: bool = False
    whole_logits: bool = True
    mlp_chunk_size: int | str | None = None
    element_bytes: int = 2
    fp8_products: bool = False

    def __post_init__(self) -> None:
        for key in _COUNTS:
            value = getattr(self, key)
            if value < 1:
                raise ValueError(f"the {key.replace('_', ' ')} must be at least 1, not {value}")
        chunk = self.mlp_chunk_size
        if not (chunk is None or chunk == AUTOMATIC or (type(chunk) is int and chunk > 0)):
            raise ValueError(f"the mlp chunk size must be tokens or {AUTOMATIC}, not {chunk!r}")
        if self.fp8_products and self.element_bytes != 2:
            raise ValueError("fp8 products need bf16 between them")
        model, t = self.model, self.tensor_parallel
        cut = {"num_heads": model.num_heads, "ffn_hidden_size": model.ffn_hidden_size}
        if model.experts is not None:
            cut["shared_ffn_hidden_size"] = model.experts.shared_ffn_hidden_size
        for key, value in cut.items():
            if value % t:
                raise ValueError(
                    f"{model.name}'s {key} {value} cannot be split over tensor-parallel size {t}; "
                    "use a divisor of it"
                )
        if self.seq_length % self.context_parallel:
            raise ValueError(
                f"{self.seq_length} tokens cannot be shared by context-parallel size {self.context_parallel}"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        experts, size = self.model.experts, self.expert_parallel
        if experts is None:
            if size > 1:
                raise ValueError(f"{self.model.name} has no experts for expert-parallel size {size} to share")
            return
        if experts.count % size:
            raise ValueError(f"{experts.count} experts cannot be shared by expert-parallel size {size}")
        if self.stage_gpus % size:
            raise ValueError(
                f"expert-parallel size {size} must divide the {self.stage_gpus} GPUs of a stage: tensor x "
                "context x data"
            )
        if self.tensor_parallel > 1 and not self.sequence_parallel:
            raise ValueError("experts beside tensor parallelism need sequence parallelism")

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch on the GPUs that share no sequence: b s over the context-parallel size."""
        return self.seq_length // self.context_parallel * self.micro_batch_size

    @property
    def stage_gpus(self) -> int:
        """GPUs of one pipeline rank and its replicas."""
        return self.tensor_parallel * self.context_parallel * self.data_parallel

    @property
    def sharded(self) -> int:
        """Into how many parts residuals and norms are cut."""
        return self.tensor_parallel if self.sequence_parallel else 1

    @property
    def unit_bytes(self) -> int:
        """A residual tensor on one GPU: b s h elements, cut by sequence parallelism."""
        return self.tokens * self.model.hidden_size * self.element_bytes // self.sharded

    def channel_bytes(self, channels: int) -> int:
        """A tensor of ``channels`` per token that is cut by tensor parallelism."""
        return self.tokens * channels * self.element_bytes // self.tensor_parallel

    @property
    def parameters(self) -> Mapping[str, int]:
        """Matrix weights that a token passes, over the tensor-parallel size, by piece."""
        model, t = self.model, self.tensor_parallel
        matrices = {**model.attention_parameters, **model.mlp_parameters}
        ends = dict.fromkeys(("embedding", "head"), model.embedding_parameters)
        return {piece: count // t for piece, count in (matrices | ends).items()}

    def held_parameters(self, layer: int) -> Mapping[str, int]:
        """Matrix weights of a layer on one GPU, by piece, ``mlp`` and ``experts`` for those of fc1 and fc2.

        What makes latents is whole on every GPU.
        """
        model, t = self.model, self.tensor_parallel
        attention, whole = model.attention_parameters, model.latent_parameters
        return {
            "qkv": whole + (attention["qkv"] - whole) // t,
            "proj": attention["proj"] // t,
            "mlp": model.dense_parameters(layer) // t,
            "experts": model.expert_parameters(layer) // self.expert_parallel,
        }

    @property
    def kept_tensors(self) -> Mapping[str, int]:
        """Bytes of each tensor that a layer's backward may need, by name.

        What only a weight's gradient needs is kept in fp8 if products are. The copy of attention's output
        that ``proj`` keeps then beside attention's own is left out, a thirtieth of a layer.
        """
        model = self.model
        kept_as = 2 if self.fp8_products else 1
        return {
            "norm1 input": self.unit_bytes,
            "norm1 output": self.unit_bytes // kept_as,
            "qkv": self.channel_bytes(model.query_size + model.key_value_size),
            "attention output": self.channel_bytes(model.attention_size),
            "log-sum-exp": self.tokens * model.num_heads * 4 // self.tensor_parallel,
            "residual": self.unit_bytes,
            "norm2 input": self.unit_bytes,
            # Experts keep a copy for each that a token passes.
            "norm2 output": self.unit_bytes * (1 + self.routed_copies) // kept_as,
            "fc1 output": self.channel_bytes(model.fc1_size),
            "activation": self.channel_bytes(model.mlp_width) // kept_as,
        }

    @property
    def rotated_bytes(self) -> int:
        """Queries and keys with rotary positions, beside those without."""
        return self.channel_bytes(self.model.query_size + self.model.key_size)

    @property
    def routed_copies(self) -> int:
        """Copies of a token that are sent to experts."""
        return self.model.experts.active if self.model.experts else 0

    @property
    def head_bytes(self) -> int:
        """What final norm, head and loss keep: their inputs and the softmax, or the input's gradient."""
        if not self.whole_logits:
            return 2 * self.unit_bytes
        return 2 * self.unit_bytes + self.num_logits * _SOFTMAX_BYTES

    @property
    def num_logits(self) -> int:
        """Logits on one GPU."""
        return self.tokens * self.model.vocab_size // self.tensor_parallel

    @property
    def mlp_share(self) -> float:
        """For which share of the tokens norm2 and MLP run at a time."""
        if self.mlp_chunk_size is None:
            return 1.0
        tokens, size = self.seq_length // self.context_parallel, self.mlp_chunk_size
        if not isinstance(size, int):
            width = self.model.fc1_size // self.tensor_parallel
            size = automatic_size(tokens, width, self.model.hidden_size // self.sharded)
        return min(1.0, size / tokens)

    @property
    def layer_workspace_bytes(self) -> int:
        """Transient peak of a layer's backward, beside what was kept."""
        return max(self.mlp_workspace_bytes, self.attention_workspace_bytes)

    @property
    def mlp_workspace_bytes(self) -> int:
        """Transient in the backward of an MLP: gathered input and gradient, the gradient of fc1's output.

        That of the activation takes the place of the activation, and the residual's passes by.
        """
        gathered = 2 * self.tokens * self.model.hidden_size * self.element_bytes if self.sharded > 1 else 0
        kept = self.kept_tensors
        return int((gathered + kept["fc1 output"]) * self.mlp_share) + kept["residual"]

    @property
    def attention_workspace_bytes(self) -> int:
        """Transient in the backward of attention: gradients of its results and of q, k, v; its kernel's own.

        The residual's gradient passes by. Kernels for bf16 add the gradient of q up in fp32 (FlashAttention-2
        and -3, cuDNN), and hold a sum per token and head of the output times its gradient.
        """
        model = self.model
        gathered = 0
        if self.gathers_keys:
            # And their gradients, before these are summed.
            gathered = 2 * self.channel_bytes(model.key_value_size) * self.context_parallel
        query = self.channel_bytes(model.query_size)
        in_fp32 = query * GRADIENT_BYTES // self.element_bytes if self.element_bytes < GRADIENT_BYTES else 0
        kept = self.kept_tensors
        results = kept["attention output"] + kept["residual"]
        return gathered + results + kept["qkv"] + in_fp32 + kept["log-sum-exp"]

    @property
    def head_workspace_bytes(self) -> int:
        """Transient peak of the head: logits and their gradient in both precisions."""
        if not self.whole_logits:
            return self.unit_bytes
        return self.num_logits * (2 * _LOGIT_BYTES + _SOFTMAX_BYTES)

    def holders(self, *, of_experts: bool = False) -> int:
        """GPUs that hold the same weights, over which their gradients are summed."""
        if of_experts:
            return self.stage_gpus // self.expert_parallel
        return self.context_parallel * self.data_parallel

    def static_bytes(self, parameters: int, *, of_experts: bool = False) -> int:
        """Weights, gradients and Adam's states for ``parameters`` matrix weights on one GPU.

        In bf16: 2 bytes of weight, 4 of gradient, and 12 of fp32 weight and two moments, which the
        distributed optimizer cuts over the weights' holders. In fp32 the weight is its own master: 4, 4, 8.
        """
        states = 12 if self.element_bytes == 2 else 8
        # fp8 products take a copy of the weight in both layouts.
        whole = parameters * (self.element_bytes + 4 + (2 if self.fp8_products else 0))
        shards = self.holders(of_experts=of_experts) if self.distributed_optimizer else 1
        return whole + parameters * states // shards
