"""Caps of scores, in kernels that have them and in blocks: against explicit scores in float64."""

from dataclasses import replace

import exact_attention
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from models import Case
from pretend import pretend_rank
from stages import configured
from stand_ins import installed
from test_attention import largest_allocation

from helixpipe.elastic import Chunk, Piece
from helixpipe.layers.attention import blocks
from helixpipe.layers.attention.blocks import BlockAttention
from helixpipe.layers.attention.choice import AUTO, BACKENDS, choose
from helixpipe.layers.attention.core import FlashCoreAttention, causal_attention
from helixpipe.layers.attention.interface import AttentionProblem, ForwardResult, Spans
from helixpipe.layers.attention.trial import run_trial
from helixpipe.layers.attention.windows import WindowAttention
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.layout import ChunkLayout
from helixpipe.layers.elastic.slice_attention import slice_attention
from helixpipe.layers.spec import TRANSFORMER_ENGINE, Implementation, holds_scores, leaves_attention_to_engine
from helixpipe.layers.variants import Variants

SCALE, CAP = 0.4, 1.5
HEADS, GROUPS, SIZE = 4, 2, 8
BOUNDS = ((0, 1), (1, 30), (30, 33), (33, 75))
HOPPER = AttentionProblem(torch.device("cpu"), (9, 0), torch.bfloat16, 64, heads=8, groups=2, softcap=50.0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of 16 tokens, so that short sequences have several."""
    monkeypatch.setattr(blocks, "_SHORTEST", 16)
    monkeypatch.setattr(blocks, "_LONGEST", 16)
    choose.cache_clear()
    yield
    choose.cache_clear()


def capped(cap=CAP, kind=BlockAttention):
    backend = kind()
    backend.softcap = cap
    return backend


def inputs_of(queries, keys=None, batch=2, dtype=torch.float64, size=SIZE):
    """Query, key, value and the output's gradient, [b, heads, s, d] in memory as [s, b, heads, d]."""
    generator = torch.Generator().manual_seed(queries)
    keys = queries if keys is None else keys
    shapes = [(queries, HEADS), (keys, GROUPS), (keys, GROUPS), (queries, HEADS)]
    return [
        torch.randn(length, batch, heads, size, generator=generator, dtype=dtype).permute(1, 2, 0, 3)
        for length, heads in shapes
    ]


def results(backend, query, key, value, grad, **options):
    result = backend.forward(query, key, value, SCALE, **options)
    return (*result[:2], *backend.backward(grad, query, key, value, result, SCALE, **options))


def assert_close(found, expected, tolerance=1e-12):
    for tensor, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("cap", [CAP, 0.0])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "context"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 75])
def test_blocks_are_exact(length, causal, cap):
    inputs = inputs_of(length, length if causal else length + 7)
    query, key, value, grad = inputs
    expected = exact_attention.forward(query, key, value, SCALE, causal, cap)
    expected += exact_attention.backward(grad, query, key, value, *expected, SCALE, causal, cap)
    assert_close(results(capped(cap), *inputs, causal=causal), expected)


def test_packed_sequences():
    inputs = inputs_of(75, batch=1)
    query, key, value, grad = inputs
    expected = exact_attention.forward_packed(query, key, value, SCALE, BOUNDS, CAP)
    expected += exact_attention.backward_packed(grad, query, key, value, *expected, SCALE, BOUNDS, CAP)
    assert_close(results(capped(), *inputs, spans=Spans(BOUNDS)), expected)


def test_the_backward_takes_what_was_merged_over_more_keys():
    query, key, value, grad = inputs_of(40, 55)
    result = capped().forward(query, key, value, SCALE, causal=False)
    merged = ForwardResult(result.output * 0.5, result.log_sum_exp + 1.0)
    found = capped().backward(grad, query, key, value, merged, SCALE, causal=False)
    assert_close(found, exact_attention.backward(grad, query, key, value, *merged[:2], SCALE, False, CAP))


def test_windows_over_capped_scores():
    query, key, value, grad = inputs_of(37)
    found = results(WindowAttention(capped(), 5), query, key, value, grad)
    own = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    scores = own[0] @ own[1].repeat_interleave(2, dim=1).transpose(2, 3) * SCALE
    unseen = torch.ones(37, 37, dtype=torch.bool)
    scores = (CAP * (scores / CAP).tanh()).masked_fill(unseen.triu(1) | unseen.tril(-5), -torch.inf)
    output = scores.softmax(dim=-1) @ own[2].repeat_interleave(2, dim=1)
    grads = torch.autograd.grad(output, own, grad)
    assert_close(found, (output.detach(), scores.logsumexp(dim=-1).detach(), *grads))


