"""The segmented model against Megatron's GPTModel: computation, shapes, parameters, checkpoint form.

Ranks of larger layouts are visited one after the other in this process, without communication.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from layers_worker import losses, losses_of_both
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from models import VOCABULARY, Case
from pretend import pretend_rank
from ranks import run_on_ranks
from stages import configured, gpt_stage, run_segments, segmented_share

from helixpipe.layers.initialization import canonical_parameters
from helixpipe.layers.segmented_gpt import SegmentedGPTModel, check_supported, owned_parts
from helixpipe.layers.spec import LOCAL, LayerPart

PRE, POST, WHOLE, CORE = LayerPart.PRE, LayerPart.POST, LayerPart.WHOLE, LayerPart(0)
STYLES = [Case(pp=1), Case(pp=1, style="llama")]
every_style = pytest.mark.parametrize("style", STYLES, ids=lambda case: case.style)
RANGED = [
    STYLES[0],
    *(replace(style, attention_range=name) for style in STYLES for name in ("qkv", "block")),
]


def batch_of(case):
    text = torch.randint(VOCABULARY, (case.micro_batch_size, case.seq_length + 1))
    positions = torch.arange(case.seq_length).expand(case.micro_batch_size, -1)
    return {"tokens": text[:, :-1], "position_ids": positions, "labels": text[:, 1:]}


def both_models(case, **values):
    """Megatron's model and the segmented one with its weights, which are found by name."""
    whole, segmented = gpt_stage(case, **values), segmented_share(case, **values)
    for parameter in whole.parameters():
        # Constants would hide errors in biases and norms.
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    if case.dtype is torch.float64:
        whole, segmented = whole.double(), segmented.double()
    segmented.load_state_dict(whole.state_dict(), strict=True)
    return whole, segmented


