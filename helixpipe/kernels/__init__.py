"""CUDA kernels as torch operators: ``torch.ops.helixpipe``, each with a torch reference of the same name.

Every operator writes into tensors that it is given, so that slices and messages can share their buffers. On a
GPU they run the kernels of ``csrc/``; elsewhere, and where those were not built, :mod:`helixpipe.kernels.
reference`.
"""

from helixpipe.kernels.operators import (
    accumulate,
    gelu,
    gelu_backward,
    merge_attention,
    pack,
    swiglu,
    swiglu_backward,
)

__all__ = [
    "accumulate",
    "gelu",
    "gelu_backward",
    "merge_attention",
    "pack",
    "swiglu",
    "swiglu_backward",
]
