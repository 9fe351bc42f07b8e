"""What each tensor-parallel rank does in the tests of layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from models import SEED, VOCABULARY, Case, initialize
from stages import gpt_stage, run_segments, segmented_share
from torch import Tensor

from helixpipe.layers.initialization import initialize_weights


def losses_of_both(cases: list[tuple[Case, dict[str, Any]]]) -> list[tuple[Tensor, Tensor]]:
    """Megatron's model's losses and the segmented one's, of each case with the values set for it."""
    initialize(cases[0][0])
    return [losses(case, values) for case, values in cases]


def losses(case: Case, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    text = torch.randint(VOCABULARY, (2, case.seq_length + 1), generator=torch.Generator().manual_seed(11))
    positions = torch.arange(case.seq_length).expand(2, -1)
    tokens, labels = text[:, :-1], text[:, 1:]
    found = []
    with torch.no_grad():
        for build in (gpt_stage, segmented_share):
            model = build(case, **values)
            initialize_weights(model, model.config, SEED)
            # Random numbers start anew: those of dropout and those of the tensor-parallel tracker.
            torch.manual_seed(5)
            tensor_parallel.model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
            if build is gpt_stage:
                found.append(model(tokens, positions, None, labels=labels))
            else:
                found.append(run_segments(model, tokens=tokens, position_ids=positions, labels=labels)[0])
    return found[0], found[1]
