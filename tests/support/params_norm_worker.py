"""Norm of the weights by our function and by Megatron-LM's own: run with a core on the path that ships it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.training import utils

from helixpipe.data.prefix import DatasetInfo
from helixpipe.megatron_adapter import cpu_backend
from megatron.pretrain.initialize import seed_random_states
from megatron.pretrain.model import build_training_state
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.step import params_norm

DATA = DatasetInfo("", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500)


def main() -> None:
    """Print both norms for every command line."""
    cpu_backend.install()
    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    found = []
    for line in json.loads(sys.argv[1]):
        settings = parse_arguments(line.split(), DATA, makes_folders=False)
        seed_random_states(settings.training.seed)
        model = build_training_state(settings).model
        args = SimpleNamespace(bf16=settings.model.bf16)
        utils.get_args = lambda args=args: args
        found.append((params_norm(model), utils.calc_params_l2_norm(model)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
