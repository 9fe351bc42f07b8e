"""Megatron's ``forward_backward_func`` for batches of documents, each carried out by a plan of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_model_config

from helixpipe.elastic.chunk_schedule import SCHEDULE
from helixpipe.elastic.recipe import Recipe
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.layers.elastic.model import ElasticGPTModel
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.forward_step import IterationInput
from helixpipe.megatron_adapter.pipeline_group import agree
from helixpipe.megatron_adapter.planned_iteration import PlannedIterations
from helixpipe.megatron_adapter.segments.chunks import ElasticSegments
from helixpipe.megatron_adapter.segments.rounds import RoundSegments
from helixpipe.megatron_adapter.segments.stages import check_supported
from helixpipe.plan import Plan
from helixpipe.refusals import refuse
from helixpipe.reliability.record import Progress
from helixpipe.runtime.trace import Clock, Trace


class ElasticForwardBackward:
    """A ``forward_backward_func`` with Megatron's signature, whose data iterator gives elastic batches.

    Each call takes one :class:`ElasticBatch` and runs its chunks. The forward step is called with an
    iterator over the one chunk that it shall compute, whose batch holds ``tokens``, ``labels``,
    ``loss_mask`` and ``position_ids``, [1, T] each; on stages that are neither first nor last it gets None.
    The loss is normalised per token over the global batch. The list of what loss functions report, one entry
    per chunk, is returned on the last pipeline rank and is empty on the others; under elastic helix every
    rank returns those of the chunks whose losses are there, in the order of :meth:`Plan.reported_by` for a
    plan without slices. Data-parallel replicas may have different numbers of chunks.

    Args:
        clock: times the trace; chosen by the device if None.
        progress: told of every operation and wait as it begins.

    Attributes:
        plan: the plan of the last iteration; None before the first.
    """

    def __init__(self, *, clock: Clock | None = None, progress: Progress | None = None) -> None:
        self.plan: Plan | None = None
        self._iterations = PlannedIterations(clock, progress)

    @property
    def trace(self) -> Trace:
        """What the last iteration ran on this rank."""
        return self._iterations.trace

    def __str__(self) -> str:
        return SCHEDULE

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Iterator[ElasticBatch] | list[Iterator[ElasticBatch]],
        model: torch.nn.Module | list[torch.nn.Module],
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        force_all_reduce: bool | None = False,
        **sizes: object,
    ) -> list[Any]:
        """Run one iteration; see Megatron's ``get_forward_backward_func`` for the arguments.

        ``sizes`` takes the rest of Megatron's: what a batch's plan says instead.

        Raises:
            ValueError: a batch or an option that this schedule cannot honour, on every rank of a replica.
        """
        given = {name: value is not None for name, value in sizes.items() if name not in _SIZES}
        refuse(given, f"the {SCHEDULE} schedule does not support {{}}")
        (chunk,) = model if isinstance(model, list) else [model]
        (iterator,) = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        config = get_model_config(chunk)
        _check_config(config)
        batch = next(iterator)
        plan = batch.plan(config.num_layers)
        plan = plan.forward_only() if forward_only else plan
        self.plan = plan
        dtype = config.pipeline_dtype or config.params_dtype
        iteration = IterationInput(
            forward_step_func,
            [],
            plan.num_microbatches,
            collect_non_loss_data,
            differentiate=not forward_only,
        )
        segments = _segments(chunk, batch, plan, dtype)
        segments.begin(iteration)
        agree(
            {"plan and tokens": batch.fingerprint[:16], "dtype": str(dtype), "forward only": forward_only},
            parallel_state.get_model_parallel_group(),
        )
        executor = self._iterations.executor(plan, segments, [chunk])
        return self._iterations.run(
            executor, segments, [chunk], forward_only=forward_only, force_all_reduce=force_all_reduce
        )


def _segments(
    chunk: torch.nn.Module, batch: ElasticBatch, plan: Plan, dtype: torch.dtype
) -> ElasticSegments | RoundSegments:
    """The computation of a batch by the model of this rank, which is built for one schedule.

    Raises:
        ValueError: the batch is planned for another one.
    """
    model: Any = chunk
    while not isinstance(model, (ElasticGPTModel, SegmentedGPTModel)) and hasattr(model, "module"):
        model = model.module
    if isinstance(batch.recipe, RoundRecipe) and isinstance(model, SegmentedGPTModel):
        rank = parallel_state.get_pipeline_model_parallel_rank()
        return RoundSegments(chunk, model, batch, plan, rank, dtype)
    if isinstance(batch.recipe, Recipe) and isinstance(model, ElasticGPTModel):
        return ElasticSegments(chunk, batch, plan, dtype)
    needed = "cut at its attention" if isinstance(batch.recipe, RoundRecipe) else "of whole layers"
    raise ValueError(
        f"the batch is planned for {plan.schedule}, which needs a model {needed}, not a "
        f"{type(model).__name__}; plan it for the schedule that the model was built for"
    )


# Megatron's arguments that a batch's plan replaces.
_SIZES = ("num_microbatches", "seq_length", "micro_batch_size", "decoder_seq_length", "first_val_step")


def _check_config(config: TransformerConfig) -> None:
    check_supported(config, SCHEDULE)
    if not config.calculate_per_token_loss:
        raise ValueError(
            "chunks differ in tokens, so the elastic schedule normalises the loss per token over the global "
            "batch; set calculate_per_token_loss (--calculate-per-token-loss)"
        )
