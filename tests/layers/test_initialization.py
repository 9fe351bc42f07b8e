"""Initial weights: the same whole model under every layout, another one for every seed.

Ranks are visited one after the other in this process; drawing weights takes no communication.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.experts import TEGroupedMLP
from models import Case, make_config
from pretend import pretend_rank
from stages import gpt_stage, segmented_share

from helixpipe.layers.initialization import (
    canonical_parameters,
    deferred_initialization,
    initialize_weights,
)

SEED = 5
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]
# The default llama has two key/value heads; one head is not enough for every rank at tp 2.
STYLES = [Case(pp=1), Case(pp=1, style="llama"), Case(pp=1, style="llama", groups=1)]
every_style = pytest.mark.parametrize("style", STYLES, ids=lambda s: f"{s.style}-groups{s.groups}")
every_builder = pytest.mark.parametrize("build", [gpt_stage, segmented_share], ids=lambda b: b.__name__)


@cache
def whole_model(case, build, seed=SEED):
    """Every weight of the model, put together from all ranks, by canonical name."""
    shards = {}
    for rank in range(case.world_size):
        with pretend_rank(case, rank):
            model = build(case)
            initialize_weights(model, model.config, seed)
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            axes = split_axes(model)
            for name, parameter in canonical_parameters(model):
                copy = shards.setdefault(name, {}).setdefault(tp_rank, parameter)
                # Only a tied head is held twice.
                assert copy is parameter or name == "embedding.word_embeddings.weight"
                assert torch.equal(copy, parameter)
    return {
        name: join(list(of_rank.values()), *axis_of(name, axes)).detach() for name, of_rank in shards.items()
    }


def split_axes(model):
    """(axis, blocks) along which tensor parallelism cuts a weight, by the end of its name."""
    blocks = 2 if model.config.gated_linear_unit else 1
    return {
        "word_embeddings.weight": (0, 1),
        "output_layer.weight": (0, 1),
        "linear_qkv.weight": (0, 1),
        "linear_qkv.bias": (0, 1),
        "linear_fc1.weight": (0, blocks),
        "linear_fc1.bias": (0, blocks),
        "linear_proj.weight": (1, 1),
        "linear_fc2.weight": (1, 1),
    }


def axis_of(name, axes):
    return next((axis for end, axis in axes.items() if name.endswith(end)), (None, 1))


def join(shards, axis, blocks):
    """The whole tensor: each of the ``blocks`` stacked in a shard is a part of one of the whole's."""
    if axis is None:
        assert all(torch.equal(shards[0], shard) for shard in shards)
        return shards[0]
    parts = zip(*(shard.chunk(blocks, dim=axis) for shard in shards), strict=True)
    return torch.cat([part for of_block in parts for part in of_block], dim=axis)


@every_style
@every_builder
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "pp{}-tp{}".format(*layout))
def test_every_layout_starts_from_the_same_weights(style, build, layout):
    expected = whole_model(style, gpt_stage)
    found = whole_model(replace(style, pp=layout[0], tp=layout[1]), build)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("tp", [2, 4])
@every_builder
def test_parts_of_a_weight_know_that_they_are_parts(build, tp):
    """Megatron counts an unmarked parameter once over the tensor-parallel ranks in the gradient norm."""
    case = Case(pp=1, tp=tp)
    with pretend_rank(Case(pp=1)):
        whole = {name: parameter.shape for name, parameter in canonical_parameters(build(Case(pp=1)))}
    with pretend_rank(case):
        model = build(case)
        initialize_weights(model, model.config, SEED)
        for name, parameter in canonical_parameters(model):
            is_part = parameter.shape != whole[name]
            assert getattr(parameter, "tensor_model_parallel", False) == is_part, name


@every_style
def test_no_two_matrices_are_alike(style):
    matrices = {name: w.flatten()[:64] for name, w in whole_model(style, gpt_stage).items() if w.dim() > 1}
    assert len({tuple(values.tolist()) for values in matrices.values()}) == len(matrices) >= 17


@every_style
def test_another_seed_draws_every_matrix_anew(style):
    one, other = (whole_model(style, gpt_stage, seed) for seed in (SEED, SEED + 1))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]) == (weight.dim() < 2), name


class Grouped(TEGroupedMLP):
    """Names and shapes of the experts of a rank as Transformer Engine has them, in one product, unmarked."""

    def __init__(self, experts, rank=0):
        torch.nn.Module.__init__(self)
        self.num_local_experts, self.ep_group = len(experts), SimpleNamespace(rank=lambda: rank)
        for part in ("linear_fc1", "linear_fc2"):
            linear = torch.nn.Module()
            for number, expert in enumerate(experts):
                for kind, one in expert.get_submodule(part).named_parameters():
                    linear.register_parameter(f"{kind}{number}", torch.nn.Parameter(torch.ones_like(one)))
            self.add_module(part, linear)


