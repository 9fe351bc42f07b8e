"""What Megatron's GPTModel lacks: on its own model and on segments alike, under every attention range."""

from dataclasses import replace

import pytest
import torch
from models import Case, _model_arguments, make_config, relative_error
from pretend import pretend_rank
from stages import batch_of, run_segments

from helixpipe.layers.documents import documents_of
from helixpipe.layers.gpt import build_gpt
from helixpipe.layers.initialization import initialize_weights
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.spec import LOCAL, TRANSFORMER_ENGINE, layer_spec
from helixpipe.layers.variants import NormedRowParallelLinear, Variants

EVERYTHING = Variants(
    embedding_scale=3.0, sandwich_norm=True, rotary_base_local=50, attention_softcap=1.0, final_softcap=2.0
)


def config_of(case, variants=EVERYTHING):
    config = make_config(case)
    config.window_size, config.window_attn_skip_freq = (5, 0), 2
    config.layernorm_zero_centered_gamma = True
    config.variants = variants
    return config


def both(case, variants=EVERYTHING, implementation=LOCAL):
    """Megatron's model, and the segments with its weights."""
    config = config_of(case, variants)
    whole = build_gpt(config, implementation, case.saving, **_model_arguments(case))
    initialize_weights(whole, config, 1)
    for parameter in whole.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(0.0, 0.2)
    segments = SegmentedGPTModel(
        config_of(case, variants),
        implementation,
        range(0, 2 * case.num_layers + 1, 2),
        attention_range=case.attention_range,
        saving=case.saving,
        **_model_arguments(case),
    )
    segments.load_state_dict(whole.state_dict(), strict=True)
    return whole, segments


@pytest.mark.parametrize("attention_range", ["core", "qkv", "block"])
@pytest.mark.parametrize("levels", ["none", "products", "without-attention"])
def test_segments_are_megatrons_model(attention_range, levels):
    case = Case(pp=1, style="llama", attention_range=attention_range, levels=levels)
    with pretend_rank(case):
        whole, segments = both(case)
        batch = batch_of(case)
        expected = whole(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        found, _ = run_segments(segments, **batch)
        expected.sum().backward()
        found.sum().backward()
    assert torch.equal(found, expected)
    parameters, own = dict(whole.named_parameters()), dict(segments.named_parameters())
    assert sum("post_layernorm" in name for name in parameters) == 2 * case.num_layers
    for name, parameter in parameters.items():
        assert parameter.grad.norm() > 0, name
        assert relative_error(own[name].grad, parameter.grad) < 1e-6, name


@pytest.mark.parametrize(
    "other",
    [
        replace(EVERYTHING, embedding_scale=1.0),
        replace(EVERYTHING, rotary_base_local=60),
        replace(EVERYTHING, attention_softcap=0.0),
        replace(EVERYTHING, final_softcap=0.0),
    ],
    ids=["scale", "base", "scores", "logits"],
)
def test_each_variant_changes_both_models(other):
    case = Case(pp=1, style="llama")
    with pretend_rank(case):
        whole, segments = both(case)
        others = both(case, other)
        batch = batch_of(case)
        outputs = []
        for model, changed in zip((whole, segments), others, strict=True):
            changed.load_state_dict(whole.state_dict(), strict=True)
            for one in (model, changed):
                if one in (whole, others[0]):
                    outputs.append(one(batch["tokens"], batch["position_ids"], None))
                else:
                    outputs.append(
                        run_segments(one, tokens=batch["tokens"], position_ids=batch["position_ids"])[0]
                    )
    of_whole, of_changed, of_segments, of_changed_segments = outputs
    assert torch.equal(of_whole, of_segments)
    assert torch.equal(of_changed, of_changed_segments)
    assert (of_whole - of_changed).abs().max() > 1e-3


@pytest.mark.parametrize("attention_range", ["core", "block"])
def test_documents_have_all_of_them(attention_range):
    """Megatron's model and segments over joined documents, and each document alone."""
    case = Case(pp=1, style="llama", attention_range=attention_range)
    joined = replace(LOCAL, documents=True)
    with pretend_rank(case):
        alone, _ = both(case)
        whole, segments = both(case, implementation=joined)
        whole.load_state_dict(alone.state_dict())
        segments.load_state_dict(alone.state_dict())
        batch = batch_of(case)
        batch["tokens"][0, 8] = 0
        documents = documents_of(batch["tokens"], 0)
        found = whole(batch["tokens"], documents.positions, None, packed_seq_params=documents)
        in_segments, _ = run_segments(
            segments, tokens=batch["tokens"], position_ids=documents.positions, layout=documents
        )
        parts = [
            alone(batch["tokens"][:, first:last], documents.positions[:, first:last], None)
            for first, last in documents.rows[0].bounds
        ]
    assert len(parts) > 1
    torch.testing.assert_close(in_segments, found, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7])
def test_losses_over_slices_have_capped_logits(chunk):
    case = Case(pp=1, style="llama", loss_chunk=chunk)
    with pretend_rank(case):
        whole, segments = both(replace(case, loss_chunk=None))
        sliced, sliced_segments = both(case)
        batch = batch_of(case)
        losses, gradients = [], []
        for model in (whole, segments, sliced, sliced_segments):
            model.load_state_dict(whole.state_dict())
            if model in (whole, sliced):
                found = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
            else:
                found, _ = run_segments(model, **batch)
            found.sum().backward()
            losses.append(found.detach())
            gradients.append({name: p.grad for name, p in model.named_parameters()})
    for found, grads in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(found, losses[0], rtol=0, atol=1e-6)
        assert all(relative_error(grads[name], grad) < 1e-6 for name, grad in gradients[0].items())


def test_a_normed_layer_normalizes_what_the_product_gives():
    case = Case(pp=1, style="llama")
    with pretend_rank(case):
        whole, _ = both(case)
        layer = whole.decoder.layers[0].self_attention.linear_proj
        assert isinstance(layer, NormedRowParallelLinear)
        given = torch.randn(3, 1, layer.weight.shape[1])
        product = given @ layer.weight.t()
        size = product.square().mean(-1, keepdim=True).add(layer.config.layernorm_epsilon).sqrt()
        expected = product / size * (1 + layer.post_layernorm.weight)
        torch.testing.assert_close(layer(given)[0], expected)


def test_what_cannot_have_them_refuses_them(monkeypatch):
    case = Case(pp=1, style="llama")
    monkeypatch.setattr("helixpipe.layers.spec.check_implementation", lambda implementation: None)
    with pretend_rank(case), pytest.raises(ValueError, match="use --transformer-impl local"):
        layer_spec(config_of(case), TRANSFORMER_ENGINE)
