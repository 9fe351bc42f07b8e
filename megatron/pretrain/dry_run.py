"""What a job would do, without doing it: its layout, plan, memory and predicted time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from helixpipe.elastic.search.choice import choose_plan
from helixpipe.plan.advise.job import memory_limit
from helixpipe.plan.cost_model import Hardware, Recompute, costs_of_plan
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.message_buffers import peak_with_buffers
from helixpipe.plan.simulation.simulate import simulate
from megatron.pretrain.data.elastic_batches import first_lengths
from megatron.pretrain.data.elastic_iterators import training_dataset
from megatron.pretrain.settings.job import JobSettings, MemorySettings, ParallelSettings
from megatron.pretrain.settings.schedule_choice import is_predicted, known_machine, pieces_on

_GIB = 2**30


class Prediction(NamedTuple):
    """Of one iteration.

    Attributes:
        machine: on which.
        iteration_ms: from the first operation to the last one of the busiest rank; no optimizer step.
        bubble: share of the ranks' time without compute, 0 to 1.
        peak_bytes: of a GPU on the worst rank, with buffers of messages.
        limit_bytes: what a GPU has for that; None if it is not known.
    """

    machine: str
    iteration_ms: float
    bubble: float
    peak_bytes: int
    limit_bytes: int | None


def describe(settings: JobSettings, hardware: str | None) -> Iterator[str]:
    """The lines of ``--dry-run``.

    Args:
        settings: of the job.
        hardware: on which to predict; if None what the job's ``--hardware`` names, or this GPU.

    Raises:
        ValueError: hardware that is not known, or was not measured for these sizes.
    """
    yield _layout(settings.parallel)
    yield f"batch: {_batch(settings)}; {settings.training.train_iters} iterations"
    plan = settings.schedule.plan
    if settings.schedule.reason:
        yield f"choice: {settings.schedule.reason}"
    if plan is None:
        yield from _first_batch(settings)
        return
    operations = sum(len(order) for order in plan.orders)
    options = ", ".join(f"{name} {value}" for name, value in plan.parameters.items() if name != "num_layers")
    yield (
        f"plan: {plan.schedule}{f' ({options})' if options else ''}, {plan.num_segments} segments on "
        f"{plan.num_ranks} ranks, {operations} operations; valid"
    )
    yield f"recompute: {_recompute(settings.memory)}"
    if not is_predicted(settings.workload):
        yield "prediction: none, for experts that are shared by ranks which share a sequence"
        return
    prediction = predict(settings, plan, hardware)
    if prediction is None:
        yield "prediction: none, as the machine is not known; name it, as in --dry-run h20"
        return
    yield from _predicted(settings, prediction)


def _first_batch(settings: JobSettings) -> Iterator[str]:
    """Of a schedule that plans each batch: the plan of the first, as one replica has it."""
    name, job, training = settings.schedule.name, settings.elastic_job, settings.training
    assert job is not None
    if not settings.data.dataset.prefix:
        yield f"plan: {name}, each batch has its own; with the data at hand, the first one is planned here"
        return
    (own,) = first_lengths(
        training_dataset(settings),
        job.costs,
        count=1,
        size=training.global_batch_size,
        seed=training.seed,
        num_replicas=settings.parallel.data_parallel_size,
    )
    found = choose_plan(own, job).plan
    recipe, prediction = found.recipe, found.prediction
    yield (
        f"plan: {name}, of the first batch: {len(own)} sequences, {sum(own)} tokens, the longest {max(own)}, "
        f"in {len(recipe.chunks)} chunks; chunks of pipelines or rounds that follow one another: "
        f"{', '.join(map(str, recipe.sizes))}; valid"
    )
    yield (
        f"predicted by {training.elastic_costs}: {_duration(prediction.time_ms / 1e3)} for this batch, "
        f"bubble {prediction.bubble:.1%}, recomputation {prediction.recompute:.1%} of the computing"
    )
    yield (
        f"memory: {max(prediction.peak_with_messages) / _GIB:.1f} GiB on the fullest GPU, "
        f"of {job.memory_limit_bytes / _GIB:.1f}"
    )


def predict(settings: JobSettings, plan: Plan, hardware: str | None) -> Prediction | None:
    """What the cost model says of the job's own plan; None if the machine is not known.

    Raises:
        ValueError: see :func:`describe`.
    """
    name = settings.schedule.hardware if hardware is None else hardware
    machine = known_machine(name, settings.model.attention_backend)
    if machine is None:
        return None
    costs = costs_of_plan(pieces_on(machine, name, settings.workload), plan, settings.memory.levels)
    simulation = simulate(plan, costs)
    limit_gib, shared = settings.memory.memory_limit_gib, settings.parallel.tensor_model_parallel_size
    is_known = limit_gib is not None or isinstance(machine, Hardware)
    return Prediction(
        machine.name if isinstance(machine, Hardware) else str(name),
        simulation.iteration_ms,
        simulation.timeline.bubble_ratio,
        max(peak_with_buffers(plan, costs, rank, shared) for rank in range(plan.num_ranks)),
        memory_limit(machine, limit_gib) if is_known else None,
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _layout(parallel: ParallelSettings) -> str:
    shared = f"context {parallel.context_parallel_size} x " if parallel.context_parallel_size > 1 else ""
    return (
        f"layout: {parallel.world_size} GPUs = tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x {shared}data {parallel.data_parallel_size}"
        f"{', sequence parallel' if parallel.sequence_parallel else ''}"
        f"{', distributed optimizer' if parallel.use_distributed_optimizer else ''}"
    )


def _batch(settings: JobSettings) -> str:
    training = settings.training
    if settings.schedule.plan is None:
        most = training.max_seq_length
        return f"{_counted(training.global_batch_size, 'document')} of at most {most} tokens"
    return (
        f"{_counted(training.global_batch_size, 'sequence')} of {training.seq_length} tokens = "
        f"{_counted(training.num_microbatches, 'micro batch', 'es')} of {training.micro_batch_size} x "
        f"{_counted(settings.parallel.data_parallel_size, 'replica')}"
    )


def _counted(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def _recompute(memory: MemorySettings) -> str:
    levels = memory.levels
    each = [levels] if isinstance(levels, Recompute) else levels
    runs: Sequence[tuple[str, int]] = [(level.value, len(list(run))) for level, run in groupby(each)]
    return runs[0][0] if len(runs) == 1 else ", ".join(f"{level} in {count} layers" for level, count in runs)


def _predicted(settings: JobSettings, found: Prediction) -> Iterator[str]:
    seconds, training = found.iteration_ms / 1e3, settings.training
    tokens = training.global_batch_size * training.seq_length
    speed = tokens / seconds / settings.parallel.world_size
    yield (
        f"predicted on {found.machine}: {_duration(seconds)} per iteration, bubble {found.bubble:.1%}, "
        f"{speed:.0f} tokens/s per GPU; {_duration(training.train_iters * seconds)} for all iterations"
    )
    memory = f"memory: {found.peak_bytes / _GIB:.1f} GiB on the fullest GPU"
    if found.limit_bytes is None:
        yield memory
    elif found.peak_bytes <= found.limit_bytes:
        yield f"{memory}, of {found.limit_bytes / _GIB:.1f}"
    else:
        yield (
            f"{memory}: does not fit into {found.limit_bytes / _GIB:.1f}; `helixpipe advise` shows what does"
        )