def grouped_stage(case):
    model = gpt_stage(case)
    for layer in model.decoder.layers:
        layer.mlp.experts = Grouped(layer.mlp.experts.local_experts)
    return model


EXPERTS = Case(pp=1, style="llama", experts=3, num_layers=2)


@pytest.mark.parametrize(
    "case", [EXPERTS, replace(EXPERTS, style="oss"), replace(EXPERTS, tp=2, sequence_parallel=True)], ids=str
)
def test_experts_in_one_product_start_as_they_do_one_by_one(case):
    expected = whole_model(replace(case, tp=1, sequence_parallel=False), gpt_stage)
    found = whole_model(case, grouped_stage)
    assert found.keys() == expected.keys()
    assert "decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight" in found
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_experts_in_one_product_have_their_numbers_among_all():
    with pretend_rank(EXPERTS):
        model = gpt_stage(EXPERTS)
        layer = model.decoder.layers[1]
        layer.mlp.experts = Grouped(layer.mlp.experts.local_experts, rank=1)
        names = {name for name, _ in canonical_parameters(model) if "layers.1.mlp.experts" in name}
    assert names == {
        f"decoder.layers.1.mlp.experts.local_experts.{number}.linear_fc{half}.weight"
        for number in (3, 4, 5)
        for half in (1, 2)
    }


def test_tied_copies_are_both_drawn():
    """Megatron's first and last stage each hold the embedding; neither may be left out."""
    case = Case(pp=2)
    copies = []
    for rank in range(2):
        with pretend_rank(case, rank):
            model = gpt_stage(case)
            initialize_weights(model, model.config, SEED)
            copies += [p for n, p in canonical_parameters(model) if n == "embedding.word_embeddings.weight"]
    assert len(copies) == 2
    assert torch.equal(copies[0], copies[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_hold_the_same_numbers_rounded(dtype):
    expected = whole_model(STYLES[0], gpt_stage)
    found = whole_model(replace(STYLES[0], dtype=dtype), gpt_stage)
    assert found["decoder.layers.0.self_attention.linear_qkv.weight"].dtype is dtype
    for name, weight in expected.items():
        # Megatron makes position embeddings in float32 whatever the type.
        assert torch.equal(found[name], weight.to(found[name].dtype)), name


def test_each_kind_of_weight_is_drawn_from_its_own_distribution():
    case = Case(pp=1, style="llama")
    with pretend_rank(case):
        model = segmented_share(case)
        model.config.embedding_init_method = lambda weight: weight.fill_(0.25)
        initialize_weights(model, model.config, SEED)
    for name, parameter in canonical_parameters(model):
        if name.startswith("embedding."):
            assert (parameter == 0.25).all()
        elif parameter.dim() > 1:
            into_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = 0.2 / (2 * case.num_layers) ** 0.5 if into_residual else 0.2
            assert parameter.std().item() == pytest.approx(expected, rel=0.08), name


def test_vectors():
    case = Case(pp=1)
    with pretend_rank(case):
        model = gpt_stage(case)
        norms = {}
        for name, parameter in canonical_parameters(model):
            parameter.data.uniform_(1, 2)
            if "norm" in name and name.endswith("weight"):
                norms[name] = parameter.clone()
        initialize_weights(model, model.config, SEED)
    assert len(norms) == 2 * case.num_layers + 1
    for name, parameter in canonical_parameters(model):
        if name in norms:
            assert torch.equal(parameter, norms[name]), "norm weights keep the value they were made with"
        elif name.endswith("bias"):
            assert not parameter.any()


def test_the_jobs_random_state_does_not_move():
    case = Case(pp=1)
    with pretend_rank(case):
        model = gpt_stage(case)
        before = torch.get_rng_state()
        initialize_weights(model, model.config, SEED)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tp", [1, 2])
@every_style
def test_deferring_leaves_out_the_numbers_and_nothing_else(style, tp):
    """A model built without drawing has the shapes and marks of one that Megatron has drawn."""
    case = replace(style, tp=tp)
    with pretend_rank(case):
        deferred = gpt_stage(case)
        with patch("stages.deferred_initialization", lambda config: nullcontext()):
            drawn = gpt_stage(case)
    for (name, found), (_, expected) in zip(
        deferred.named_parameters(), drawn.named_parameters(), strict=True
    ):
        assert found.shape == expected.shape, name
        assert vars(found) == vars(expected), name


def test_deferring_gives_the_init_methods_back_even_after_an_error():
    config = make_config(Case(pp=1))
    names = ("init_method", "output_layer_init_method", "embedding_init_method")
    methods = [getattr(config, name) for name in names]
    weight = torch.ones(3, 3)

    def fail():
        with deferred_initialization(config):
            for name in names:
                getattr(config, name)(weight)
            assert (weight == 1).all()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert [getattr(config, name) for name in names] == methods
