"""Parameters of the published models as transformers builds them, as JSON; in a process of its own.

On the meta device, which must hold for every layer: where other tests had left something behind, a model of
billions of parameters was once really built.
"""

from __future__ import annotations

import json

import torch
import transformers
from published_models import PUBLISHED


def count(config):
    """Of one model, shared parameters once."""
    left = {name: value for name, value in config.items() if name != "torch_dtype"}
    architecture = getattr(transformers, left.pop("architectures")[0])
    with torch.device("meta"):
        built = architecture(transformers.AutoConfig.for_model(left.pop("model_type"), **left))
    assert all(parameter.is_meta for parameter in built.parameters())
    return sum({id(parameter): parameter.numel() for parameter in built.parameters()}.values())


if __name__ == "__main__":
    print(json.dumps({name: count(config) for name, config in PUBLISHED.items()}))
