"""An elastic plan in the terminal: its chunks, what is predicted, and what others would take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from helixpipe.elastic.baselines import Baseline
from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.elastic_plan import ElasticPlan, Prediction
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.recipe import Recipe
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.elastic.search.choice import Choice
from helixpipe.report.byte_units import byte_unit
from helixpipe.report.console import table_console

# Piped output has no width of its own; the tables need this much.
_WIDTH = 132
_SHOWN_LENGTHS = 4
# Columns that are not numbers.
_WORDS = ("chunk", "kind", "sequences", "lengths")


def print_elastic_plan(choice: Choice, job: ElasticJob, baselines: Sequence[Baseline]) -> None:
    """Print everything that ``elastic`` found out."""
    console = table_console(_WIDTH)
    plan = choice.plan
    console.print(_chunk_table(plan, job))
    console.print()
    console.print(_stage_table(plan, job))
    console.print()
    console.print(_comparison(choice, baselines))
    for line in _lines(choice, job, baselines):
        console.print(line, soft_wrap=True, markup=False)


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _chunk_table(plan: ElasticPlan, job: ElasticJob) -> Table:
    recipe, layers = plan.recipe, max(job.layers_by_stage)
    sizes = [job.costs.activation_bytes(chunk, layers, is_last=False) for chunk in recipe.chunks]
    unit = byte_unit(max(sizes))
    columns = {
        "": [str(number) for number, members in enumerate(recipe.ranges) for _ in members],
        "chunk": [str(i) for i in range(len(recipe.chunks))],
        "kind": [chunk.kind.value for chunk in recipe.chunks],
        "sequences": list(map(_sequences, recipe.chunks)),
        "lengths": [_lengths(chunk.lengths) for chunk in recipe.chunks],
        "context": [str(chunk.context) for chunk in recipe.chunks],
        "tokens": [str(chunk.tokens) for chunk in recipe.chunks],
        "ms": [f"{_both_ms(chunk, job):.4g}" for chunk in recipe.chunks],
        unit.name: [f"{size / unit.size:.4g}" for size in sizes],
    }
    title = (
        f"{len(recipe.chunks)} chunks. ms: forward and backward of {layers} layers; {unit.name}: kept of "
        "them on each GPU with nothing computed twice"
    )
    if isinstance(recipe, RoundRecipe):
        columns = {"round": columns.pop(""), "slot": _slots(recipe), **columns}
        title += f"; slot s attends to layer l on rank (l + s + 1) mod {plan.plan.num_ranks}"
        title += f", range {recipe.attention_range}"
    else:
        assert isinstance(recipe, Recipe)
        columns = {"pipeline": columns.pop(""), **columns}
        columns["checkpointed"] = [" ".join(map(str, row)) for row in zip(*recipe.checkpointed, strict=True)]
        title += "; checkpointed: layers of each stage"
    left = [name for name in columns if name in ("pipeline", "round", "slot", *_WORDS)]
    table = _table(title, left, [name for name in columns if name not in left])
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _both_ms(chunk: Chunk, job: ElasticJob) -> float:
    """Forward and backward of as many layers as the stage with most has."""
    layers = max(job.layers_by_stage)
    return job.costs.forward_ms(chunk, layers, is_last=False) + job.costs.backward_ms(
        chunk, layers, is_last=False
    )


def _slots(recipe: RoundRecipe) -> list[str]:
    """The slot of each chunk."""
    return [str(slot) for slots in recipe.rounds for slot, size in enumerate(slots) for _ in range(size)]


def _sequences(chunk: Chunk) -> str:
    """The sequence, and how many more."""
    more = len(chunk.pieces) - 1
    return f"{chunk.pieces[0].sequence}" + (f" +{more}" if more else "")


def _lengths(lengths: Sequence[int]) -> str:
    shown = " ".join(str(length) for length in lengths[:_SHOWN_LENGTHS])
    return shown + (" ..." if len(lengths) > _SHOWN_LENGTHS else "")


def _stage_table(plan: ElasticPlan, job: ElasticJob) -> Table:
    unit = byte_unit(job.memory_limit_bytes)
    recipe, prediction = plan.recipe, plan.prediction
    what = "stage" if isinstance(recipe, Recipe) else "rank"
    layers = recipe.stage_layers if isinstance(recipe, Recipe) else ()
    table = _table(
        f"{what.capitalize()}s; the limit is {unit.text(job.memory_limit_bytes)} per GPU",
        (what,),
        (
            *(("layers",) if layers else ()),
            f"peak {unit.name}",
            f"messages {unit.name}",
            f"headroom {unit.name}",
            *(("checkpointed layers",) if isinstance(recipe, Recipe) else ()),
        ),
    )
    for stage, (peak, messages) in enumerate(
        zip(prediction.peak_bytes, prediction.message_bytes, strict=True)
    ):
        cells = [peak, messages, job.memory_limit_bytes - peak - messages]
        row = [
            str(stage),
            *map(str, layers[stage : stage + 1]),
            *(f"{size / unit.size:.4g}" for size in cells),
        ]
        if isinstance(recipe, Recipe):
            counts = recipe.checkpointed[stage]
            row.append(f"{sum(counts)} of {len(counts) * job.layers_by_stage[stage]}")
        table.add_row(*row)
    return table


def _comparison(choice: Choice, baselines: Sequence[Baseline]) -> Table:
    own = choice.plan
    table = _table(
        "Predicted",
        ("",),
        ("chunks", "time", f"{own.plan.schedule} is", "bubble", "recompute", "largest peak"),
    )
    plans = [own, *(found for found in choice.others.values() if isinstance(found, ElasticPlan))]
    rows = [(plan.plan.schedule, len(plan.recipe.chunks), plan.prediction) for plan in plans]
    rows += [(b.label, b.num_chunks, b.prediction) for b in baselines if b.prediction is not None]
    for label, count, prediction in rows:
        table.add_row(label, str(count), *_figures(prediction, own.prediction))
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


def _lines(choice: Choice, job: ElasticJob, baselines: Sequence[Baseline]) -> Iterable[str]:
    yield from (f"{b.label}: does not fit: {b.reason}" for b in baselines if b.prediction is None)
    yield ""
    yield f"Schedule: {choice.reason}"
    recipe, sizes = choice.plan.recipe, choice.plan.recipe.sizes
    what = "pipeline" if isinstance(recipe, Recipe) else "round"
    back_to_back = f"{len(sizes)} {what}s back to back" if len(sizes) > 1 else f"One {what}"
    yield f"{back_to_back} of {' + '.join(map(str, sizes))} chunks."
    if isinstance(recipe, RoundRecipe):
        yield f"Costs: {job.costs.source}. Recomputed in every layer: {recipe.recompute}."
    else:
        seconds = choice.plan.solver_seconds
        yield f"Costs: {job.costs.source}. Checkpointing was solved in {seconds:.2f} s."
