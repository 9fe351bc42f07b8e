"""Plans for forward passes alone."""

from dataclasses import replace

import pytest
from planning import LENGTHS, make_job

from helixpipe.elastic import plan_evaluation
from helixpipe.elastic.chunk_schedule import elastic_plan
from helixpipe.elastic.evaluation import forward_ms
from helixpipe.plan.build import complete


def test_every_token_is_evaluated_and_nothing_is_recomputed():
    job = make_job()
    recipe = plan_evaluation(LENGTHS, job)
    recipe.check(LENGTHS)
    assert recipe.pipelines == (len(recipe.chunks),)
    assert not any(count for row in recipe.checkpointed for count in row)
    assert len(complete(elastic_plan(recipe, job.num_layers)).forward_only().orders) == job.num_stages


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_the_fastest_number_of_slices_is_taken(num_stages):
    job = make_job(num_stages=num_stages)
    best = forward_ms(plan_evaluation(LENGTHS, job), job)
    singles = [forward_ms(plan_evaluation(LENGTHS, job, slice_counts=[k]), job) for k in (1, 2, 4, 8, 16, 32)]
    assert best <= min(singles)
    assert num_stages == 1 or best < 0.9 * singles[0]


def test_chunks_are_no_larger_than_memory_allows():
    job = make_job(token_capacity=1000)
    recipe = plan_evaluation(LENGTHS, job)
    assert max(chunk.tokens for chunk in recipe.chunks) <= 1000
    with pytest.raises(ValueError, match=r"no plan fits the evaluation; .* slice of 4096 tokens") as caught:
        plan_evaluation([4096], replace(job, token_capacity=10), slice_counts=[1])
    assert "\n" not in str(caught.value)
