"""Fused operations are used where they are installed and right, and nowhere else."""

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from helixpipe.layers import fusions
from helixpipe.layers.optional_packages import APEX_ACCUMULATION, why_not_usable

CPU = torch.device("cpu")


def right(tensor, angles, interleaved=False):
    return rope_utils._apply_rotary_pos_emb_bshd(tensor, angles, interleaved)


def failing(*arguments, **options):
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("fused", "works"),
    [
        (right, True),
        (failing, False),
        (lambda tensor, angles, interleaved: right(tensor, -angles), False),
        (lambda tensor, angles, interleaved: right(tensor, angles)[:1], False),
        (lambda tensor, angles, interleaved: right(tensor, angles) * float("nan"), False),
    ],
    ids=["right", "raises", "backwards", "shape", "not a number"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_rotary_positions_are_tried(monkeypatch, fused, works, dtype):
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", fused)
    assert fusions.rope_trial(CPU, dtype) == works


def test_nothing_is_fused_where_nothing_is_installed():
    assert why_not_usable(APEX_ACCUMULATION) == "is not installed"
    assert not fusions.has_apex_accumulation()
    assert not fusions.can_fuse_rope(torch.float32)
    model = torch.nn.Linear(2, 2)
    fusions.fuse_weight_gradients([model])
    assert "fuse_wgrad_accumulation" not in vars(model)
