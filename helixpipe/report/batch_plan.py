"""An elastic plan in the terminal: its chunks, what is predicted, and what others would take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from helixpipe.elastic.baselines import Baseline
from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.elastic_plan import ElasticPlan, Prediction
from helixpipe.elastic.job import ElasticJob
from helixpipe.report.byte_units import byte_unit
from helixpipe.report.console import table_console

# Piped output has no width of its own; the tables need this much.
_WIDTH = 132
_SHOWN_LENGTHS = 4


def print_elastic_plan(plan: ElasticPlan, job: ElasticJob, baselines: Sequence[Baseline]) -> None:
    """Print everything that ``elastic`` found out."""
    console = table_console(_WIDTH)
    console.print(_chunk_table(plan, job))
    console.print()
    console.print(_stage_table(plan, job))
    console.print()
    console.print(_comparison(plan, baselines))
    for line in _lines(plan, job, baselines):
        console.print(line, soft_wrap=True, markup=False)


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _chunk_table(plan: ElasticPlan, job: ElasticJob) -> Table:
    recipe = plan.recipe
    layers = job.stage_layers
    sizes = [job.costs.activation_bytes(chunk, layers, is_last=False) for chunk in recipe.chunks]
    unit = byte_unit(max(sizes))
    table = _table(
        f"{len(recipe.chunks)} chunks. ms: forward and backward on a stage of {layers} layers; {unit.name}: "
        "kept there on each GPU with nothing checkpointed; checkpointed: layers of each stage",
        ("pipeline", "chunk", "kind", "sequences", "lengths"),
        ("context", "tokens", "ms", unit.name, "checkpointed"),
    )
    for number, members in enumerate(recipe.ranges):
        for i in members:
            chunk = recipe.chunks[i]
            times = (
                job.costs.forward_ms(chunk, layers, is_last=False),
                job.costs.backward_ms(chunk, layers, is_last=False),
            )
            table.add_row(
                str(number),
                str(i),
                chunk.kind.value,
                _sequences(chunk),
                _lengths(chunk.lengths),
                str(chunk.context),
                str(chunk.tokens),
                f"{sum(times):.4g}",
                f"{sizes[i] / unit.size:.4g}",
                " ".join(str(row[i]) for row in recipe.checkpointed),
            )
    return table


def _sequences(chunk: Chunk) -> str:
    """The sequence, and how many more."""
    more = len(chunk.pieces) - 1
    return f"{chunk.pieces[0].sequence}" + (f" +{more}" if more else "")


def _lengths(lengths: Sequence[int]) -> str:
    shown = " ".join(str(length) for length in lengths[:_SHOWN_LENGTHS])
    return shown + (" ..." if len(lengths) > _SHOWN_LENGTHS else "")


def _stage_table(plan: ElasticPlan, job: ElasticJob) -> Table:
    unit = byte_unit(job.memory_limit_bytes)
    table = _table(
        f"Stages; the limit is {unit.text(job.memory_limit_bytes)} per GPU",
        ("stage",),
        (f"peak {unit.name}", f"messages {unit.name}", f"headroom {unit.name}", "checkpointed layers"),
    )
    prediction = plan.prediction
    for stage, (peak, messages) in enumerate(
        zip(prediction.peak_bytes, prediction.message_bytes, strict=True)
    ):
        row = plan.recipe.checkpointed[stage]
        table.add_row(
            str(stage),
            f"{peak / unit.size:.4g}",
            f"{messages / unit.size:.4g}",
            f"{(job.memory_limit_bytes - peak - messages) / unit.size:.4g}",
            f"{sum(row)} of {len(row) * job.stage_layers}",
        )
    return table


def _comparison(plan: ElasticPlan, baselines: Sequence[Baseline]) -> Table:
    table = _table(
        "Predicted",
        ("",),
        ("chunks", "time", "elastic is", "bubble", "recompute", "largest peak"),
    )
    own = plan.prediction
    rows = [("elastic", len(plan.recipe.chunks), own)]
    rows += [(b.label, b.num_chunks, b.prediction) for b in baselines if b.prediction is not None]
    for label, count, prediction in rows:
        table.add_row(label, str(count), *_figures(prediction, own))
    return table


def _figures(prediction: Prediction, own: Prediction) -> Iterable[str]:
    yield _seconds(prediction.time_ms)
    yield f"{prediction.time_ms / own.time_ms:.2f}x as fast"
    yield f"{prediction.bubble:.1%}"
    yield f"{prediction.recompute:.1%}"
    peak = max(prediction.peak_with_messages)
    yield byte_unit(peak).text(peak)


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def _lines(plan: ElasticPlan, job: ElasticJob, baselines: Sequence[Baseline]) -> Iterable[str]:
    yield from (f"{b.label}: does not fit: {b.reason}" for b in baselines if b.prediction is None)
    yield ""
    pipelines = plan.recipe.pipelines
    listed = " + ".join(str(size) for size in pipelines)
    what = f"{len(pipelines)} pipelines back to back" if len(pipelines) > 1 else "One pipeline"
    yield f"{what} of {listed} chunks."
    yield f"Costs: {job.costs.source}. Checkpointing was solved in {plan.solver_seconds:.2f} s."
