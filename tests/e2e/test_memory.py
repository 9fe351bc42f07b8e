"""Memory that runs out, or nearly: one line that says where, how much and what to change."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from job_settings import job_settings
from jobs import MODEL, free_port, run

from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.plan import Kind, Operation, ScheduleRequest, build_plan
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.execution import Execution
from helixpipe.runtime.out_of_memory import OutOfMemory, amount_asked, describe, naming_operation
from helixpipe.runtime.trace import NullClock, Trace
from megatron.pretrain.health.memory_report import explains_out_of_memory, what_to_change
from megatron.pretrain.settings.schedule import ScheduleSettings

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 139.80 GiB of which "
    "3.10 GiB is free. Process 7 has 136.70 GiB memory in use."
)
# Attention fails in its sixth call of the second iteration, forward or backward, after one in its trial.
SABOTAGE = f"""
import warnings, sys, runpy, torch
warnings.filterwarnings("ignore", module="megatron.core")
from helixpipe.layers.attention.aten import AtenCpu
original, calls = getattr(AtenCpu, sys.argv[1]), []
def fails(*arguments, **options):
    calls.append(1)
    if len(calls) == 1 + 16 + 6:
        raise torch.OutOfMemoryError({CUDA_SAYS!r})
    return original(*arguments, **options)
setattr(AtenCpu, sys.argv.pop(1), fails)
runpy.run_path("pretrain_gpt.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "call", "operation"),
    [
        ("helix", "forward", "5F1, the forward of segment 5 (attention), micro batch 1"),
        ("1f1b", "backward", "0B1, the backward of segment 0 (stage0), micro batch 1"),
    ],
)
def test_a_job_warns_close_to_the_limit_and_ends_with_one_line(corpus, schedule, call, operation):
    """The plan's estimate is the model's 20 bytes per parameter and its activations."""
    arguments = [*MODEL, "--data-path", str(corpus), "--pipeline-schedule", schedule]
    command = [sys.executable, "-c", SABOTAGE, call, *arguments, "--micro-batch-size", "2"]
    command += ["--global-batch-size", "8", "--memory-limit-gib", "0.01"]
    finished = run(command, 60, MASTER_PORT=str(free_port()))
    assert finished.code == 7, finished.errors
    warning, line = finished.errors.splitlines()
    assert warning.startswith("pretrain_gpt: rank 0: warning: ")
    assert "of 0.01 GiB were in use; the plan's estimate is 0.01 GiB; to need less: --mlp-chunk" in warning
    start = (
        f"pretrain_gpt: rank 0: error: out of memory on pipeline rank 0, {operation}: asked for 20.50 GiB; "
    )
    assert line.startswith(f"{start}to need less: --mlp-chunk-size auto, or --loss-chunk-size auto, or ")
    assert ("--num-fold 1" in line) == (schedule == "helix")
    assert ("--recompute-without-attention" in line) == (schedule == "1f1b")
    assert line.endswith("or --micro-batch-size 1, or more tensor- or pipeline-parallel ranks")


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (torch.OutOfMemoryError(CUDA_SAYS), "20.50 GiB"),
        (torch.OutOfMemoryError("something new"), "an unknown amount"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
            "99 bytes",
        ),
        (RuntimeError("a shape is wrong"), None),
    ],
)
def test_what_allocators_say(error, amount):
    assert amount_asked(error) == amount


def test_a_cpus_allocator_is_understood():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    assert amount_asked(failed.value) == f"{2**62} bytes"


