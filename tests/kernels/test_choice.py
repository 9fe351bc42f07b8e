"""Layers and messages as they are on a GPU, where they go to the operators: here to their references."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from memory_worker import SAVINGS, compare, gradients_of
from models import Case, relative_error
from pretend import pretend_rank
from stages import configured, gpt_stage, segmented_share

from helixpipe.kernels import choice, operators
from helixpipe.layers.slices import SlicedFunction, in_slices
from helixpipe.runtime import message
from helixpipe.runtime.message import MessageLayout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends on a CPU what a GPU does")

WITH_MLP = [saving for saving in SAVINGS if saving.get("without_attention") or saving.get("mlp_chunk")]


@pytest.fixture
def calls(monkeypatch):
    """Every tensor counts as a GPU's; calls of operators by name."""
    counted = Counter()
    for place in (choice, message):
        monkeypatch.setattr(place, "uses_kernels", lambda tensor: True)
    for name in ("swiglu", "swiglu_backward", "gelu", "gelu_backward", "accumulate"):
        original = getattr(operators, name)

        def counting(*arguments, name=name, original=original):
            counted[name] += 1
            return original(*arguments)

        monkeypatch.setattr(operators, name, counting)
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


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_bfloat16_is_as_exact_as_megatrons(style, calls):
    case = Case(pp=1, style=style, dtype=torch.bfloat16, seq_length=127, num_layers=2)
    with pretend_rank(case):
        _, exact = gradients_of(replace(case, dtype=torch.float64), gpt_stage)

        def errors(case):
            _, found = gradients_of(case, gpt_stage)
            return {name: relative_error(found[name], exact[name]) for name in exact}

        reference = errors(case)
        for saving in WITH_MLP:
            for name, error in errors(replace(case, **saving)).items():
                assert error <= 2 * reference[name], (saving, name)
    assert calls["swiglu"] + calls["gelu"] > 0


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
    assert choice.fused_form(Mlp, torch.zeros(1, dtype=torch.float64)) is None


def test_on_a_cpu_nothing_goes_to_the_operators():
    class Mlp:
        config = configured(Case(pp=1, style="llama"))
        activation_func = staticmethod(config.activation_func)

    assert choice.fused_form(Mlp, torch.zeros(1)) is None
    assert not message.uses_kernels(torch.zeros(1))


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


def test_messages_are_packed_by_the_operator(calls):
    mixed = torch.randn(4, 2, 3, 8)
    sent = [mixed[..., :3], mixed[..., 3:], torch.randn(7).t()]
    layout = MessageLayout(tuple(tensor.shape for tensor in sent), torch.float32)
    found = layout.unpack(layout.pack(sent))
    assert all(torch.equal(a, b) for a, b in zip(found, sent, strict=True))
    with pytest.raises(ValueError, match="the plan expects"):
        layout.pack(sent[:2])
