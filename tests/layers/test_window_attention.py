"""Sliding windows in blocks: against explicit scores in float64, and Megatron's own attention."""

import itertools
import math
from functools import partial
from unittest import mock

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from models import Case, make_config
from pretend import pretend_rank
from test_slice_attention import by_chunk, by_sequence, chunks_of, problem

from helixpipe.layers.attention.aten import AtenCpu
from helixpipe.layers.attention.core import FlashCoreAttention, causal_attention
from helixpipe.layers.attention.interface import Spans
from helixpipe.layers.attention.windows import WindowAttention, window_of
from helixpipe.layers.elastic.core_attention import SliceCoreAttention
from helixpipe.layers.elastic.slice_attention import slice_attention
from helixpipe.layers.elastic.window_parts import window_parts
from helixpipe.plan.cost_model.model import read_model
from helixpipe.plan.windows import parse_skip_frequency, parse_window, windows_of_layers

LENGTH, BATCH, HEADS, GROUPS, SIZE = 37, 2, 4, 2, 8


def inputs_of(length=LENGTH, batch=BATCH):
    generator = torch.Generator().manual_seed(length)
    shapes = [
        (length, batch, HEADS, SIZE),
        *2 * [(length, batch, GROUPS, SIZE)],
        (length, batch, HEADS * SIZE),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def explicit(window):
    def attend(query, key, value):
        key, value = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (key, value))
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) / math.sqrt(SIZE)
        place = torch.arange(query.shape[0])
        distance = place[:, None] - place
        scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
        return torch.einsum("bhst,tbhd->sbhd", scores.softmax(dim=-1), value).flatten(2)

    return attend


def forward_and_backward(function, *inputs):
    *inputs, grad = inputs
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


@pytest.mark.parametrize(
    ("window", "length", "batch"),
    [
        (1, 9, 2),
        (2, 9, 2),
        (7, 37, 2),
        (7, 35, 1),
        (12, 37, 1),
        (36, 37, 2),
        (37, 37, 2),
        (99, 37, 2),
        (5, 6, 3),
    ],
)
def test_output_and_gradients(window, length, batch):
    inputs = inputs_of(length, batch)
    backend = WindowAttention(AtenCpu(), window)
    found = forward_and_backward(lambda *given: causal_attention(*given, backend=backend), *inputs)
    expected = forward_and_backward(explicit(window), *inputs)
    for tensor, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-12)


def test_log_sum_exps_and_packed_sequences():
    query, key, value, grad = (t.unflatten(-1, (-1, SIZE)) if t.dim() == 3 else t for t in inputs_of(batch=1))
    query, key, value, grad = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value, grad))
    backend = WindowAttention(AtenCpu(), 5)
    bounds = [(0, 3), (3, 20), (20, LENGTH)]
    packed = backend.forward(query, key, value, 0.3, spans=Spans(bounds))
    grads = backend.backward(grad, query, key, value, packed, 0.3, spans=Spans(bounds))
    for first, last in bounds:
        own = [tensor[:, :, first:last] for tensor in (query, key, value)]
        alone = backend.forward(*own, 0.3)
        assert torch.equal(packed.output[:, :, first:last], alone.output)
        repeated = own[1].repeat_interleave(HEADS // GROUPS, dim=1)
        scores = (own[0] @ repeated.transpose(2, 3)) * 0.3
        unseen = torch.ones_like(scores, dtype=torch.bool)
        scores = scores.masked_fill(unseen.triu(1) | unseen.tril(-5), -math.inf)
        torch.testing.assert_close(alone.log_sum_exp, scores.logsumexp(dim=-1), rtol=0, atol=1e-12)
        of_alone = backend.backward(grad[:, :, first:last], *own, alone, 0.3)
        for whole, part in zip(grads, of_alone, strict=True):
            assert torch.equal(whole[:, :, first:last], part)


def test_no_part_sees_more_keys_than_the_window():
    lengths = []
    whole = AtenCpu.forward_whole

    def noted(self, query, key, *others):
        lengths.append(key.shape[2])
        return whole(self, query, key, *others)

    with mock.patch.object(AtenCpu, "forward_whole", noted):
        causal_attention(*inputs_of(512)[:3], backend=WindowAttention(AtenCpu(), 16))
    assert lengths == [16, 15]


@pytest.mark.parametrize("frequency", [None, 2, [1, 0, 0, 1]], ids=str)
def test_layers_are_megatrons(frequency):
    case = Case(pp=1, style="llama", dtype=torch.float64)
    inputs = inputs_of()
    windows = windows_of_layers((4, 0), tuple(frequency) if isinstance(frequency, list) else frequency, 4)
    with pretend_rank(case):
        config = make_config(case)
        config.window_size, config.window_attn_skip_freq = (4, 0), frequency
        for layer in range(1, 5):
            assert window_of(config, layer) == windows[layer - 1]
            arguments = {
                "config": config, "layer_number": layer, "attn_mask_type": AttnMaskType.causal,
                "attention_type": "self",
            }  # fmt: skip
            ours, megatrons = FlashCoreAttention(**arguments), DotProductAttention(**arguments)
            found = forward_and_backward(ours, *inputs)
            expected = forward_and_backward(lambda *given, own=megatrons: own(*given, None), *inputs)
            for tensor, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-12)


