"""Linear layers that leave their weight gradients for later, inside Megatron's own model."""

from collections import Counter

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from models import VOCABULARY, Case
from pretend import pretend_rank
from stages import gpt_stage

from helixpipe.layers import weight_gradient
from helixpipe.layers.weight_gradient import defer_weight_gradients
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

STYLES = [
    Case(pp=1),
    Case(pp=1, style="llama"),
    Case(pp=1, style="llama", tied=True),
    Case(pp=1, dtype=torch.float64),
    Case(pp=1, recompute="full"),
]
every_style = pytest.mark.parametrize("case", STYLES, ids=str)
KEY = (0, 0)


@pytest.fixture(autouse=True)
def _one_rank():
    with pretend_rank(Case(pp=1)):
        yield


def both_models(case, **values):
    """The same model as Megatron runs it and with a queue for its weight gradients."""
    whole, split = gpt_stage(case, **values), gpt_stage(case, **values)
    torch.manual_seed(3)
    for parameter in whole.parameters():
        # Constants would hide errors in biases and norms.
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    if case.dtype is torch.float64:
        whole, split = whole.double(), split.double()
    split.load_state_dict(whole.state_dict(), strict=True)
    queue = DeferredWeightGradients()
    defer_weight_gradients(split, queue.add)
    return whole, split, queue


def loss_of(model, case, seed=0):
    text = torch.randint(VOCABULARY, (2, case.seq_length + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(case.seq_length).expand(2, -1)
    return model(text[:, :-1], positions, None, labels=text[:, 1:]).mean()


def linear_weights(model):
    """Names of the weights of linear layers; the head's is among them unless it is the embedding's."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and module.weight is not None
    }


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@every_style
def test_gradients_are_megatrons(case):
    whole, split, queue = both_models(case)
    loss_of(whole, case).backward()
    loss = loss_of(split, case)
    with queue.collect(KEY):
        loss.backward()
    early = {name for name, gradient in gradients(split).items() if gradient is not None}
    assert early == set(gradients(split)) - linear_weights(split)
    kept = {name: gradient.clone() for name, gradient in gradients(split).items() if name in early}
    queue.run(KEY)
    for name, expected in gradients(whole).items():
        found = gradients(split)[name]
        if name == "embedding.word_embeddings.weight" and case.is_tied:
            # The embedding's part comes with B, the head's with W: two sums, added in another order.
            assert not torch.equal(kept[name], found)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
        else:
            assert torch.equal(found, expected), name
        if name in kept and not (name.startswith("embedding.word") and case.is_tied):
            assert torch.equal(kept[name], found), name


@every_style
def test_without_a_queue_that_collects_the_backward_pass_is_whole(case):
    whole, split, queue = both_models(case)
    loss_of(whole, case).backward()
    loss_of(split, case).backward()
    queue.assert_empty()
    for name, expected in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", STYLES[:2], ids=str)
def test_each_parameter_accumulates_once_per_micro_batch(case):
    """Megatron's data-parallel wrapper hooks itself to the accumulation, and counts."""
    _, split, queue = both_models(case)
    fired, hooked = Counter(), []
    for name, parameter in split.named_parameters():
        # As Megatron finds it; it lives as long as somebody holds it.
        accumulation = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        accumulation.register_hook(lambda *unused, name=name: fired.update([name]))
        hooked.append(accumulation)
    names = set(gradients(split))
    separate = names - {"embedding.word_embeddings.weight"} if case.is_tied else names
    losses = [loss_of(split, case, seed) for seed in (1, 2)]
    for micro_batch, loss in enumerate(losses):
        with queue.collect((0, micro_batch)):
            loss.backward()
    assert {name for name in fired if name in linear_weights(split)} == set()
    for micro_batch in range(2):
        queue.run((0, micro_batch))
    assert {name: fired[name] for name in separate} == dict.fromkeys(separate, 2)


def test_the_gradient_that_was_computed_becomes_the_weights_own(monkeypatch):
    """Megatron's own backward pass copies nothing either."""
    case = Case(pp=1, tied=False)
    _, split, queue = both_models(case)
    computed = []

    def noted(*arguments):
        gradient = compute(*arguments)
        computed.append(gradient.data_ptr())
        return gradient

    compute = weight_gradient._gradient
    monkeypatch.setattr(weight_gradient, "_gradient", noted)
    with queue.collect(KEY):
        loss_of(split, case).backward()
    queue.run(KEY)
    found = [split.get_parameter(name).grad.data_ptr() for name in linear_weights(split)]
    assert sorted(found) == sorted(computed)


def test_the_forward_pass_is_megatrons():
    case = Case(pp=1)
    whole, split, _ = both_models(case)
    assert torch.equal(loss_of(whole, case), loss_of(split, case))
    with torch.no_grad():
        assert torch.equal(loss_of(whole, case), loss_of(split, case))


def test_frozen_weights_stay_without_gradient():
    case = Case(pp=1)
    whole, split, queue = both_models(case)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    for model in (whole, split):
        model.get_parameter(name).requires_grad_(False)
    loss_of(whole, case).backward()
    with queue.collect(KEY):
        loss_of(split, case).backward()
    queue.run(KEY)
    assert split.get_parameter(name).grad is None
    other = "decoder.layers.0.mlp.linear_fc1.weight"
    assert torch.equal(split.get_parameter(other).grad, whole.get_parameter(other).grad)


def test_a_layer_whose_input_needs_no_gradient_has_nothing_to_split():
    case = Case(pp=1, tied=False)
    whole, split, queue = both_models(case)
    for model in (whole, split):
        model.embedding.requires_grad_(False)
        model.decoder.layers[0].input_layernorm.requires_grad_(False)
    loss_of(whole, case).backward()
    with queue.collect(KEY):
        loss_of(split, case).backward()
    first = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(split.get_parameter(first).grad, whole.get_parameter(first).grad)
    queue.run(KEY)
    for name, expected in gradients(whole).items():
        assert (expected is None) == (gradients(split)[name] is None)
        assert expected is None or torch.equal(gradients(split)[name], expected), name


@pytest.mark.parametrize(
    "option", ["gradient_accumulation_fusion", "defer_embedding_wgrad_compute", "enable_autocast"]
)
def test_options_of_megatrons_own_backward_pass_are_refused(option):
    model = gpt_stage(Case(pp=1))
    setattr(model.config, option, True)
    with pytest.raises(ValueError, match=f"{option} does not go with split backward passes"):
        defer_weight_gradients(model, lambda work: None)


def test_foreign_linear_layers_are_refused_by_name():
    class ForeignLinear(torch.nn.Linear):
        def backward_dw(self):
            """As in Transformer Engine."""

    model = torch.nn.ModuleDict({"fc1": ForeignLinear(2, 2)})
    with pytest.raises(ValueError, match=r"fc1 \(ForeignLinear\).*use --transformer-impl local"):
        defer_weight_gradients(model, lambda work: None)
