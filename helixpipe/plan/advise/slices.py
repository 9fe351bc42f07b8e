"""Whether slices of sequences pay, and how much of that rests on attention's rate on short ones."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from helixpipe.plan.advise.advice import Advice, Option, iteration_ms
from helixpipe.plan.advise.job import Job
from helixpipe.plan.cost_model import costs_of_plan
from helixpipe.plan.simulation.simulate import simulate


class SliceVerdict(NamedTuple):
    """The best option that slices sequences, beside the best that does not.

    Attributes:
        option: the one with slices.
        full_rate_ms: its iteration if attention lost nothing on short slices.
        rival: the fastest that leaves sequences whole; None if nothing else fits.
    """

    option: Option
    full_rate_ms: float
    rival: Option | None

    @property
    def pays(self) -> bool:
        """True if the slices are faster even with what short ones lose."""
        return self.rival is None or self.option.iteration_ms < self.rival.iteration_ms


def slice_verdict(advice: Advice, job: Job) -> SliceVerdict | None:
    """The verdict on slices; None if no option has any."""
    sliced = next((option for option in advice.options if option.plan and option.plan.slices), None)
    if sliced is None or sliced.plan is None:
        return None
    pieces = job.pieces_for(sliced.candidate.micro_batch_size)
    assert pieces is not None
    levels = sliced.candidate.levels(job.workload.model.num_layers)
    costs = costs_of_plan(replace(pieces, multiprocessors=0), sliced.plan, levels)
    full_rate_ms = iteration_ms(sliced.candidate, simulate(sliced.plan, costs))
    rival = next((o for o in advice.options if o.plan is None or not o.plan.slices), None)
    return SliceVerdict(sliced, full_rate_ms, rival)
