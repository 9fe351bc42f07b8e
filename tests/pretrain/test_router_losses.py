"""What routers add to the loss is told once an iteration: the means of the formulas, computed by hand."""

import pytest
import torch
from job_settings import job_settings
from models import Case, forget_router_losses
from pretend import pretend_rank
from stages import gpt_stage

from megatron.pretrain.router_losses import RouterLosses, take_router_losses

CASE = Case(pp=1, experts=4, style="llama", num_layers=2, seq_length=16, router=(("moe_z_loss_coeff", 0.01),))
JOB = "--num-layers 2 --global-batch-size 3 --num-experts 4 --disable-bias-linear"


def by_hand(logits):
    """Load balancing (Switch Transformers, eq. 4, for two experts of a token) and z-loss of one layer."""
    scores = logits.softmax(dim=-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(2, dim=-1).indices, 1.0)
    return (
        float(4 * (chosen.mean(dim=0) / 2 * scores.mean(dim=0)).sum()),
        float(logits.logsumexp(dim=-1).square().mean()),
    )


def test_they_are_means_over_layers_and_micro_batches(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = job_settings(f"{JOB} --moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.01")
    with pretend_rank(CASE):
        forget_router_losses()
        routers = [layer.mlp.router for layer in gpt_stage(CASE).decoder.layers]
        expected = []
        for router in routers:
            torch.nn.init.normal_(router.weight)
            for _ in range(3):
                tokens = torch.randn(16, 1, 32)
                router(tokens)
                expected.append(by_hand(tokens[:, 0] @ router.weight.detach().t()))
        balance, z = (sum(values) / len(values) for values in zip(*expected, strict=True))
        assert take_router_losses(settings) == pytest.approx((balance, z), rel=1e-5)
        assert balance > 1
        # The next iteration begins anew.
        assert take_router_losses(settings) == (0.0, 0.0)


def test_a_model_without_such_losses_has_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert take_router_losses(job_settings()) == RouterLosses(None, None)
    only = job_settings(f"{JOB} --moe-z-loss-coeff 0.01")
    with pretend_rank(CASE):
        assert take_router_losses(only).load_balancing is None
