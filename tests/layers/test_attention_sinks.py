"""Attention sinks over every form of attention: against Megatron's own, which holds all scores."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from models import Case, make_config
from pretend import pretend_rank
from stages import batch_of, block_share, gpt_stage, qkv_share, run_segments, segmented_share

from helixpipe.elastic import Chunk, Piece
from helixpipe.kernels.choice import quick_gelu
from helixpipe.layers.attention.aten import AtenCpu
from helixpipe.layers.attention.core import FlashCoreAttention, causal_attention
from helixpipe.layers.attention.interface import Spans
from helixpipe.layers.documents import Documents
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.layout import ChunkLayout
from helixpipe.layers.elastic.slice_attention import slice_attention

LENGTH = 37
CASE = Case(pp=1, style="oss", dtype=torch.float64)


def inputs_of(batch=2):
    generator = torch.Generator().manual_seed(batch)
    shapes = [(LENGTH, batch, 4, 8), (LENGTH, batch, 2, 8), (LENGTH, batch, 2, 8), (LENGTH, batch, 32)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


SINK = torch.tensor([0.3, -2.0, 1.5, 4.0], dtype=torch.float64)


def forward_and_backward(function, *inputs, sink=None):
    *inputs, grad = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    wanted = leaves if sink is None else [*leaves, sink]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad)]


def assert_close(found, expected):
    for tensor, wanted in zip(found, expected, strict=True):
        assert wanted.norm() > 0
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, (4, 0)], ids=["all", "window"])
@pytest.mark.parametrize("kind", ["off-by-one", "learnable"])
def test_core_attention_is_megatrons(kind, window):
    with pretend_rank(CASE):
        config = make_config(CASE)
        config.softmax_type, config.window_size = kind, window
        made = [
            core(config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")
            for core in (FlashCoreAttention, DotProductAttention)
        ]
        results = []
        for core in made:
            sink = core.softmax_offset if kind == "learnable" else None
            if sink is not None:
                sink.data.copy_(SINK)
            results.append(
                forward_and_backward(lambda *own, core=core: core(*own, None), *inputs_of(), sink=sink)
            )
    assert_close(*results)
    assert [name for name, _ in made[0].named_parameters()] == [
        name for name, _ in made[1].named_parameters()
    ]


def leaf():
    return SINK.clone().requires_grad_()


def test_documents_are_each_alone():
    rows = (Spans([(0, 5), (5, LENGTH)]), Spans([(0, 1), (1, 30), (30, LENGTH)]))
    inputs, sink = inputs_of(), leaf()
    documents = Documents(rows, torch.zeros(2, LENGTH, dtype=torch.long))
    found = forward_and_backward(
        lambda *own: causal_attention(*own, None, AtenCpu(), documents, sink), *inputs, sink=sink
    )
    expected = [torch.zeros_like(tensor) for tensor in found]
    for row, spans in enumerate(rows):
        for first, last in spans.bounds:
            own = [tensor[first:last, row : row + 1] for tensor in inputs]
            alone = forward_and_backward(
                lambda *own: causal_attention(*own, None, AtenCpu(), None, sink), *own, sink=sink
            )
            for whole, part in zip(expected[:4], alone[:4], strict=True):
                whole[first:last, row : row + 1] = part
            expected[4] += alone[4]
    assert_close(found, expected)


def test_slices_are_the_whole_sequence():
    inputs, sink = inputs_of(batch=1), leaf()
    expected = forward_and_backward(
        lambda *own: causal_attention(*own, None, AtenCpu(), None, sink), *inputs, sink=sink
    )
    contexts, outputs = ContextStore(), []
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    for first, last in pairwise((0, 11, 12, LENGTH)):
        chunk = Chunk((Piece(0, first, last - first, LENGTH),))
        layout = ChunkLayout(chunk.pieces, ((0, last - first),), torch.arange(first, last)[None])
        own = [tensor[first:last] for tensor in leaves]
        outputs.append(slice_attention(*own, layout, contexts, layer=1, backend=AtenCpu(), sink=sink))
    torch.cat(outputs).backward(inputs[3])
    assert_close([torch.cat(outputs).detach(), *(t.grad for t in leaves), sink.grad], expected)


def test_sixteen_bits_are_rounded_once_more():
    query, key, value, _ = (tensor.bfloat16() for tensor in inputs_of())
    found = causal_attention(query, key, value, None, AtenCpu(), None, SINK.bfloat16())
    expected = causal_attention(query.double(), key.double(), value.double(), None, AtenCpu(), None, SINK)
    assert found.dtype is torch.bfloat16
    assert float((found.double() - expected).abs().max()) <= 2 * 2.0**-8 * float(expected.abs().max())


@pytest.mark.parametrize("levels", ["none", "products", "without-attention"])
@pytest.mark.parametrize("share", [qkv_share, block_share])
def test_segments_are_megatrons_model(share, levels):
    case = replace(CASE, dtype=torch.float32, levels=levels)
    with pretend_rank(case):
        whole, segments = gpt_stage(replace(case, levels="none")), share(case)
        for parameter in whole.parameters():
            parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
        segments.load_state_dict(whole.state_dict(), strict=True)
        batch = batch_of(case)
        expected = whole(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        found, _ = run_segments(segments, **batch)
        expected.sum().backward()
        found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    own = dict(segments.named_parameters())
    names = [name for name, _ in whole.named_parameters() if name.endswith("softmax_offset")]
    assert len(names) == case.num_layers
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-5, atol=1e-6)


def test_learned_sinks_are_lent_with_qkv_only():
    with pretend_rank(CASE), pytest.raises(ValueError, match="core, which lends no sinks; use qkv or block"):
        segmented_share(CASE)


def test_the_clamped_gate_is_gpt_oss():
    torch.manual_seed(1)
    gate, up = torch.randn(2, 5, 40, dtype=torch.float64)
    expected = gate.clamp(max=0.5) * torch.sigmoid(1.702 * gate.clamp(max=0.5)) * (up.clamp(-0.5, 0.5) + 1)
    with pretend_rank(CASE):
        mlp = gpt_stage(CASE).decoder.layers[0].mlp
        config = mlp.config
    assert config.activation_func is quick_gelu
    mlp.linear_fc1.forward = lambda given: (given, None)
    mlp.linear_fc2.forward = lambda given: (given, None)
    torch.testing.assert_close(mlp(torch.cat((gate, up), dim=-1))[0], expected)
