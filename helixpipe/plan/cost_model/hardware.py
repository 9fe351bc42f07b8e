"""What a machine is to the cost model: rates that it promises, and the share of them that kernels reach."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

# The backends of training by the generation of kernels that they run; the others have no published rates.
_GENERATIONS = {
    "flash-attn-3": "flash-attn-3",
    "cudnn": "cudnn",
    "te-cudnn": "cudnn",
    "flash-attn-2": "flash-attn-2",
    "aten-flash": "flash-attn-2",
}
ATTENTION_BACKENDS = tuple(_GENERATIONS)
# Not every machine has them, or is known to lose anything.
_MAY_BE_ZERO = ("fp8_tflops", "fp8_matmul_efficiency", "attention_half_length", "idle_last_wave")


class AttentionKernel(NamedTuple):
    """What a generation of attention kernels reaches on a machine.

    Attributes:
        name: of the generation.
        forward: share of the bf16 peak on long sequences, causal, head dimension 128, counted with half of
            the square.
        backward: the same, counted with 2.5 times the forward's operations.
        half_length: tokens of a sequence on which half of that is reached; 0 where no curve is known.
    """

    name: str
    forward: float
    backward: float
    half_length: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU and the links around it. Bandwidths are of one direction.

    Attributes:
        name: for people.
        tflops: peak of dense bf16 matrix products.
        matmul_efficiency: share of the peak that large matrix products reach for as long as training takes,
            under the machine's power limit.
        fp8_tflops, fp8_matmul_efficiency: the same of fp8 products; 0 if the GPU has none.
        attention_forward_efficiency, attention_backward_efficiency, attention_half_length: of the attention
            kernel that is used, as in :class:`AttentionKernel`.
        attention_kernels: the generations with published rates, the fastest first.
        idle_last_wave: share of the multiprocessors that a product's last wave of tiles leaves idle; 0 where
            that is not counted.
        memory_gib: of one GPU.
        memory_gb_per_s: peak.
        memory_efficiency: share of it that elementwise kernels reach.
        nvlink_gb_per_s: of one GPU to the others in its node.
        nic_gb_per_s: of one network card.
        link_efficiency: share of link bandwidths that NCCL reaches on large messages.
        gpus_per_node, nics_per_node: of a node.
        multiprocessors: of one GPU, over which a kernel's tiles are dealt.
        latency_ms, node_latency_ms: of a message within and between nodes.
    """

    name: str
    tflops: float
    matmul_efficiency: float
    fp8_tflops: float = 0.0
    fp8_matmul_efficiency: float = 0.0
    attention_forward_efficiency: float
    attention_backward_efficiency: float
    attention_half_length: float = 0.0
    attention_kernels: tuple[AttentionKernel, ...] = ()
    idle_last_wave: float = 0.0
    memory_gib: float
    memory_gb_per_s: float
    memory_efficiency: float = 0.85
    nvlink_gb_per_s: float
    nic_gb_per_s: float
    link_efficiency: float = 0.8
    gpus_per_node: int = 8
    nics_per_node: int = 8
    multiprocessors: int = 132
    latency_ms: float = 0.01
    node_latency_ms: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "attention_kernels"):
                continue
            if value < 0 or (value == 0 and field.name not in _MAY_BE_ZERO):
                raise ValueError(f"hardware {self.name}: {field.name} must be above 0, not {value!r}")
            if field.name.endswith("efficiency") and value > 1:
                raise ValueError(f"hardware {self.name}: {field.name} is a share of 1, not {value!r}")
        if (self.fp8_tflops > 0) != (self.fp8_matmul_efficiency > 0):
            raise ValueError(
                f"hardware {self.name}: fp8_tflops and fp8_matmul_efficiency go together; give both or none"
            )
        for kernel in self.attention_kernels:
            if not (0 < kernel.forward <= 1 and 0 < kernel.backward <= 1 and kernel.half_length >= 0):
                raise ValueError(
                    f"hardware {self.name}: attention kernel {kernel.name} needs shares of 1 above 0 and a "
                    f"half_length that is not negative, found {tuple(kernel[1:])}"
                )

    def has_attention(self, backend: str) -> bool:
        """True if a rate of a backend of ``--attention-backend`` is known on this machine."""
        return _GENERATIONS.get(backend) in [kernel.name for kernel in self.attention_kernels]

    def with_attention(self, backend: str) -> Hardware:
        """This machine with the attention kernels of a backend of ``--attention-backend``.

        Raises:
            ValueError: a backend without a published rate on this machine; the message lists those with one.
        """
        generation = _GENERATIONS.get(backend)
        known = [kernel.name for kernel in self.attention_kernels]
        if generation not in known:
            listed = [name for name, of in _GENERATIONS.items() if of in known]
            raise ValueError(
                f"no rate of attention backend {backend} on {self.name} is known; "
                + (f"choose one of {', '.join(listed)}" if listed else "leave --attention-backend out")
            )
        kernel = self.attention_kernels[known.index(generation)]
        return replace(
            self,
            attention_forward_efficiency=kernel.forward,
            attention_backward_efficiency=kernel.backward,
            attention_half_length=kernel.half_length,
        )

    def without_short_kernel_losses(self) -> Hardware:
        """The same machine with kernels that are as good short as long."""
        return replace(self, idle_last_wave=0.0, attention_half_length=0.0)
