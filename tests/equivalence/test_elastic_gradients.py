"""Elastic schedules against whole sequences, one after the other, under Megatron's own functions.

Slices and packing only change the order of sums. Measured errors of gradients are below 2e-6 in fp32 and
5e-15 in fp64; of the tokens' losses, which Megatron computes in fp32 always, below 2e-6 and none.
Tensor-parallel ranks sum those fp32 losses over the vocabulary in another order than one rank: 2e-8 in fp64.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from elastic_models import (
    MIXED,
    SMALL,
    elastic,
    recipe_of,
    reference,
    run_case,
    run_cases,
    train,
    train_reference,
)
from models import relative_error
from pretend import pretend_rank
from ranks import run_on_ranks

from helixpipe.elastic import ChunkKind, ElasticPlan, Prediction
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.plan import Kind

# Each gradient tensor: norm of the difference over its norm.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-14}
TOLERANCE_OF_FP32_LOSS = 1e-7
# Each token's loss; of less than 1 the difference.
LOSS_TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-6}
STYLES = {"gpt": torch.float64, "llama": torch.float32}


@cache
def expected_of(case, **options):
    return reference(case, **options)


def reference_of(case, **options):
    """Slices, stages and checkpointing make no difference to the reference."""
    same = replace(
        case,
        case=replace(
            case.case,
            pp=1,
            tp=1,
            sequence_parallel=False,
            overlap=False,
            loss_chunk=None,
            mlp_chunk=None,
            stage_layers=(),
        ),
        num_slices=1,
        checkpointed=0,
        pipelines=1,
        rounds=None,
        recompute="none",
        attention_range="core",
    )
    return expected_of(same, **options)


def errors_of(found, expected):
    """Largest error of a token's loss, and of each gradient tensor."""
    losses, gradients = expected
    of_losses = [
        float(((torch.as_tensor(a) - b).abs() / b.abs().clamp_min(1)).max())
        for result in found
        if result["losses"] is not None
        for a, b in zip(result["losses"], losses[result["replica"]], strict=True)
    ]
    (mine,) = (result["gradients"] for result in found if result["gradients"] is not None)
    assert set(mine) == set(gradients)
    mine = {name: torch.as_tensor(gradient) for name, gradient in mine.items()}
    return max(of_losses), {name: relative_error(mine[name], gradients[name]) for name in gradients}


def check(case, found, **options):
    expected = reference_of(case, **options)
    # A gradient of zeros would agree with anything.
    assert min(float(gradient.norm()) for gradient in expected[1].values()) > 1e-3
    loss, gradients = errors_of(found, expected)
    worst = max(gradients, key=gradients.get)
    assert loss <= LOSS_TOLERANCE[case.case.dtype], (str(case), loss)
    tolerance = TOLERANCE[case.case.dtype]
    tolerance = max(tolerance, TOLERANCE_OF_FP32_LOSS) if case.case.tp > 1 else tolerance
    assert gradients[worst] <= tolerance, (str(case), worst, gradients[worst])
    assert all(result["trace_is_plan"] for result in found), str(case)


def run_here(case, change=None):
    with pretend_rank(case.case):
        return [run_case(case, change)]


def single_rank_cases():
    for number, num_slices in enumerate((1, 2, 4, 8)):
        for style, dtype in STYLES.items():
            # 0 to all 4 layers, and different numbers for every chunk.
            checkpointed = (0, 4, None, 1, 2, 3, None, 0)[2 * number + (style == "llama")]
            yield elastic(
                1, style=style, dtype=dtype, num_slices=num_slices, checkpointed=checkpointed,
                pipelines=1 + number % 2,
            )  # fmt: skip


@pytest.mark.parametrize("case", single_rank_cases(), ids=str)
def test_one_rank(case):
    check(case, run_here(case))


def test_kinds_of_chunks_are_all_there():
    for num_slices in (2, 4, 8):
        kinds = {chunk.kind for chunk in recipe_of(elastic(1, num_slices=num_slices)).chunks}
        assert {ChunkKind.SPLIT, ChunkKind.HYBRID} <= kinds
    assert recipe_of(elastic(1, num_slices=1)).chunks[0].kind is ChunkKind.BATCHED


