"""YaRN where positions do not follow each other: in joined documents and in slices."""

from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state
from models import Case, _model_arguments
from pretend import pretend_rank
from stages import batch_of, configured, run_segments

from helixpipe.layers.documents import documents_of
from helixpipe.layers.elastic.positions import rotate_at
from helixpipe.layers.gpt import build_gpt
from helixpipe.layers.initialization import initialize_weights
from helixpipe.layers.rotary import angles_of, build_rotary, rotate
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.spec import LOCAL

CASE = Case(pp=1, style="llama")


@pytest.fixture(autouse=True)
def rank():
    with pretend_rank(CASE):
        yield


def yarn_config():
    config = configured(CASE)
    config.yarn_rotary_scaling_factor, config.yarn_original_max_position_embeddings = 4.0, 8
    config.yarn_beta_fast, config.yarn_beta_slow = 4.0, 1.0
    config.yarn_mscale = config.yarn_mscale_all_dim = None
    config.yarn_correction_range_round_to_int = True
    return config


def test_tokens_at_any_positions_turn_as_in_the_whole_sequence():
    config, group = yarn_config(), parallel_state.get_context_parallel_group()
    rotary = build_rotary("yarn", config, group)
    tensors = [torch.randn(50, 1, heads, 8, requires_grad=True) for heads in (4, 2)]
    whole = [rotate(tensor, angles_of(rotary, 50), config, group) for tensor in tensors]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    parts = rotate_at(*(t[order] for t in tensors), order[None], rotary, config, group)
    for found, expected, tensor in zip(parts, whole, tensors, strict=True):
        assert torch.equal(found, expected[order])
        assert not torch.allclose(found.norm(), tensor.norm())  # the factor of YaRN
        grad = torch.randn_like(expected)
        (of_whole,) = torch.autograd.grad(expected, tensor, grad, retain_graph=True)
        (of_part,) = torch.autograd.grad(found, tensor, grad[order], retain_graph=True)
        assert torch.equal(of_part, of_whole)


def test_a_document_in_a_joined_sequence_is_that_document_alone():
    arguments = {**_model_arguments(CASE), "position_embedding_type": "yarn"}
    joined = replace(LOCAL, documents=True)
    alone, whole = (build_gpt(yarn_config(), kind, **arguments) for kind in (LOCAL, joined))
    segments = SegmentedGPTModel(yarn_config(), joined, range(0, 9, 2), **arguments)
    initialize_weights(alone, alone.config, 1)
    for model in (whole, segments):
        model.load_state_dict(alone.state_dict())
    tokens = batch_of(CASE)["tokens"]
    tokens[0, 9] = 0
    documents = documents_of(tokens, 0)
    places = documents.positions
    found = whole(tokens, places, None, packed_seq_params=documents)
    in_segments, _ = run_segments(segments, tokens=tokens, position_ids=places, layout=documents)
    bounds = documents.rows[0].bounds
    parts = [alone(tokens[:, first:last], places[:, first:last], None) for first, last in bounds]
    assert len(parts) > 1
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(in_segments, found, rtol=0, atol=1e-6)