def test_operations_are_named_and_other_errors_left_alone():
    plan = build_plan("helix", ScheduleRequest(num_layers=2, num_ranks=1, num_microbatches=2))
    trace = Trace(NullClock())
    trace.start()
    with pytest.raises(OutOfMemory, match=r"pipeline rank 3, between two operations: asked for 20\.50 GiB"):  # noqa: SIM117
        with naming_operation(plan, 3, trace):
            raise torch.OutOfMemoryError(CUDA_SAYS)
    operation = Operation(4, Kind.B, 1)
    assert describe(operation, plan) == "4B1, the backward of segment 4 (last), micro batch 1"
    trace.begin(operation)
    with pytest.raises(OutOfMemory, match="rank 3, 4B1, the backward"):  # noqa: SIM117
        with naming_operation(plan, 3, trace):
            raise torch.OutOfMemoryError(CUDA_SAYS)
    trace.end()
    with pytest.raises(RuntimeError, match=r"^a shape is wrong$"):  # noqa: SIM117
        with naming_operation(plan, 3, trace):
            raise RuntimeError("a shape is wrong")


def test_outside_of_the_schedule_it_is_weights_and_states():
    @explains_out_of_memory
    def run(settings):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    with pytest.raises(OutOfMemory, match=r"outside of forward .* 20.50 GiB; .*--use-distributed-optimizer"):
        run(job_settings())


SIZES = {"num_layers": 2, "num_ranks": 2, "num_microbatches": 4}


def helix(**options):
    plan = build_plan("helix", ScheduleRequest(**SIZES, **options))
    return ScheduleSettings("helix", Execution.SEGMENTS, plan)


ONE_F_ONE_B = ScheduleSettings("1f1b", Execution.MEGATRON, build_plan("1f1b", ScheduleRequest(**SIZES)))
ELASTIC = ScheduleSettings("elastic", Execution.CHUNKS, None)


@pytest.mark.parametrize(
    ("changes", "advised", "not_advised"),
    [
        ({}, ["--mlp-chunk-size auto", "--loss-chunk-size auto", "--num-fold 1"], ["--micro-batch-size"]),
        (
            {"memory_saving": MemorySaving(Recompute.WITHOUT_ATTENTION, 64, 1)},
            ["--mlp-chunk-size 32"],
            ["--loss-chunk-size"],
        ),
        (
            {"memory_saving": MemorySaving(Recompute.WITHOUT_ATTENTION)},
            ["--attention-range block"],
            ["--recompute"],
        ),
        ({"schedule": helix(attention_range="block")}, ["--recompute-levels without-attention"], ["block"]),
        ({"schedule": helix(attention_range="qkv")}, ["--attention-range block"], []),
        ({"transformer_impl": "transformer_engine"}, ["--loss-chunk-size auto"], ["--mlp-chunk-size"]),
        (
            {"schedule": helix(head_placement="spread")},
            ["--mlp-chunk-size auto", "--loss-chunk-size auto"],
            [],
        ),
        ({"schedule": ELASTIC}, ["a lower --memory-limit-gib"], ["--recompute", "--num-fold"]),
        ({"schedule": helix(num_fold=1)}, [], ["--num-fold"]),
        ({"micro_batch_size": 4}, ["--micro-batch-size 1"], []),
        (
            {"schedule": ONE_F_ONE_B, "memory_saving": MemorySaving(Recompute.WITHOUT_ATTENTION)},
            ["--recompute-granularity full", "--recompute-levels none"],
            ["--num-fold", "--attention-range"],
        ),
        ({"schedule": ONE_F_ONE_B, "recompute_granularity": "full"}, ["ranks"], ["--recompute"]),
    ],
    ids=str,
)
def test_only_what_is_not_done_yet_is_advised(monkeypatch, changes, advised, not_advised):
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = job_settings()
    usual = {"schedule": helix(), "memory_saving": MemorySaving()} | changes
    schedule = usual.pop("schedule")
    parts = {
        name: replace(part, **{key: usual[key] for key in usual if hasattr(part, key)})
        for name, part in ((name, getattr(settings, name)) for name in ("memory", "model", "training"))
    }
    text = what_to_change(replace(settings, schedule=schedule, **parts))
    for option in advised:
        assert option in text
    for option in not_advised:
        assert option not in text
