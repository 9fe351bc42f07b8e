"""Elastic helix against whole sequences, one after the other, under Megatron's own functions.

Chunks only change the order of sums: the tolerances are those of elastic 1F1B. Four ranks run with its tests.
"""

from dataclasses import replace

import pytest
import torch
from elastic_models import SMALL, documents, elastic, recipe_of, run_case
from pretend import pretend_rank
from ranks import run_on_ranks
from test_elastic_gradients import STYLES, check, check_on_ranks, errors_of, reference_of

from helixpipe.elastic import ElasticPlan, Prediction
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.plan import Kind

# One giant, many tiny ones, equal ones, one for each chunk of two, and a mixture.
BATCHES = [(700,), (7,) * 40, (90,) * 5, (64,) * 12, SMALL]


def rounds(pp, **values):
    return elastic(pp, **{"rounds": 1, **values})


def run_here(case, change=None):
    with pretend_rank(case.case):
        return [run_case(case, change)]


ONE = rounds(1, fold=5, rounds=2, style="llama", dtype=torch.float64)


@pytest.mark.parametrize(
    ("attention_range", "style"), [("core", "llama"), ("block", "llama"), ("block", "oss")]
)
def test_one_rank(attention_range, style):
    """Chunks that end one sequence and begin another, and such that do one of both."""
    recipe = recipe_of(ONE)
    assert {len(chunk.sliced_sequences) for chunk in recipe.chunks} == {1, 2}
    assert len(recipe.rounds) == 2
    case = replace(ONE, attention_range=attention_range, case=replace(ONE.case, style=style))
    check(case, run_here(case))


def cases_of(pp):
    """Every kind of batch; rounds; both types; and recomputation."""
    layers = 3 if pp == 3 else 4
    for number, lengths in enumerate(BATCHES):
        for style, dtype in STYLES.items():
            yield rounds(
                pp, lengths=lengths, style=style, dtype=dtype, fold=1 + number % 3, num_layers=layers
            )
    base = rounds(pp, rounds=3, style="llama", num_layers=layers)
    yield base
    yield replace(base, case=replace(base.case, dtype=torch.float64, style="gpt"), rounds=2)
    yield replace(base, recompute="without-attention")
    yield replace(base, recompute="products", fold=3, rounds=1)
    yield replace(base, case=replace(base.case, loss_chunk=10, mlp_chunk=7))


def cases_with_weights_of(pp):
    """Ranges whose weights are lent: every kind of batch; rounds; both types; recomputation."""
    layers = 3 if pp == 3 else 4
    for number, lengths in enumerate(BATCHES):
        for (style, dtype), attention_range in zip(STYLES.items(), ("qkv", "block"), strict=True):
            yield rounds(
                pp, lengths=lengths, style=style, dtype=dtype, fold=1 + number % 3, num_layers=layers,
                attention_range=attention_range,
            )  # fmt: skip
    base = rounds(pp, rounds=3, style="llama", num_layers=layers, attention_range="block")
    yield base
    yield replace(base, attention_range="qkv", rounds=2)
    for level in ("without-attention", "products"):
        yield replace(base, recompute=level, fold=3, rounds=1)
        yield replace(base, recompute=level, attention_range="qkv")
    for dtype in (torch.float32, torch.float64):
        # With learned sinks.
        yield replace(base, case=replace(base.case, style="oss", dtype=dtype))
    yield replace(base, case=replace(base.case, loss_chunk=10, mlp_chunk=7))


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_ranks(pp):
    check_on_ranks(list(cases_of(pp)), timeout_s=600)


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_ranks_that_borrow_weights(pp):
    check_on_ranks(list(cases_with_weights_of(pp)), timeout_s=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"pp": 2, "dp": 2}, {"pp": 2, "tp": 2}, {"pp": 2, "tp": 2, "sequence_parallel": True}],
    ids=["dp2", "tp2", "sp2"],
)
def test_tensor_and_data_parallel_ranks(layout):
    cases = [rounds(style=style, rounds=2, **layout) for style in STYLES]
    cases += [replace(cases[0], attention_range=name) for name in ("qkv", "block")]
    if layout.get("dp"):
        cases.append(rounds(overlap=True, distributed_optimizer=False, **layout))
        cases.append(replace(cases[-1], attention_range="block"))
    check_on_ranks(cases, timeout_s=600)


@pytest.mark.slow
@pytest.mark.parametrize("pp", [1, 3])
def test_a_changed_sequence_changes_no_other_ones_loss(pp):
    """To the bit, and its own it does change."""
    cases = [rounds(pp, rounds=2, style=style, num_layers=3) for style in STYLES]
    changed = range(len(SMALL))
    found = run_on_ranks(pp, losses_with_changes, cases, list(changed), timeout_s=600)[0]
    for losses in found:
        expected = losses[None]
        for number in changed:
            for index, (a, b) in enumerate(zip(losses[number], expected, strict=True)):
                assert (a == b).all() == (index != number), (number, index)


def losses_with_changes(cases, changed):
    """Of each case the losses by the sequence whose first token is another; None for no change."""
    torch.set_num_threads(1)
    return [
        {
            number: run_case(case, lambda b, n=number: with_other_token(b, n))["losses"]
            for number in (None, *changed)
        }
        for case in cases
    ]


def with_other_token(batch, number):
    others = [sequence.clone() for sequence in batch.sequences]
    if number is not None:
        others[number][0] = (others[number][0] + 1) % 96
    return ElasticBatch(batch.recipe, others)


def test_one_changed_sequence_changes_no_other_ones_loss():
    """One of those whose slices share chunks, on one rank; the others with the slow tests."""
    (expected,), (found,) = run_here(ONE), run_here(ONE, lambda batch: with_other_token(batch, 1))
    for index, (a, b) in enumerate(zip(found["losses"], expected["losses"], strict=True)):
        assert (a == b).all() == (index != 1), index


def test_slices_in_another_order_are_noticed():
    def change(batch):
        plan = batch.plan(ONE.case.num_layers)
        order = list(plan.orders[0])
        first, second = [i for i, op in enumerate(order) if op.kind is Kind.F and op.segment == 1][:2]
        order[first], order[second] = order[second], order[first]
        wrong = ElasticPlan(batch.recipe, plan.with_orders([order]), Prediction(1.0, 0.0, 0.0, (1,), (0,)))
        return ElasticBatch(wrong, batch.sequences)

    with pytest.raises(AssertionError, match="are not kept"):
        run_here(ONE, change)


def test_missing_gradients_of_keys_are_noticed(monkeypatch):
    """Those that later slices on the same rank have added."""
    take = ContextStore.take

    def forget(self, layer, piece):
        kept = take(self, layer, piece)
        kept.grad_key.zero_()
        return kept

    monkeypatch.setattr(ContextStore, "take", forget)
    _, gradients = errors_of(run_here(ONE), reference_of(ONE))
    assert max(gradients.values()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recompute": "products"}, "planned with none recomputed, the model recomputes products"),
        ({"rounds": None}, "planned for elastic-helix, which needs a model cut at its attention"),
        ({"attention_range": "qkv"}, "planned for the attention range core, the model is cut at qkv"),
    ],
)
def test_a_plan_for_another_model_is_refused(changes, words):
    """The model of the changed case, the batch of the case."""
    batch = ElasticBatch(recipe_of(ONE), documents(ONE))
    with pytest.raises(ValueError, match=words):
        run_here(replace(ONE, **changes), lambda _: batch)