def name_of(value):
    return ", ".join(value) or "plain" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(
    ("case", "values"),
    [
        (Case(pp=1), {}),
        (Case(pp=1, micro_batch_size=2, seq_length=127), {}),
        (Case(pp=1, style="llama", micro_batch_size=3), {}),
        (Case(pp=1, style="llama", groups=1), {}),
        (Case(pp=1, dtype=torch.float64), {}),
        (Case(pp=1, style="llama"), {"qk_layernorm": True}),
        (Case(pp=1, style="llama"), {"rotary_interleaved": True}),
        *((replace(case, style="llama"), {"no_rope_freq": [0, 1, 1, 0]}) for case in RANGED),
        (Case(pp=1), {"add_qkv_bias": True, "normalization": "RMSNorm"}),
        (Case(pp=1), {"softmax_scale": 0.4}),
        (Case(pp=1), {"kv_channels": 12}),
        (Case(pp=1), {"hidden_dropout": 0.2}),
        *((case, {"hidden_dropout": 0.2, "qk_layernorm": True}) for case in RANGED[1:]),
    ],
    ids=name_of,
)
def test_segments_in_a_row_are_gpts_forward_and_backward(case, values):
    """To the last bit: the same operations in the same order, random numbers included."""
    with pretend_rank(case):
        whole, segmented = both_models(case, **values)
        batch = batch_of(case)
        torch.manual_seed(7)
        expected = whole(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        torch.manual_seed(7)
        found, _ = run_segments(segmented, **batch)
        assert torch.equal(found, expected)
        grads = torch.autograd.grad(expected.sum(), list(whole.parameters()))
        found_grads = torch.autograd.grad(found.sum(), list(segmented.parameters()))
    names = [name for name, _ in whole.named_parameters()]
    assert [name for name, _ in segmented.named_parameters()] == names
    for name, found_grad, grad in zip(names, found_grads, grads, strict=True):
        assert torch.equal(found_grad, grad), name


def test_tensor_parallel_ranks_compute_what_one_rank_does():
    """Real ranks: the same losses as Megatron's model to the last bit, and as one rank up to rounding."""
    cases = [
        (replace(style, tp=2, sequence_parallel=parallel), {})
        for style in (*STYLES, replace(STYLES[1], groups=1))
        for parallel in (False, True)
    ]
    with_dropout = [(replace(STYLES[0], tp=2, sequence_parallel=True), {"hidden_dropout": 0.2})]
    alone = []
    for case, values in cases:
        with pretend_rank(replace(case, tp=1, sequence_parallel=False)):
            alone.append(losses(replace(case, tp=1, sequence_parallel=False), values)[0])
    for of_rank in run_on_ranks(2, losses_of_both, cases + with_dropout):
        for expected, found in of_rank:
            assert torch.equal(found, expected)
        for (case, _), (found, _), expected in zip(cases, of_rank[:-1], alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=str(case))


@every_style
def test_without_labels_the_last_segment_returns_logits(style):
    with pretend_rank(style):
        whole, segmented = both_models(style)
        tokens, positions, _ = batch_of(style).values()
        logits, _ = run_segments(segmented, tokens=tokens, position_ids=positions)
        assert torch.equal(logits, whole(tokens, positions, None))
        assert logits.shape == (1, style.seq_length, VOCABULARY)


def test_evaluation_mode_reaches_everything():
    case = Case(pp=1, attention_range="block")
    with pretend_rank(case):
        _, model = both_models(case, hidden_dropout=0.5)
        batch = batch_of(case)
        for mode, repeats in ((False, True), (True, False)):
            assert model.train(mode) is model
            borrowed = [module for group in model._borrowed.values() for module in group.modules()]
            assert {module.training for module in (*model.modules(), *model._cores, *borrowed)} == {mode}
            first, second = (run_segments(model, **batch)[0] for _ in range(2))
            assert torch.equal(first, second) == repeats


@pytest.mark.parametrize(
    "case",
    [
        *(Case(pp=1, style=style, micro_batch_size=3) for style in ("gpt", "llama")),
        *(
            Case(pp=1, tp=2, style=style, sequence_parallel=parallel)
            for style in ("gpt", "llama")
            for parallel in (False, True)
        ),
        Case(pp=1, tp=2, style="llama", groups=1),
        Case(pp=1, tp=4, style="llama", sequence_parallel=True),
        *(replace(case, tp=2, sequence_parallel=True, micro_batch_size=3) for case in RANGED[1:3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("values", [{}, {"kv_channels": 12}, {"qk_layernorm": True}], ids=name_of)
def test_edges_have_the_shapes_that_segments_return(case, values):
    for rank in range(case.tp):
        with pretend_rank(case, rank):
            model = segmented_share(case, **values)
            _, returned = run_segments(model, **batch_of(case))
            assert len(returned) == 2 * case.num_layers
            for edge, tensors in enumerate(returned):
                shapes = model.edge_shapes(edge, case.seq_length, case.micro_batch_size)
                assert [tensor.shape for tensor in tensors] == shapes, edge
                assert all(tensor.dtype is torch.float32 for tensor in tensors)


@pytest.mark.parametrize("style", [*STYLES, *RANGED[1:3]], ids=str)
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_ranks_partition_the_parameters(style, pp):
    with pretend_rank(style):
        whole = {name: parameter.shape for name, parameter in gpt_stage(style).named_parameters()}
    case = replace(style, pp=pp)
    held = Counter()
    for rank in range(pp):
        with pretend_rank(case, rank):
            model = segmented_share(case)
            named = list(model.named_parameters())
            assert [name for name, _ in canonical_parameters(model)] == [name for name, _ in named]
        for name, parameter in named:
            held[name] += 1
            assert parameter.shape == whole[name]
        # What follows a layer's attention is on the next layer's rank.
        layers = {int(name.split(".")[2]) for name, _ in named if name.startswith("decoder.layers.")}
        assert layers == {layer for layer in range(4) if rank in (layer % pp, (layer + 1) % pp)}
    assert held == Counter(dict.fromkeys(whole, 1))


@every_style
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_carry_megatrons_marks(style, tp, sequence_parallel):
    """What the optimizer and the gradient reduction ask parameters for."""
    case = replace(style, tp=tp, sequence_parallel=sequence_parallel and tp > 1)
    with pretend_rank(case):
        expected = {name: vars(parameter) for name, parameter in gpt_stage(case).named_parameters()}
        found = {name: vars(parameter) for name, parameter in segmented_share(case).named_parameters()}
    assert found == expected
    assert any(marks.get("is_embedding_or_output_parameter") for marks in found.values())


def checkpoint_form(case, build, metadata):
    """What every rank would save."""
    of_ranks = []
    for rank in range(case.world_size):
        with pretend_rank(case, rank):
            state = build(case).sharded_state_dict(metadata=metadata)
            apply_factories(state)
            values = [value for value in nested_values(state) if isinstance(value, ShardedBase)]
            of_ranks.append([value.without_data() for value in values])
    return of_ranks


def described(of_ranks):
    """Every shard by key, sizes and place; copies count once."""
    shards = set()
    for shard in (shard for of_rank in of_ranks for shard in of_rank):
        if isinstance(shard, ShardedTensor):
            place = (shard.local_shape, shard.global_offset, shard.axis_fragmentations, shard.dtype)
            place += (shard.prepend_axis_num, shard.allow_shape_mismatch)
        else:
            place = (shard.global_offset,)
        shards.add((type(shard).__name__, shard.key, shard.global_shape, *place))
    return shards


@pytest.mark.parametrize("style", [*STYLES, *RANGED[3:]], ids=str)
@pytest.mark.parametrize("metadata", [None, {"non_homogeneous_layers": True}], ids=["stacked", "numbered"])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2])
def test_checkpoints_have_the_form_of_gpts(style, metadata, pp, tp):
    case = replace(style, pp=pp, tp=tp)
    found = checkpoint_form(case, segmented_share, metadata)
    # Megatron's own form is the same under every pipeline size: take another.
    for other_pp in (1, 2):
        assert described(found) == described(checkpoint_form(replace(case, pp=other_pp), gpt_stage, metadata))
    with pretend_rank(case):
        # Every shard is written once: by no rank twice, by one rank at least.
        validate_sharding_integrity(found)


@pytest.mark.parametrize("frequency", [1, 3, (0, 1, 0, 1)], ids=str)
@pytest.mark.parametrize("pp", [1, 2])
def test_checkpoints_number_layers_of_which_some_have_experts(frequency, pp):
    case = Case(pp=pp, style="llama", experts=4, router=(("moe_layer_freq", frequency),))
    found = described(checkpoint_form(case, segmented_share, None))
    assert found == described(checkpoint_form(replace(case, pp=3 - pp), gpt_stage, None))
    is_numbered = {key.split(".")[2].isdigit() for _, key, *_ in found if key.startswith("decoder.layers.")}
    assert is_numbered == {frequency != 1}


def test_the_integrity_check_misses_a_rank_that_does_not_save():
    case = Case(pp=2)
    found = checkpoint_form(case, segmented_share, None)
    with pretend_rank(case), pytest.raises(CheckpointingException, match="access pattern"):
        validate_sharding_integrity(found[:-1])


@pytest.mark.parametrize("case", RANGED[1:], ids=str)
def test_attention_runs_anywhere_with_borrowed_weights(case):
    """The same numbers as at home, and the gradients arrive at the borrowed tensors alone."""
    values = {"qk_layernorm": True}
    with pretend_rank(case):
        _, model = both_models(case, **values)
        _, returned = run_segments(model, **batch_of(case))
        inputs = tuple(tensor.detach() for tensor in returned[2])
        expected = model.forward_segment(3, inputs)
        own = model.lent_parameters(3)
        assert [parameter.shape for parameter in own] == model.lent_shapes(1) == model.lent_shapes(3)
        grads = torch.autograd.grad(expected[0].square().sum(), own)
    elsewhere = replace(case, pp=2)
    with pretend_rank(elsewhere, 0):
        borrower = segmented_share(elsewhere, **values)
        assert borrower.lent_shapes(3) == model.lent_shapes(3)
        leaves = [parameter.detach().clone().requires_grad_() for parameter in own]
        found = borrower.forward_segment(3, inputs, borrowed=leaves)
        found[0].square().sum().backward()
    for tensor, wanted in zip(found, expected, strict=True):
        assert torch.equal(tensor, wanted)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.norm() > 0
        assert torch.equal(leaf.grad, grad)
    assert all(parameter.grad is None for parameter in borrower.parameters())
    assert not any(parameter.is_meta for parameter in borrower.parameters())


@pytest.mark.parametrize("attention_range", ["core", "block"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_last_segment_runs_anywhere_with_borrowed_weights(attention_range, tied):
    case = Case(pp=1, attention_range=attention_range, head_placement="spread", tied=tied)
    last = 2 * case.num_layers
    with pretend_rank(case):
        _, model = both_models(case)
        batch = batch_of(case)
        expected, returned = run_segments(model, **batch)
        own = model.lent_parameters(last)
        assert (model.embedding.word_embeddings.weight is own[-1]) == tied
        leaves = [parameter.detach().clone().requires_grad_() for parameter in own]
        inputs = tuple(tensor.detach() for tensor in returned[-1])
    elsewhere = replace(case, pp=2)
    with pretend_rank(elsewhere, 1):
        borrower = segmented_share(elsewhere)
        assert not borrower.post_process
        assert borrower.lent_shapes(last) == [parameter.shape for parameter in own]
        (found,) = borrower.forward_segment(last, inputs, labels=batch["labels"], borrowed=leaves)
        assert torch.equal(found, expected)
        found.sum().backward()
    assert all(leaf.grad.norm() > 0 for leaf in leaves)


def test_an_unknown_part_of_the_weights_is_refused():
    case = Case(pp=1, attention_range="block")
    with pretend_rank(case):
        model = segmented_share(case)
        hidden = torch.zeros(*model.edge_shapes(0, case.seq_length, 1)[0])
        with pytest.raises(ValueError, match="shorter"):
            model.forward_segment(1, (hidden,), borrowed=model.lent_parameters(1)[:-1])


BEFORE = PRE | LayerPart.CORE  # sinks are where QKV is


def test_owned_parts_of_wider_attention():
    block = BEFORE | LayerPart.PROJ
    assert owned_parts(4, [2], BEFORE) == {0: POST, 1: BEFORE}
    assert owned_parts(4, [2], block) == {0: LayerPart.MLP, 1: block}
    assert owned_parts(4, range(9), block) == dict.fromkeys(range(4), WHOLE)


def test_owned_parts():
    assert owned_parts(4, range(9), CORE) == dict.fromkeys(range(4), WHOLE)
    assert owned_parts(4, [0], CORE) == {0: BEFORE}
    assert owned_parts(4, [8], CORE) == {3: POST}
    assert owned_parts(4, [2], CORE) == {0: POST, 1: BEFORE}
    assert owned_parts(4, [0, 4, 8], CORE) == {0: BEFORE, 1: POST, 2: BEFORE, 3: POST}
    assert owned_parts(4, [2, 4], CORE) == {0: POST, 1: WHOLE, 2: BEFORE}
    assert owned_parts(4, [], CORE) == {}
    # Attention has no weights, so whoever runs it owns nothing more.
    assert owned_parts(4, [1, 3, 7], CORE) == {}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"moe_latent_size": 8}, "latent experts"),
        ({"multi_latent_attention": True}, "multi-latent attention"),
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual pipeline stages"),
        ({"recompute_granularity": "full"}, "activation recomputation"),
        ({"recompute_granularity": "selective"}, "activation recomputation"),
        ({"fp8": "hybrid"}, "fp8"),
        ({"fp4": "e2m1"}, "fp4"),
        ({"attention_output_gate": True}, "output-gated attention"),
        ({"fused_single_qkv_rope": True}, "fused QKV rotary"),
        ({"fp32_residual_connection": True}, "fp32 residual"),
        ({"cpu_offloading": True}, "CPU offloading"),
        ({"cuda_graph_impl": "local"}, "CUDA graphs"),
    ],
    ids=name_of,
)
def test_options_that_would_be_wrong_in_segments_are_refused(values, named):
    case = Case(pp=1)
    check_supported(configured(case), "rope")
    with pytest.raises(ValueError, match=f"does not support .*{named}.*; leave it out or use 1f1b"):
        check_supported(configured(case, **values), "rope")
    with pretend_rank(case), pytest.raises(ValueError, match=named):
        segmented_share(case, **values)


@pytest.mark.parametrize("kind", ["learned_absolute", "rope", "none"])
def test_known_position_embeddings(kind):
    check_supported(configured(Case(pp=1)), kind)


@pytest.mark.parametrize("kind", ["mrope", "relative"])
def test_unknown_position_embeddings_are_refused(kind):
    with pytest.raises(ValueError, match=f"position embedding '{kind}'"):
        check_supported(configured(Case(pp=1)), kind)


@pytest.mark.parametrize("owned", [[0, 2], [4, 8]])
def test_tied_embeddings_must_be_on_one_rank(owned):
    case = Case(pp=1)
    with pretend_rank(case), pytest.raises(ValueError, match="tied embeddings"):
        SegmentedGPTModel(
            configured(case), LOCAL, owned, VOCABULARY, 24, share_embeddings_and_output_weights=True
        )


def test_there_is_no_forward_of_the_whole():
    case = Case(pp=1)
    with pretend_rank(case):
        model = segmented_share(case)
        with pytest.raises(RuntimeError, match="forward_segment"):
            model(torch.zeros(1, 24, dtype=torch.long))
        assert model.shared_embedding_or_output_weight() is None