def test_slices_are_the_whole_sequence():
    given = [tensor.permute(2, 0, 1, 3) for tensor in inputs_of(75, batch=1)]

    def run(attend):
        own = [tensor.detach().requires_grad_() for tensor in given[:3]]
        output = attend(*own)
        output.backward(given[3].flatten(2))
        return [output.detach(), *(tensor.grad for tensor in own)]

    def by_slices(query, key, value):
        contexts, outputs = ContextStore(), []
        for first, last in ((0, 20), (20, 21), (21, 75)):
            chunk = Chunk((Piece(0, first, last - first, 75),))
            layout = ChunkLayout(chunk.pieces, ((0, last - first),), torch.arange(first, last)[None])
            parts = [tensor[first:last] for tensor in (query, key, value)]
            outputs.append(slice_attention(*parts, layout, contexts, layer=1, scale=SCALE, backend=capped()))
        return torch.cat(outputs)

    assert_close(run(by_slices), run(lambda *own: causal_attention(*own, SCALE, capped())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_types_are_rounded_once(dtype):
    query, key, value, grad = inputs_of(75, dtype=torch.float32)
    inputs = [tensor.to(dtype) for tensor in (query, key, value, grad)]
    found = results(capped(), *inputs)
    assert [tensor.dtype for tensor in found] == [dtype, torch.float32, dtype, dtype, dtype]
    expected = exact_attention.forward(*inputs[:3], SCALE, True, CAP)
    expected += exact_attention.backward(inputs[3], *inputs[:3], *expected, SCALE, True, CAP)
    for tensor, wanted in zip(found, expected, strict=True):
        rounding = torch.finfo(tensor.dtype).eps if dtype is not torch.float32 else 1e-6
        assert float((tensor.double() - wanted).abs().max()) <= 3 * rounding * float(wanted.abs().max())


def test_memory_does_not_hold_the_scores(monkeypatch):
    monkeypatch.setattr(blocks, "_LONGEST", 256)
    query, key, value, grad = inputs_of(2048, batch=1, dtype=torch.float32)
    assert (
        largest_allocation(lambda: results(capped(), query, key, value, grad)) < HEADS * 2048 * 2048 * 4 / 32
    )


@pytest.mark.parametrize("bounds", [None, ((0, 1), (1, 64), (64, 127))], ids=["whole", "packed"])
@pytest.mark.parametrize("name", ["flash-attn-2", "flash-attn-3"])
def test_kernels_that_cap_get_the_number(name, bounds):
    with installed("flash"):
        backend = capped(kind=BACKENDS[name])
        inputs = inputs_of(127, batch=1, dtype=torch.float32, size=64)
        query, key, value, grad = (tensor.to(torch.float16) for tensor in inputs)
        spans = None if bounds is None else Spans(bounds)
        found = results(backend, query, key, value, grad, spans=spans)
    whole = bounds or ((0, 127),)
    expected = exact_attention.forward_packed(query, key, value, SCALE, whole, CAP)
    expected += exact_attention.backward_packed(grad, query, key, value, *expected, SCALE, whole, CAP)
    for tensor, wanted in zip(found, expected, strict=True):
        assert float((tensor.double() - wanted).abs().max()) <= 3 * 2.0**-11 * float(wanted.abs().max())


def test_the_first_that_caps_is_chosen():
    with installed("flash", "engine"):
        assert choose(AUTO, HOPPER).backend.name == "flash-attn-3"
        assert choose(AUTO, HOPPER).backend.softcap == 50.0
        found = choose(AUTO, replace(HOPPER, capability=(10, 0)))
        assert found.backend.name == "flash-attn-2"
        assert found.passed_over == dict.fromkeys(("cudnn", "te-cudnn"), "cannot cap scores")
    assert choose(AUTO, replace(HOPPER, capability=(8, 0))).backend.name == "blocks"
    on_cpu = choose(AUTO, replace(HOPPER, capability=None))
    assert (on_cpu.backend.name, on_cpu.passed_over) == ("blocks", {"aten-cpu": "cannot cap scores"})
    assert choose("flash", replace(HOPPER, capability=None)).backend.name == "blocks"


def test_a_kernel_that_ignores_its_cap_fails_its_trial(monkeypatch):
    problem = replace(HOPPER, varies=True)
    backend = capped(problem.softcap)
    assert run_trial(backend, problem) == ""
    assert backend.softcap == problem.softcap
    original = BlockAttention.forward_whole

    def ignoring(self, *arguments):
        return original(BlockAttention(), *arguments)

    monkeypatch.setattr(BlockAttention, "forward_whole", ignoring)
    assert run_trial(backend, problem) == "outputs"


def config_of(**values):
    config = configured(Case(pp=1, style="llama"), **values)
    config.variants = Variants(attention_softcap=CAP)
    return config


def test_layers_are_built_with_the_cap():
    with pretend_rank(Case(pp=1, style="llama")):
        core = FlashCoreAttention(config_of(), 1, AttnMaskType.causal, "self")
    assert (core.backend.name, core.backend.softcap) == ("blocks", CAP)


def test_what_would_ignore_the_cap_is_refused():
    engine = Implementation(TRANSFORMER_ENGINE.modules)
    for named in ("unfused", "auto"):
        with pytest.raises(ValueError, match="does not cap scores; use --attention-dropout 0"):
            holds_scores(config_of(attention_dropout=0.1), Implementation("local", attention=named))
    with pytest.raises(ValueError, match="--attn-logit-softcapping does not go with attention dropout"):
        leaves_attention_to_engine(config_of(attention_dropout=0.1), engine)
    # Transformer Engine's own module would compute windows, and no cap.
    assert not leaves_attention_to_engine(config_of(window_size=(4, 0)), engine)
