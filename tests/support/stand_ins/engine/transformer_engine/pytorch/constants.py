"""Types by their names in Transformer Engine."""

import torch

TE_DType = {torch.float32: "kFloat32", torch.float16: "kFloat16", torch.bfloat16: "kBFloat16"}
