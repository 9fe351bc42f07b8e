"""The bytes of keys and values that elastic helix holds before every operation, against its plan's."""

import pytest
import torch
from elastic_memory import store_levels
from elastic_models import elastic, recipe_of
from pretend import pretend_rank
from ranks import run_on_ranks

from helixpipe.elastic.elastic_plan import plan_of
from helixpipe.plan import Kind, Operation
from helixpipe.plan.build import complete
from helixpipe.plan.context_lifetime import Content, holdings

# Of keys and values of one token in one layer, in fp32; sums of their gradients are as large.
TOKEN_BYTES = 2 * 32 * 4


def planned_levels(case, rank):
    """Bytes before each computation, when what it waits for has come, and what it is to keep has not.

    Beside what the plan says are the keys of slices that attend on this rank and are gone on with here, from
    their forward to their backward: they are among what their forward keeps.
    """
    recipe = recipe_of(case)
    plan = plan_of(recipe, case.case.num_layers)
    tokens = [chunk.continued_tokens for chunk in recipe.chunks]
    place = {op: i for i, op in enumerate(plan.orders[rank])}
    # The last computation before a message leaves.
    with_messages = complete(plan)
    begun = -1
    for op in with_messages.orders[rank]:
        begun += op.kind.is_compute
        place.setdefault(op, begun)
    spans = []
    for held in holdings(with_messages, rank):
        if held.content is not Content.RETURNED and held.start.kind.is_compute:
            size = sum(tokens[i] for i in held.micro_batches)
            spans.append((place[held.start] + 1, place[held.end], size))
    for held in holdings(plan, rank):
        # What is borrowed is taken by the first reader.
        if held.content is Content.KEYS and held.start.segment == held.segment:
            size = sum(tokens[i] for i in held.micro_batches)
            spans.append((place[held.start], place[held.end], size))
    for segment in range(1, plan.num_segments, 2):
        for group in plan.slices:
            here = [i for i in group if plan.rank_of(segment, i) == rank]
            for i in here[:-1]:
                first, last = (place[Operation(segment, kind, i)] for kind in (Kind.F, Kind.B))
                spans.append((first + 1, last, tokens[i]))
    return [
        (str(op), TOKEN_BYTES * sum(size for first, last, size in spans if first <= i <= last))
        for i, op in enumerate(plan.orders[rank])
    ]


def check(case, by_rank):
    for rank, found in enumerate(by_rank):
        expected = planned_levels(case, rank)
        assert found == expected, (str(case), rank)
        assert max(size for _, size in found) > 0


CASES = [{"rounds": 2, "fold": 2}, {"rounds": 1, "fold": 3, "lengths": (400, 30, 200, 5)}]


def test_one_rank():
    case = elastic(1, fold=6, rounds=1)
    with pretend_rank(case.case):
        check(case, [store_levels(case)])


@pytest.mark.slow
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_ranks(pp):
    cases = [elastic(pp, num_layers=3 if pp == 3 else 4, **changes) for changes in CASES]
    by_rank = run_on_ranks(pp, store_levels_of, cases)
    for case, found in zip(cases, zip(*by_rank, strict=True), strict=True):
        check(case, found)


def store_levels_of(cases):
    """:func:`store_levels` of several cases of one layout."""
    torch.set_num_threads(1)
    return [store_levels(case) for case in cases]
