"""Recomputation without attention, chunked MLP and chunked loss in whole models.

Each option against the same model without it: losses, gradients, what is kept, and how often things run.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from kept import Kept, LargestTensor
from memory_worker import SAVINGS, compare, compare_on_ranks, gradients_of, losses_of
from models import SEED, VOCABULARY, Case, relative_error
from pretend import pretend_rank
from ranks import run_on_ranks
from stages import batch_of, block_share, configured, gpt_stage, qkv_share, segmented_share
from torch import Tensor

from helixpipe.layers.attention.aten import AtenCpu
from helixpipe.layers.attention.choice import AUTO, choose, problem_of
from helixpipe.layers.initialization import initialize_weights
from helixpipe.layers.recomputing_layer import (
    MemorySaving,
    SavingTransformerLayer,
    check_supported,
    local_size,
)
from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.cost_model import HARDWARE, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.cost_model.shape import ModelShape

BUILDS = [segmented_share, qkv_share, block_share, gpt_stage]
every_build = pytest.mark.parametrize("build", BUILDS, ids=["core", "qkv", "block", "stage"])
every_style = pytest.mark.parametrize("style", ["gpt", "llama"])
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def check(case, errors):
    # Losses too are not the same to the bit: matrix products of few tokens round otherwise.
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE[case.dtype], (str(case), worst, errors[worst])


@every_build
@every_style
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_losses_and_gradients_stay(build, style, dtype, tied):
    case = Case(pp=1, style=style, dtype=dtype, tied=tied, seq_length=127, micro_batch_size=2, num_layers=2)
    with pretend_rank(case):
        reference = gradients_of(case, build)
        for saving in SAVINGS:
            saved = replace(case, **saving)
            check(saved, compare(gradients_of(saved, build), reference))


@every_build
def test_gelu_models_recompute_without_attention_to_the_bit(build):
    case = Case(pp=1, seq_length=127)
    with pretend_rank(case):
        _, expected = gradients_of(case, build)
        _, found = gradients_of(replace(case, without_attention=True), build)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_build
@every_style
def test_dropout_is_drawn_once(build, style):
    """Nothing that is computed again draws random numbers: masks and their order are the reference's."""
    case = Case(pp=1, style=style, hidden_dropout=0.3, num_layers=2)
    with pretend_rank(case):
        reference = gradients_of(case, build)
        without = gradients_of(replace(case, hidden_dropout=0.0), build)
        assert not torch.equal(reference[0], without[0])
        for saving in SAVINGS:
            saved = replace(case, **saving)
            check(saved, compare(gradients_of(saved, build), reference))


@every_build
@every_style
def test_bfloat16_is_as_exact_as_without(build, style):
    """Each gradient's error against float64 is at most twice that of the model without the option."""
    case = Case(pp=1, style=style, dtype=torch.bfloat16, seq_length=127, num_layers=2)
    with pretend_rank(case):
        _, exact = gradients_of(replace(case, dtype=torch.float64), build)

        def errors(case):
            _, found = gradients_of(case, build)
            return {name: relative_error(found[name], exact[name]) for name in exact}

        reference = errors(case)
        for saving in SAVINGS:
            for name, error in errors(replace(case, **saving)).items():
                assert error <= 2 * reference[name], (saving, name)


@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tensor_parallel_ranks(sequence_parallel):
    cases = [
        Case(pp=1, tp=2, style=style, seq_length=126, sequence_parallel=sequence_parallel, num_layers=2)
        for style in ("gpt", "llama")
    ]
    for of_rank in run_on_ranks(2, compare_on_ranks, cases, BUILDS):
        for case, errors in of_rank:
            check(case, errors)


@every_build
@every_style
def test_attention_runs_once(build, style, monkeypatch):
    """One forward call per layer, and one backward call, for each micro batch."""
    calls = Counter()
    case = Case(pp=1, style=style, without_attention=True)
    # Tried now, if not before, and not when it is counted.
    choose(AUTO, problem_of(configured(case)))
    for name in ("forward", "backward"):
        original = getattr(AtenCpu, name)

        def counted(*arguments, original=original, name=name, **options):
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(AtenCpu, name, counted)
    with pretend_rank(case):
        gradients_of(case, build)
    assert calls == {"forward": case.num_layers, "backward": case.num_layers}


