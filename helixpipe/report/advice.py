"""Advice in the terminal: the ranked table, what was rejected, the arguments to use."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from helixpipe.plan.advise import Advice, Job, Option, SliceVerdict, slice_verdict
from helixpipe.plan.advise.context_parallel import Exchange
from helixpipe.report.console import table_console

GIB = 2**30
# Piped output has no width of its own; the table needs this much.
_WIDTH = 184


def print_advice(advice: Advice, job: Job) -> None:
    """Print everything that ``advise`` found out."""
    console = table_console(_WIDTH)
    console.print(_table(advice, job))
    for line in _lines(advice, job):
        # Arguments are to be copied: nothing may break or style them.
        console.print(line, soft_wrap=True, markup=False)


def _table(advice: Advice, job: Job) -> Table:
    workload = job.workload
    table = Table(
        title=f"{workload.model.name}, {workload.seq_length} tokens, {job.num_gpus} GPUs = tensor "
        f"{workload.tensor_parallel} x pipeline {job.num_ranks} x data {workload.data_parallel}, "
        f"{job.num_microbatches} micro batches of {workload.micro_batch_size}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("", "schedule", "recompute"):
        table.add_column(name, no_wrap=True)
    for name in ("b", "iteration", "tokens/s/GPU", "MFU", "bubble", "peak GiB", "messages", "headroom"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("runs", no_wrap=True)
    for number, option in enumerate(advice.options, 1):
        style = "bold" if option is advice.best else ""
        table.add_row(*_row(number, option, job), style=style)
    return table


def _row(number: int, option: Option, job: Job) -> Iterable[str]:
    candidate = option.candidate
    yield str(number)
    yield candidate.label
    yield candidate.recompute_label
    yield str(candidate.micro_batch_size)
    yield describe_seconds(option.iteration_ms)
    yield f"{option.tokens_per_second_per_gpu:.0f}"
    yield f"{option.mfu:.1%}" if option.mfu else "?"
    yield f"{option.bubble:.1%}"
    yield f"{option.peak_bytes / GIB:.1f}"
    messages = option.message_bytes
    yield "" if messages is None else f"{messages / GIB:.1f}"
    yield f"{(job.memory_limit_bytes - option.peak_bytes - (messages or 0)) / GIB:.1f}"
    yield f"no: {candidate.why_not_runnable}" if candidate.why_not_runnable else "yes"


def describe_seconds(milliseconds: float) -> str:
    """Milliseconds for people, in seconds from one on."""
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.1f} ms"


def _lines(advice: Advice, job: Job) -> Iterable[str]:
    limit = job.memory_limit_bytes / GIB
    yield ""
    yield (
        f"{advice.num_candidates} candidates; memory limit {limit:.1f} GiB per GPU. b: sequences in a micro "
        "batch. messages: what buffers of messages add to the peak, in GiB, of the fastest."
    )
    if advice.rejections:
        yield "Rejected:"
        yield from (f"  {r.candidate.label}: {r.reason}" for r in advice.rejections)
    yield ""
    if not advice.options:
        yield "Nothing fits. Use more ranks, a larger tensor-parallel size or shorter sequences."
        return
    yield from _verdict(advice)
    yield from _on_slices(slice_verdict(advice, job))
    if advice.best is None:
        yield "None of these can be executed by pretrain_gpt.py."
        return
    yield f"Fastest that runs: {advice.best.candidate.label}. Use:"
    yield "  " + " ".join(advice.best.candidate.arguments(job))


def _on_slices(found: SliceVerdict | None) -> Iterable[str]:
    """Whether slices pay, with and without what attention is taken to lose on short ones."""
    if found is None:
        return
    option, rival = found.option, found.rival
    with_losses, without = describe_seconds(option.iteration_ms), describe_seconds(found.full_rate_ms)
    yield (
        f"Slices ({option.candidate.label}): {with_losses} with what attention loses on short ones (idle "
        f"multiprocessors, time of a call), {without} without."
    )
    if rival is None:
        yield "No schedule of whole sequences fits."
    elif found.pays:
        ratio = rival.iteration_ms / option.iteration_ms
        yield f"Slices pay: {ratio:.2f}x as fast as whole sequences with {rival.candidate.label}."
    else:
        ratio = option.iteration_ms / rival.iteration_ms
        yield f"Slices do not pay: {rival.candidate.label}, with whole sequences, is {ratio:.2f}x as fast."


def _verdict(advice: Advice) -> Iterable[str]:
    """What wins, and whether a pipeline is the right choice at all."""
    names = {exchange.value for exchange in Exchange}
    pipelines = [option for option in advice.options if option.candidate.schedule not in names]
    others = [option for option in advice.options if option.candidate.schedule in names]
    if not pipelines or not others:
        return
    ratio = pipelines[0].iteration_ms / others[0].iteration_ms
    if ratio > 1:
        yield (
            f"Context parallelism ({others[0].candidate.label}) over the same GPUs is predicted to be "
            f"{ratio:.2f}x as fast as the best pipeline, {pipelines[0].candidate.label}."
        )
    else:
        yield (
            f"The best pipeline, {pipelines[0].candidate.label}, is predicted to be {1 / ratio:.2f}x as fast "
            f"as context parallelism ({others[0].candidate.label}) over the same GPUs."
        )