@pytest.mark.parametrize("style", STYLES)
def test_megatrons_own_core_attention(style):
    case = elastic(1, style=style, checkpointed=None)
    check(case, run_here(case), stock_attention=True)


@pytest.mark.parametrize("style", STYLES)
def test_loss_and_mlp_in_chunks(style):
    case = elastic(1, style=style, checkpointed=None, loss_chunk=10, mlp_chunk=7)
    check(case, run_here(case))


@pytest.mark.parametrize("mlp_chunk", [None, pytest.param(7, marks=pytest.mark.slow)])
def test_experts(mlp_chunk):
    """A token is routed as in its whole sequence, where no loss is about all of them."""
    router = (("moe_aux_loss_coeff", 0.0),)
    case = elastic(
        1, style="llama", experts=4, router=router, checkpointed=None, num_slices=4, mlp_chunk=mlp_chunk
    )
    check(case, run_here(case))


def ranks_cases(pp):
    for style, dtype in STYLES.items():
        case = elastic(pp, style=style, dtype=dtype)
        yield case
        yield replace(case, num_slices=8, checkpointed=None, pipelines=2)
    yield replace(case, num_slices=2, checkpointed=4 // pp)
    yield replace(case, num_slices=1)
    if pp == 2:
        # Fewer layers beside the head, tied or not.
        yield elastic(pp, stage_layers=(3, 1), checkpointed=None)
        yield elastic(pp, stage_layers=(3, 1), style="llama", num_slices=8, dtype=torch.float64)
        yield elastic(pp, style="llama", lengths=(700, 4096, 1, 33), num_layers=2, checkpointed=None)


def parallel_cases(**layout):
    """Tensor parallelism, where lengths of chunks are no multiples of it, and data parallelism."""
    base = elastic(checkpointed=None, **layout)
    yield replace(base, case=replace(base.case, style="llama"))
    if base.case.tp > 1:
        for style, dtype in STYLES.items():
            yield replace(base, case=replace(base.case, style=style, dtype=dtype, sequence_parallel=True))
        yield elastic(sequence_parallel=True, loss_chunk=10, mlp_chunk=7, checkpointed=None, **layout)
    if base.case.dp > 1:
        yield replace(base, num_slices=2, case=replace(base.case, overlap=True))
        yield replace(base, case=replace(base.case, overlap=True, distributed_optimizer=False, tied=False))


def round_cases(pp):
    """Elastic helix, whose own tests are in test_round_gradients, in the processes that run here anyway."""
    yield elastic(pp, rounds=2, fold=1, style="llama", dtype=torch.float64)
    yield elastic(pp, rounds=1, lengths=(160, 90, 5), recompute="without-attention")


LAYOUTS = {
    "pp2": list(ranks_cases(2)),
    "pp4": [*ranks_cases(4), *round_cases(4)],
    "tp2": list(parallel_cases(pp=1, tp=2)),
    "pp2-dp2": list(parallel_cases(pp=2, dp=2)),
    "pp2-tp2": list(parallel_cases(pp=2, tp=2)),
}


# Two stages, and replicas of them: the others take as long again.
QUICK = [
    pytest.param(name, marks=pytest.mark.slow) if "tp2" in name or "pp4" in name else name for name in LAYOUTS
]


@pytest.mark.parametrize("layout", QUICK)
def test_ranks(layout):
    check_on_ranks(LAYOUTS[layout])


def check_on_ranks(cases, timeout_s=200):
    by_rank = run_on_ranks(cases[0].case.world_size, run_cases, cases, timeout_s=timeout_s)
    for case, found in zip(cases, zip(*by_rank, strict=True), strict=True):
        check(case, found)


def test_replicas_have_different_numbers_of_chunks():
    case = LAYOUTS["pp2-dp2"][0]
    assert len({len(recipe_of(case, replica).chunks) for replica in range(2)}) == 2


def test_training_steps_give_the_same_losses():
    """Other plans at every step, on replicas with other numbers of chunks, with everything overlapped."""
    case = elastic(
        2, dp=2, style="llama", num_slices=4, checkpointed=None, distributed_optimizer=True, overlap=True,
        num_layers=2,
    )  # fmt: skip
    histories = run_on_ranks(4, train, case, 5)
    (expected,) = run_on_ranks(1, train_reference, case, 5)
    assert abs(expected[-1][0] - expected[0][0]) > 1e-2
    for history in histories:
        for found, wanted in zip(history, expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_lengths_from_1_to_4096(pp):
    cases = [
        elastic(pp, lengths=MIXED, num_slices=num_slices, style=style, dtype=dtype, checkpointed=checkpointed)
        for num_slices, checkpointed in ((1, 0), (2, None), (4, 4 // pp), (8, None))
        for style, dtype in (*STYLES.items(), ("llama", torch.float64))
    ]
    check_on_ranks(cases, timeout_s=1500)


def test_a_changed_sequence_changes_no_other_ones_loss():
    """To the bit, and its own it does change."""
    for style in STYLES:
        case = elastic(1, style=style, checkpointed=None)
        (expected,) = run_here(case)
        for changed in range(len(SMALL)):

            def change(batch, changed=changed):
                others = [s.clone() for s in batch.sequences]
                others[changed][0] = (others[changed][0] + 1) % 96
                return ElasticBatch(batch.recipe, others)

            (found,) = run_here(case, change)
            for index, (a, b) in enumerate(zip(found["losses"], expected["losses"], strict=True)):
                assert (a == b).all() == (index != changed), (style, changed, index)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Kind.F, "tokens 0 to 54 before a slice of sequence 1 are not kept"),
        (Kind.B, "no later slice's backward has run"),
    ],
)
def test_slices_in_another_order_are_noticed(kind, words):
    """The first two forwards, or the first two backwards, change places."""
    case = elastic(1)

    def change(batch):
        plan = batch.plan(case.case.num_layers)
        order = list(plan.orders[0])
        first, second = [index for index, op in enumerate(order) if op.kind is kind][:2]
        order[first], order[second] = order[second], order[first]
        wrong = ElasticPlan(batch.recipe, plan.with_orders([order]), Prediction(1.0, 0.0, 0.0, (1,), (0,)))
        return ElasticBatch(wrong, batch.sequences)

    with pytest.raises(AssertionError, match=words):
        run_here(case, change)


def test_one_wrong_label_is_noticed():
    case = elastic(1, style="llama")

    def change(batch):
        others = [s.clone() for s in batch.sequences]
        others[1][-1] = (others[1][-1] + 1) % 96
        return ElasticBatch(batch.recipe, others)

    loss, gradients = errors_of(run_here(case, change), reference_of(case))
    assert loss > 0.01
    assert max(gradients.values()) > 1e-3


def test_a_wrong_context_is_noticed(monkeypatch):
    """A key that is off by a thousandth, in one layer, in one sequence."""
    case = elastic(1, style="llama", dtype=torch.float64)
    original = ContextStore.keep

    def keep(self, layer, piece, key, value):
        if layer == 2 and piece.sequence == 1 and piece.start:
            key = key.clone()
            key[:, :, 0] *= 1.001
        original(self, layer, piece, key, value)

    monkeypatch.setattr(ContextStore, "keep", keep)
    _, gradients = errors_of(run_here(case), reference_of(case))
    assert max(gradients.values()) > 1e-6


def test_gradients_of_the_context_are_noticed(monkeypatch):
    """Without those that come back from later slices."""
    case = elastic(1, style="llama")
    take = ContextStore.take

    def forget(self, layer, piece):
        kept = take(self, layer, piece)
        kept.grad_key.zero_()
        return kept

    monkeypatch.setattr(ContextStore, "take", forget)
    loss, gradients = errors_of(run_here(case), reference_of(case))
    assert loss <= LOSS_TOLERANCE[torch.float32]
    assert max(gradients.values()) > 1e-3