def test_only_what_the_backward_pass_needs_runs_twice():
    case = Case(pp=1, without_attention=True, num_layers=2)
    kinds = ("input_layernorm", "pre_mlp_layernorm", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    # Where QKV's result is sent away, only norm1 is needed again.
    for build, qkv in ((segmented_share, 1), (qkv_share, 2), (block_share, 2), (gpt_stage, 2)):
        calls = Counter()
        with pretend_rank(case):
            model = build(case)
            for name, module in model.named_modules():
                if name.endswith(kinds):
                    kind = name.split(".")[-1]
                    module.register_forward_hook(lambda *_, kind=kind, calls=calls: calls.update([kind]))
            losses_of(model, case).sum().backward()
        per_layer = {kind: count / case.num_layers for kind, count in calls.items()}
        assert per_layer == dict(zip(kinds, (2, 2, qkv, 1, 2, 1), strict=True))


def test_products_never_run_twice():
    case = Case(pp=1, levels="products", num_layers=2)
    kinds = ("input_layernorm", "pre_mlp_layernorm", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    for build in BUILDS:
        calls = Counter()
        with pretend_rank(case):
            model = build(case)
            for name, module in model.named_modules():
                if name.endswith(kinds):
                    kind = name.split(".")[-1]
                    module.register_forward_hook(lambda *_, kind=kind, calls=calls: calls.update([kind]))
            losses_of(model, case).sum().backward()
        assert [calls[kind] / case.num_layers for kind in kinds] == [2, 2, 1, 1, 1, 1]


MIXTURE = "products:1,none:1,without-attention:2"


@every_build
@every_style
def test_levels_may_differ_by_layer(build, style):
    case = Case(pp=1, style=style, seq_length=127)
    with pretend_rank(case):
        reference = gradients_of(case, build)
        mixed = replace(case, levels=MIXTURE)
        check(mixed, compare(gradients_of(mixed, build), reference))


def planned_costs(case, schedule, recompute, **options):
    """What the planner believes of the case's model in fp32."""
    llama = case.style == "llama"
    shape = ModelShape(
        name="small",
        num_layers=case.num_layers,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2 if llama else 4,
        head_dim=8,
        ffn_hidden_size=80 if llama else 128,
        vocab_size=VOCABULARY,
        gated=llama,
        tied=case.is_tied,
    )
    workload = Workload(
        model=shape,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        whole_logits=case.loss_chunk is None,
        element_bytes=4,
    )
    request = ScheduleRequest(num_layers=case.num_layers, num_ranks=1, num_microbatches=2, **options)
    plan = build_plan(schedule, request)
    return workload, costs_of_plan(predict_pieces(workload, HARDWARE["h20"]), plan, recompute).segments


def kept_by_segment(case, arrive=lambda value: value.detach().clone()):
    """Bytes by segment: saved tensors, and the inputs whose data the executor keeps.

    Inputs are as a message brings them, each in a storage of its own size, unless they arrive otherwise.
    """
    kept = {}
    with pretend_rank(case):
        model = segmented_share(case)
        values = ()
        for segment in range(model.num_segments):
            values = tuple(arrive(value).requires_grad_() for value in values)
            returned = model.forward_segment(segment, values, **batch_of(case))
            # A residual that comes with others is cut off its message.
            kept[segment] = Kept(model, returned).bytes(values[: max(1, len(values) - 1)])
            values = returned
    return kept


def kept_by_rms_norm(workload):
    """What PyTorch's RMSNorm on CPUs keeps beside its input: the same divided by the deviation, and that."""
    return workload.unit_bytes + 4 * workload.tokens


@every_style
@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("mlp_chunk", [None, 16])
def test_helix_keeps_what_the_planner_believes(style, micro_batch_size, mlp_chunk):
    """Three units between the cores of two layers, to the byte: attention's output and both norms' inputs."""
    case = Case(
        pp=1, style=style, seq_length=128, micro_batch_size=micro_batch_size,
        without_attention=True, mlp_chunk=mlp_chunk, loss_chunk=16,
    )  # fmt: skip
    kept = kept_by_segment(case)
    workload, planned = planned_costs(case, "helix", Recompute.WITHOUT_ATTENTION)
    assert planned["middle"].bytes == 3 * workload.unit_bytes
    for segment in range(2, 2 * case.num_layers, 2):
        assert kept[segment] == planned["middle"].bytes
        assert kept[segment - 1] == planned["attention"].bytes
    # The ends keep tokens and labels, too, and statistics of the last norm, which is not computed again.
    small = 3 * 8 * workload.tokens
    assert 0 <= kept[0] - planned["first"].bytes <= small
    norm = kept_by_rms_norm(workload) if style == "llama" else 0
    assert 0 <= kept[2 * case.num_layers] - planned["last"].bytes - norm <= small


@every_style
@pytest.mark.parametrize("level", [Recompute.NONE, Recompute.WITHOUT_ATTENTION])
def test_attention_on_the_same_rank_keeps_no_more_than_of_a_message(style, level):
    """Values are a view of what QKV gave. Beside rotated queries and keys they would keep all of it."""
    case = Case(pp=1, style=style, seq_length=128, levels=level.value, loss_chunk=16)
    kept = kept_by_segment(case, arrive=Tensor.detach)
    _, planned = planned_costs(case, "helix", level)
    for segment in range(1, 2 * case.num_layers, 2):
        assert kept[segment] == planned["attention"].bytes


@every_style
@pytest.mark.parametrize("attention_range", ["qkv", "block"])
def test_wider_ranges_keep_what_the_planner_believes(style, attention_range):
    """The input of either norm and attention's output, which with ``qkv`` two ranks keep, to the byte."""
    case = Case(
        pp=1, style=style, seq_length=128, attention_range=attention_range, without_attention=True,
        loss_chunk=16,
    )  # fmt: skip
    kept = kept_by_segment(case)
    workload, planned = planned_costs(
        case, "helix", Recompute.WITHOUT_ATTENTION, attention_range=attention_range
    )
    for segment in range(2, 2 * case.num_layers, 2):
        assert kept[segment] == planned["middle"].bytes
        assert kept[segment - 1] == planned["attention"].bytes
    units = {"qkv": 4, "block": 3}[attention_range]
    layer = planned["middle"].bytes + planned["attention"].bytes
    assert layer == units * workload.unit_bytes + workload.kept_tensors["log-sum-exp"]


@every_style
@pytest.mark.parametrize("attention_range", ["core", "qkv", "block"])
def test_products_keep_what_the_planner_believes(style, attention_range):
    """Inputs of norms, attention's output, and the results of QKV and fc1, to the byte."""
    case = Case(
        pp=1, style=style, seq_length=128, attention_range=attention_range, levels="products", loss_chunk=16
    )
    kept = kept_by_segment(case)
    _, planned = planned_costs(case, "helix", Recompute.PRODUCTS, attention_range=attention_range)
    for segment in range(2, 2 * case.num_layers, 2):
        assert kept[segment] == planned["middle"].bytes
        assert kept[segment - 1] == planned["attention"].bytes


@every_style
@pytest.mark.parametrize("level", [Recompute.PRODUCTS, Recompute.WITHOUT_ATTENTION])
def test_whole_layers_keep_what_the_planner_believes(style, level):
    def kept(num_layers):
        case = Case(pp=1, style=style, num_layers=num_layers, seq_length=128, levels=level.value)
        with pretend_rank(case):
            model = gpt_stage(case)
            saved = Kept(model, [losses_of(model, case)])
            return saved.bytes(), planned_costs(case, "1f1b", level)[1]["stage0"].bytes

    (two, planned_two), (four, planned_four) = kept(2), kept(4)
    assert four - two == planned_four - planned_two


@every_style
def test_without_recomputation_helix_keeps_more(style):
    case = Case(pp=1, style=style, seq_length=128)
    workload, planned = planned_costs(case, "helix", Recompute.NONE)
    kept = kept_by_segment(case)[2]
    assert kept > 3 * 4 * workload.unit_bytes
    if style == "gpt":
        # Mean and deviation of two norms.
        assert kept - planned["middle"].bytes == 4 * 4 * workload.tokens


@every_style
@pytest.mark.parametrize("mlp_chunk", [None, 16])
def test_a_whole_layer_keeps_three_units_and_the_log_sum_exp(style, mlp_chunk):
    def kept(num_layers):
        case = Case(
            pp=1, style=style, num_layers=num_layers, seq_length=128, without_attention=True,
            mlp_chunk=mlp_chunk,
        )  # fmt: skip
        with pretend_rank(case):
            model = gpt_stage(case)
            return Kept(model, [losses_of(model, case)]).bytes()

    workload, _ = planned_costs(Case(pp=1, style=style, seq_length=128), "1f1b", Recompute.NONE)
    expected = 3 * workload.unit_bytes + workload.kept_tensors["log-sum-exp"]
    assert kept(4) - kept(2) == 2 * expected


@every_build
@every_style
def test_slices_bound_the_largest_tensor(build, style):
    case = Case(pp=1, style=style, seq_length=512, num_layers=1, tied=False)

    def largest(**saving):
        saved = replace(case, without_attention=True, **saving)
        with pretend_rank(case):
            model = build(saved)
            with LargestTensor() as tensors:
                losses_of(model, saved).sum().backward()
        return tensors.bytes // (4 * case.seq_length)

    inner = 160 if style == "llama" else 128
    assert largest(loss_chunk=16) == inner
    assert largest(mlp_chunk=16) == VOCABULARY
    # All that is left is QKV: 3 units, or 2 with grouped heads.
    assert largest(mlp_chunk=16, loss_chunk=16) == (96 if style == "gpt" else 64)


def test_slices_of_a_sequence_parallel_rank_are_its_share():
    case = Case(pp=1, tp=2, sequence_parallel=True)
    with pretend_rank(case):
        config = segmented_share(case).config
    assert [local_size(size, config) for size in (1, 2, 7, 8)] == [1, 1, 3, 4]
    config.sequence_parallel = False
    assert local_size(7, config) == 7


@every_build
def test_evaluation_is_unchanged(build):
    case = Case(pp=1, without_attention=True, mlp_chunk=7, loss_chunk=5)
    with pretend_rank(case), torch.no_grad():
        plain, saving = build(replace(case, **dict.fromkeys(SAVINGS[-1]))), build(case)
        initialize_weights(plain, plain.config, SEED)
        saving.load_state_dict(plain.state_dict())
        torch.testing.assert_close(losses_of(saving, case), losses_of(plain, case), rtol=1e-6, atol=0)


def test_what_a_layer_cannot_honour_is_refused():
    case = Case(pp=1, without_attention=True)
    with pretend_rank(case):
        layer = gpt_stage(case).decoder.layers[0]
        hidden = torch.randn(8, 1, 32, requires_grad=True)
        with pytest.raises(ValueError, match="Megatron's packed sequences are not supported"):
            layer(hidden, packed_seq_params=object())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"moe_latent_size": 8}, "latent experts"),
        ({"multi_latent_attention": True}, "multi-latent attention"),
        ({"attention_output_gate": True}, "output-gated attention"),
        ({"fused_single_qkv_rope": True}, "fused QKV rotary"),
        ({"fp8": "hybrid"}, "fp8"),
        ({"fp4": "e2m1"}, "fp4"),
        ({"cpu_offloading": True}, "CPU offloading"),
        ({"fine_grained_activation_offloading": True}, "CPU offloading"),
        ({"cuda_graph_impl": "local"}, "CUDA graphs"),
        ({"recompute_granularity": "full"}, "activation recomputation"),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, "recomputation of the MLP"),
    ],
    ids=lambda value: str(value),
)
def test_options_that_would_be_wrong_are_refused(values, named):
    level = Recompute.PRODUCTS
    check_supported(configured(Case(pp=1)), level)
    with pytest.raises(ValueError, match=f"do not support .*{named}.*; leave one out"):
        check_supported(configured(Case(pp=1), **values), level)


def test_megatrons_recomputation_goes_with_a_chunked_mlp():
    case = Case(pp=1, num_layers=2)
    with pretend_rank(case):
        reference = gradients_of(case, gpt_stage)
        for recompute in ("selective", "full"):
            saved = replace(case, recompute=recompute, mlp_chunk=7)
            check(saved, compare(gradients_of(saved, gpt_stage), reference))


def test_foreign_linear_layers_cannot_run_in_slices(monkeypatch):
    class ForeignLinear(torch.nn.Linear):
        """As in Transformer Engine."""

    monkeypatch.setattr("helixpipe.layers.slices.RowParallelLinear", ForeignLinear)
    case = Case(pp=1, mlp_chunk=4)
    with pretend_rank(case), pytest.raises(ValueError, match="use --transformer-impl local"):
        gpt_stage(case)


def test_layers_are_megatrons_own_where_nothing_is_saved():
    case = Case(pp=1, loss_chunk=4)
    with pretend_rank(case):
        assert not any(isinstance(m, SavingTransformerLayer) for m in gpt_stage(case).modules())
    assert not MemorySaving(loss_chunk_size=4).changes_layer(0)
    assert MemorySaving(mlp_chunk_size=4).changes_layer(0)
