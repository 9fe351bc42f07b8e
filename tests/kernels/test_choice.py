"""Layers, messages and gradient sums go through the operators: here to their references."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from memory_worker import SAVINGS, compare, gradients_of
from models import Case
from pretend import pretend_rank
from stages import configured, gpt_stage, segmented_share

from helixpipe.kernels import choice, operators
from helixpipe.layers.slices import SlicedFunction, in_slices
from helixpipe.plan.loan import Loan
from helixpipe.runtime import message
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="builds its models on a CPU")

WITH_MLP = [saving for saving in SAVINGS if saving.get("without_attention") or saving.get("mlp_chunk")]


@pytest.fixture
def calls(monkeypatch):
    """Calls of operators by name."""
    counted = Counter()

    def counting(name, original):
        def call(*arguments):
            counted[name] += 1
            return original(*arguments)

        return call

    for name in ("swiglu", "swiglu_backward", "gelu", "gelu_backward", "accumulate"):
        monkeypatch.setattr(operators, name, counting(name, getattr(operators, name)))
    monkeypatch.setattr(message.kernels, "pack", counting("pack", operators.pack))
    return counted


@pytest.mark.parametrize("build", [segmented_share, gpt_stage], ids=["segments", "stage"])
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_gradients_are_those_of_megatrons_activation(build, style, calls):
    case = Case(pp=1, style=style, seq_length=127, micro_batch_size=2, num_layers=2)
    name = "swiglu" if style == "llama" else "gelu"
    with pretend_rank(case):
        reference = gradients_of(case, build)
        assert not calls["swiglu"] + calls["gelu"]
        for saving in WITH_MLP:
            calls.clear()
            errors = compare(gradients_of(replace(case, **saving), build), reference)
            worst = max(errors, key=errors.get)
            assert errors[worst] <= 1e-6, (saving, worst, errors[worst])
            # Forward, again before the backward, and its backward.
            assert calls[name] == 2 * calls[f"{name}_backward"] > 0


@pytest.mark.parametrize(
    ("style", "values", "expected"),
    [
        ("llama", {}, "swiglu"),
        ("gpt", {}, "none"),
        ("gpt", {"bias_activation_fusion": True}, "tanh"),
        ("llama", {"activation_func_clamp_value": 7.0}, None),
        ("llama", {"glu_linear_offset": 1.0}, None),
        ("llama", {"use_te_activation_func": True}, None),
        ("gpt", {"gated_linear_unit": True}, None),
    ],
)
def test_which_activations_have_a_kernel(style, values, expected, calls):
    class Mlp:
        config = configured(Case(pp=1, style=style), **values)
        activation_func = staticmethod(config.activation_func)

    assert choice.fused_form(Mlp, torch.zeros(1)) == expected
    assert choice.fused_form(Mlp, torch.zeros(1, dtype=torch.bfloat16)) == expected
    assert choice.fused_form(Mlp, torch.zeros(1, dtype=torch.float8_e4m3fn)) is None


@pytest.mark.parametrize("form", ["swiglu", "none", "tanh"])
def test_a_backward_pass_writes_over_its_input_and_so_runs_once(form):
    leaf = torch.randn(3, 8, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    wide = leaf * 1
    result = choice.activate(wide, bias, form).sum()
    before = wide.detach().clone()
    result.backward(retain_graph=True)
    assert not torch.equal(wide, before)
    torch.testing.assert_close(leaf.grad, wide.detach())
    torch.testing.assert_close(bias.grad, wide.detach().sum(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_gradients_of_slices_are_accumulated_by_the_operator(calls):
    weight = torch.nn.Parameter(torch.randn(5, 6).to(torch.bfloat16))
    weight.main_grad = torch.ones(5, 6)
    x = torch.randn(12, 6).to(torch.bfloat16).requires_grad_()
    function = SlicedFunction(lambda x: x @ weight.t(), lambda x: x @ weight.t(), (weight,), 4)
    in_slices(function, x).sum().backward()
    assert calls["accumulate"] == 3
    parts = [torch.ones(4, 5).to(torch.bfloat16).t() @ part for part in x.detach().split(4)]
    assert torch.equal(weight.main_grad, 1 + parts[0].float() + parts[1].float() + parts[2].float())


@pytest.mark.parametrize(
    ("total", "gradient"),
    [
        (torch.zeros(4, 3, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16)),
        (torch.zeros(4, 3), torch.ones(3, 4).t()),
        (torch.zeros(4, 3), torch.ones(3)),
        (torch.zeros(4, 3, dtype=torch.float64), torch.ones(4, 3)),
    ],
    ids=["bf16 sum", "layout", "broadcast", "fp64"],
)
def test_other_sums_are_torchs(total, gradient, calls):
    choice.add_gradient(total, gradient)
    assert (total == 1).all()
    assert not calls["accumulate"]


def test_views_are_packed_into_messages_by_the_operator(calls, monkeypatch):
    """On a GPU; elsewhere, and for whole tensors, its dispatch takes longer than the copies."""
    mixed = torch.randn(4, 2, 3, 8)
    sent = [mixed[..., :3], mixed[..., 3:], torch.randn(7).t()]
    layout = MessageLayout(tuple(tensor.shape for tensor in sent), torch.float32)
    for is_on_gpu in (False, True):
        monkeypatch.setattr(message, "_has_kernel_for", lambda tensors, known=is_on_gpu: known)
        buffer = layout.empty(torch.device("cpu"))
        buffer.fill(sent)
        assert calls["pack"] == is_on_gpu
        assert all(torch.equal(a, b) for a, b in zip(buffer.tensors, sent, strict=True))


def test_gradients_of_borrowed_weights_are_summed_by_the_operator(calls):
    """At the borrower over micro batches, in bf16 each, and at the owner into its ``main_grad``."""
    weight = torch.nn.Parameter(torch.randn(5, 6).to(torch.bfloat16))
    weight.main_grad = torch.ones(5, 6)
    lending = WeightLending(lambda _: [weight], lambda _: [weight.shape], torch.bfloat16, torch.float32)
    loan = Loan(1, 0, 1, (0, 1, 2))
    lending.borrow(loan, lending.lend(1))
    (borrowed,) = lending.weights_for(1, 0)
    inputs = [torch.randn(4, 6).to(torch.bfloat16) for _ in loan.micro_batches]
    for x in inputs:
        (x @ borrowed.t()).sum().backward()
    (returned,) = lending.give_back(loan)
    assert calls["accumulate"] == len(inputs) - 1
    lending.take_back(1, (returned,))
    assert calls["accumulate"] == len(inputs)
    shares = [(torch.ones(4, 5).to(torch.bfloat16).t() @ x).float() for x in inputs]
    assert torch.equal(weight.main_grad, 1 + (shares[0] + shares[1] + shares[2]))
