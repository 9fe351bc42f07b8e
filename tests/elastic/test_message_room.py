"""Buffers of messages in elastic plans: as many bytes as the communicator holds, and room for them."""

from dataclasses import replace

import pytest
import torch
from counting import held_while_running
from planning import LENGTHS, make_job

from helixpipe.elastic import ElasticPlan, plan_batch, predict_baselines
from helixpipe.elastic.chunk_schedule import costs_of_recipe
from helixpipe.elastic.search.quick_plan import plan_quickly
from helixpipe.plan.simulation.memory import held_bytes
from helixpipe.plan.simulation.message_buffers import UnfinishedSends, buffer_bytes
from helixpipe.plan.simulation.network import Network
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

LINKS = Network(latency_ms=0.01, gb_per_s=10.0)


def job_with_links(memory_gib=8.0, item_bytes=8192.0, tensor_parallel=1, **changes):
    """Messages of ``item_bytes`` for each token."""
    job = make_job(memory_gib, **changes)
    return replace(
        job,
        costs=replace(
            job.costs,
            network=LINKS,
            input_bytes=item_bytes,
            tensor_parallel=tensor_parallel,
            token_multiple=tensor_parallel,
        ),
    )


class TokenSegments:
    """One number for each token of a chunk that a GPU has passes from stage to stage."""

    lending = contexts = None

    def __init__(self, plan, costs):
        self.weight_gradients = DeferredWeightGradients()
        self._last = plan.plan.num_ranks - 1
        self._tokens = [costs.padded(chunk) // costs.tensor_parallel for chunk in plan.recipe.chunks]

    def layout(self, edge, micro_batch):
        return MessageLayout((torch.Size((self._tokens[micro_batch],)),), torch.float64)

    def forward(self, segment, micro_batch, inputs):
        ones = torch.ones(self._tokens[micro_batch], dtype=torch.float64, requires_grad=True)
        (values,) = inputs or (ones,)
        return (values.sum() if segment == self._last else 2 * values,)


@pytest.mark.parametrize("limit", [UnfinishedSends.max_bytes, 50_000], ids=["by number", "by bytes"])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("stages", [2, 4])
def test_the_plan_counts_what_the_communicator_holds(stages, tensor_parallel, limit, monkeypatch):
    monkeypatch.setattr(UnfinishedSends, "max_bytes", limit)
    job = job_with_links(item_bytes=8.0, tensor_parallel=tensor_parallel, num_stages=stages)
    plan = plan_quickly(LENGTHS, job, num_slices=4)
    assert len(plan.recipe.pipelines) == 1
    assert plan.plan.slices
    costs = costs_of_recipe(plan.recipe, job.num_layers, job.costs)
    counted = [buffer_bytes(plan.plan, costs, stage, tensor_parallel) for stage in range(stages)]
    assert counted == held_while_running(plan.plan, lambda: TokenSegments(plan, job.costs))
    # And the prediction adds them to what chunks keep, operation by operation.
    for stage, buffers in enumerate(counted):
        held = [level.during for level in held_bytes(plan.plan, costs, stage)]
        assert plan.prediction.peak_bytes[stage] == max(held)
        assert plan.prediction.peak_with_messages[stage] == max(map(sum, zip(held, buffers, strict=True)))


@pytest.mark.parametrize("make", [plan_batch, plan_quickly])
def test_where_messages_are_in_the_way_more_is_computed_again(make):
    job = job_with_links(8.0)
    free = make(LENGTHS, job)
    assert min(free.prediction.message_bytes) > 2**20
    # What chunks keep fits to the byte.
    tight = replace(job, memory_limit_bytes=max(free.prediction.peak_bytes))
    found = make(LENGTHS, tight)
    assert max(found.prediction.peak_with_messages) <= tight.memory_limit_bytes
    assert found.prediction.recompute > free.prediction.recompute
    assert ElasticPlan.from_json(found.to_json()) == found


def test_baselines_leave_the_same_room():
    job = job_with_links(2.0)
    for baseline in predict_baselines(LENGTHS, job):
        assert max(baseline.prediction.peak_with_messages) <= job.memory_limit_bytes


def least_limit(job):
    """Bytes below which nothing fits, to a thousandth."""
    fails, fits = 0, job.memory_limit_bytes
    while fits - fails > fits // 1000:
        middle = (fails + fits) // 2
        try:
            plan_quickly([4000, 4000], replace(job, memory_limit_bytes=middle))
        except ValueError:
            fails = middle
        else:
            fits = middle
    return fails


def test_a_job_that_messages_alone_keep_from_fitting():
    """The message says so."""
    without = least_limit(make_job(token_capacity=4000))
    job = job_with_links(token_capacity=4000, memory_limit_bytes=int(without * 1.01))
    with pytest.raises(ValueError, match=r"short of memory: with all layers .* and \d\.\d\d GiB of messages"):
        plan_quickly([4000, 4000], job)
