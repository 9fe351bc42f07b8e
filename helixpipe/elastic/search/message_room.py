"""Room for the buffers of messages.

What they hold follows from a plan's order, so a plan is made first. Where it does not fit with them, it is
made again with as much left free as they held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from helixpipe.elastic.chunk_schedule import costs_of_recipe, elastic_plan
from helixpipe.elastic.elastic_plan import ElasticPlan, Prediction, predict
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.recipe import Recipe
from helixpipe.plan.lower import lower
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.message_buffers import buffer_bytes
from helixpipe.plan.validate import validate


@dataclass(frozen=True)
class Fitted:
    """A recipe whose chunks and messages fit.

    Attributes:
        recipe: of the batch.
        plan: with its messages, not validated.
        prediction: of the plan.
    """

    recipe: Recipe
    plan: Plan
    prediction: Prediction

    def validated(self, solver_seconds: float = 0.0) -> ElasticPlan:
        """The elastic plan, which may be executed."""
        validate(self.plan)
        return ElasticPlan(self.recipe, self.plan, self.prediction, solver_seconds)


def fit_messages(decide: Callable[[ElasticJob], Recipe], job: ElasticJob) -> Fitted:
    """The recipe that fits together with its messages.

    Args:
        decide: makes a recipe that fits without messages into what ``reserved_bytes`` leave of the limit, or
            raises ``OutOfMemory``.
        job: what it is for.
    """
    reserved = [0] * job.num_stages
    while True:
        recipe = decide(replace(job, reserved_bytes=tuple(reserved)) if any(reserved) else job)
        costs = costs_of_recipe(recipe, job.num_layers, job.costs)
        plan = lower(elastic_plan(recipe, job.num_layers), costs)
        prediction = predict(recipe, plan, job)
        exceeded = [
            stage for stage, peak in enumerate(prediction.peak_with_messages) if peak > job.memory_limit_bytes
        ]
        if not exceeded:
            return Fitted(recipe, plan, prediction)
        for stage in exceeded:
            # More than was reserved, or the stage would fit: so this ends, if only with too little left.
            held = max(buffer_bytes(plan, costs, stage, job.costs.tensor_parallel))
            assert held > reserved[stage]
            reserved[stage] = held