def test_parts_of_an_earlier_slice_are_what_a_window_leaves_of_it():
    sizes = (range(1, 5), range(1, 5), range(10), range(1, 12))
    for num_queries, num_keys, between, window in itertools.product(*sizes):
        distance = num_keys + between
        seen = torch.zeros(num_queries, num_keys, dtype=torch.long)
        for part in window_parts(num_queries, num_keys, distance, window):
            block = seen[part.queries, part.keys]
            assert block.numel()
            assert part.is_whole or block.shape[0] == block.shape[1]
            block += 1 if part.is_whole else torch.ones_like(block).triu()
        place = distance + torch.arange(num_queries)[:, None] - torch.arange(num_keys)
        assert torch.equal(seen, (place < window).long()), (num_queries, num_keys, distance, window)
    assert [part.is_whole for part in window_parts(3, 4, 9, 0)] == [True]


# Shorter than slices, as long as one, longer than some, longer than the sequence.
@pytest.mark.parametrize("window", [1, 2, 9, 33, 60, 131, 500])
@pytest.mark.parametrize("padding", [0, 3])
def test_slices_and_packed_sequences_see_through_windows(window, padding):
    sequences, chunks = problem(HEADS, GROUPS, SIZE), chunks_of()
    attention = partial(slice_attention, backend=AtenCpu(), window=window)
    found = by_chunk(sequences, chunks, padding=padding, attention=attention)
    expected = by_sequence(explicit(window), sequences, torch.float64)
    for of_sequence, wanted in zip(found, expected, strict=True):
        for tensor, other in zip(of_sequence, wanted, strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-12)


def test_no_slice_outside_of_a_window_is_attended_to():
    """Of 131 tokens in slices of 50, 33, 1 and 47, a slice sees through 16 tokens the one or two before."""
    seen = []
    whole = AtenCpu.forward_whole

    def noted(self, query, key, *others):
        seen.append((query.shape[2], key.shape[2]))
        return whole(self, query, key, *others)

    with mock.patch.object(AtenCpu, "forward_whole", noted):
        attention = partial(slice_attention, backend=AtenCpu(), window=16)
        by_chunk(problem(HEADS, GROUPS, SIZE), chunks_of(), attention=attention)
    assert max(queries * keys for queries, keys in seen) <= 16 * 16
    assert len(seen) < 50


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_over_slices_have_megatrons_windows(layer):
    case = Case(pp=1)
    with pretend_rank(case):
        config = make_config(case)
        config.window_size, config.window_attn_skip_freq = (4, 0), 2
        core = SliceCoreAttention(
            config=config, layer_number=layer, attn_mask_type=AttnMaskType.causal, attention_type="self",
            contexts=None, pg_collection=mock.Mock(),
        )  # fmt: skip
        assert core.window == (5 if layer == 1 else 0)


def test_options_and_scripts_name_the_same_windows(tmp_path):
    assert (parse_window("4095,0"), parse_window("(7, 0)")) == ((4095, 0), (7, 0))
    assert (parse_skip_frequency("6"), parse_skip_frequency("[1,0]")) == (6, (1, 0))
    assert parse_skip_frequency("([1]*2+[0])*2") == (1, 1, 0, 1, 1, 0)
    for wrong in ("4095", "7,1", "-1,0", "1,2,3", ""):
        with pytest.raises(ValueError, match="is no window"):
            parse_window(wrong)
    for wrong in ("1", "0", "[2]", "[1]*0", "[]", "x"):
        with pytest.raises(ValueError, match="says not which layers"):
            parse_skip_frequency(wrong)
    assert windows_of_layers((7, 0), 3, 6) == (8, 8, 0, 8, 8, 0)
    assert windows_of_layers(None, None, 6) == ()
    with pytest.raises(ValueError, match="has 2 layers, and --num-layers is 3"):
        windows_of_layers((7, 0), (1, 0), 3)
    script = tmp_path / "model.sh"
    sizes = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --padded-vocab-size 128"
    script.write_text(f"torchrun pretrain_gpt.py {sizes} --window-size 7,0 --window-attn-skip-freq 2\n")
    assert read_model(str(script)).windows == (8, 0, 8, 0)
