"""An elastic plan: the common plan, the recipe that belongs to it, and what both are predicted to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import add, sub
from typing import Any

from helixpipe.elastic import chunk_schedule, round_schedule
from helixpipe.elastic.chunk_schedule import costs_of_recipe, elastic_plan
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.recipe import BatchRecipe, Recipe
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.elastic.round_schedule import costs_of_rounds, round_plan
from helixpipe.json_input import parse_object
from helixpipe.plan.plan import Plan
from helixpipe.plan.plan_error import PlanError
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.message_buffers import peak_with_buffers
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.stage_layers import layers_of_stages
from helixpipe.plan.validate import validate


@dataclass(frozen=True)
class Prediction:
    """What an iteration is predicted to do.

    Attributes:
        time_ms: from the first forward to the last backward.
        bubble: share of the stages' time in which nothing is computed.
        recompute: share of the stages' computing that repeats forwards.
        peak_bytes: of each stage's GPUs, states included.
        message_bytes: what buffers of messages add to that, see
            :mod:`helixpipe.plan.simulation.message_buffers`.
    """

    time_ms: float
    bubble: float
    recompute: float
    peak_bytes: tuple[int, ...]
    message_bytes: tuple[int, ...]

    @property
    def peak_with_messages(self) -> tuple[int, ...]:
        """Bytes of each stage's GPUs, all told."""
        return tuple(map(add, self.peak_bytes, self.message_bytes))


@dataclass(frozen=True)
class ElasticPlan:
    """Everything an elastic iteration needs.

    Attributes:
        recipe: chunks, and the pipelines or rounds that they are in.
        plan: who computes which chunk when; lowered and valid.
        prediction: of time and memory.
        solver_seconds: that checkpointing took to decide.
    """

    recipe: BatchRecipe
    plan: Plan
    prediction: Prediction
    solver_seconds: float = 0.0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of plan and recipe: ranks compare it before their first message."""
        return hashlib.sha256((self.plan.to_json() + self.recipe.to_json()).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan's own JSON with ``recipe``, ``prediction`` and ``solver_seconds`` in it.

        It reads as a plan, too: ``simulate`` and ``draw`` take the file.
        """
        extra = {
            "recipe": self.recipe.to_dict(),
            "prediction": asdict(self.prediction),
            "solver_seconds": self.solver_seconds,
        }
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in extra.items())
        body = self.plan.to_json().rstrip()
        assert body.endswith("\n}")
        return body[: -len("\n}")] + ",\n" + lines + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> ElasticPlan:
        """Read back what :meth:`to_json` wrote; ``ValueError`` if plan and recipe do not belong together."""
        plan = Plan.from_json(text)
        if plan.schedule not in _RECIPES:
            raise ValueError(f"not an elastic plan: its schedule is {plan.schedule!r}")
        data = parse_object(text, "not an elastic plan")
        recipe = _RECIPES[plan.schedule](data.get("recipe"))
        validate(plan)
        layers = plan.parameters.get("num_layers")
        if not isinstance(layers, int) or plan_of(recipe, layers) != plan.compute_only():
            raise PlanError("the plan's order is not that of its recipe; make it anew with elastic")
        if isinstance(recipe, Recipe):
            for own, row in zip(layers_of_stages(plan), recipe.checkpointed, strict=True):
                if max(row) > len(own):
                    raise PlanError(f"the recipe checkpoints more than the {len(own)} layers of a stage")
        return cls(recipe, plan, _prediction(data.get("prediction")), _number(data.get("solver_seconds")))


_RECIPES: dict[str, Callable[[Any], BatchRecipe]] = {
    chunk_schedule.SCHEDULE: Recipe.from_dict,
    round_schedule.SCHEDULE: RoundRecipe.from_dict,
}


def plan_of(recipe: BatchRecipe, num_layers: int) -> Plan:
    """The compute-only plan of a recipe."""
    if isinstance(recipe, RoundRecipe):
        return round_plan(recipe, num_layers)
    assert isinstance(recipe, Recipe)
    return elastic_plan(recipe, num_layers)


def costs_of(recipe: BatchRecipe, job: ElasticJob) -> Costs:
    """What the operations and messages of a recipe's plan cost."""
    if isinstance(recipe, RoundRecipe):
        return costs_of_rounds(recipe, job.num_layers, job.costs)
    assert isinstance(recipe, Recipe)
    return costs_of_recipe(recipe, job.num_layers, job.costs)


def predict(recipe: BatchRecipe, plan: Plan, job: ElasticJob) -> Prediction:
    """Simulate ``plan``, of ``recipe`` and lowered, with the costs that the recipe's chunks have."""
    costs = costs_of(recipe, job)
    simulation = simulate(plan, costs)
    timeline = simulation.timeline
    recompute_ms = sum(
        costs.segments[plan.cost_name(segment, micro_batch)].recompute
        for segment in range(plan.num_segments)
        for micro_batch in range(plan.num_microbatches)
    )
    peaks = tuple(simulation.peak_bytes)
    with_buffers = [
        peak_with_buffers(plan, costs, rank, job.costs.tensor_parallel) for rank in range(plan.num_ranks)
    ]
    return Prediction(
        timeline.makespan_ms,
        timeline.bubble_ratio,
        recompute_ms / sum(timeline.busy_ms),
        peaks,
        tuple(map(sub, with_buffers, peaks)),
    )


def _prediction(found: Any) -> Prediction:
    sizes = ("peak_bytes", "message_bytes")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in sizes):
        raise ValueError(
            'not an elastic plan: "prediction" needs time_ms, bubble, recompute, peak_bytes and message_bytes'
        )
    return Prediction(
        _number(found.get("time_ms")),
        _number(found.get("bubble")),
        _number(found.get("recompute")),
        *(tuple(int(_number(size)) for size in found[name]) for name in sizes),
    )


def _number(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise ValueError(f"not an elastic plan: expected a number, found {found!r:.40}")
    return found
