"""What a rank holds after every operation of an elastic iteration, and what its plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from elastic_models import ElasticCase, build_elastic, documents, recipe_of, train_once
from kept import LiveKept
from models import VOCABULARY, Case, build_planned, initialize, planned_schedule, run_iteration, sliced_plan

from helixpipe.elastic import Chunk, ChunkCosts, Recipe, costs_of_recipe, predict_chunk_costs
from helixpipe.elastic.chunk_schedule import elastic_plan
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward
from helixpipe.megatron_adapter.segments.slices import pieces_of
from helixpipe.plan import Kind, Operation
from helixpipe.plan.cost_model import HARDWARE, Workload
from helixpipe.plan.cost_model.shape import ModelShape
from helixpipe.plan.simulation.memory import held_bytes
from helixpipe.plan.slice_ends import ends_for
from helixpipe.runtime.message import HEADER_WORDS
from helixpipe.runtime.steps import Backward, Forward
from helixpipe.runtime.trace import HostClock


class Moment(NamedTuple):
    """After an operation."""

    operation: Operation
    held: int


class Measured(NamedTuple):
    """One rank's iteration: after every operation, and the most at any time."""

    moments: list[Moment]
    peak: int


def measure(case: ElasticCase) -> Measured:
    """Run an iteration and note what is held."""
    torch.set_num_threads(1)
    initialize(case.case)
    chunks = build_elastic(case)
    batch = ElasticBatch(recipe_of(case), documents(case))
    return watch(chunks, lambda: train_once(case, chunks, ElasticForwardBackward(clock=HostClock()), batch))


def store_levels(case: ElasticCase) -> list[tuple[str, int]]:
    """Bytes in the store of keys and values as each operation of an iteration begins to compute."""
    initialize(case.case)
    chunks = build_elastic(case)
    batch = ElasticBatch(recipe_of(case), documents(case))
    store = chunks[0].module.contexts
    levels: list[tuple[str, int]] = []
    runs = {kind: kind.__call__ for kind in (Forward, Backward)}

    def noting(kind: Any) -> Any:
        def run(step: Any) -> None:
            held = sum(tensor.numel() * tensor.element_size() for tensor in store.tensors())
            levels.append((str(step.operation), held))
            runs[kind](step)

        return run

    for kind in runs:
        kind.__call__ = noting(kind)
    try:
        train_once(case, chunks, ElasticForwardBackward(clock=HostClock()), batch)
    finally:
        for kind, run in runs.items():
            kind.__call__ = run
    store.assert_empty()
    return levels


def measure_slices(case: Case) -> Measured:
    """The same of a schedule that slices every sequence."""
    torch.set_num_threads(1)
    initialize(case)
    chunks = build_planned(case)
    return watch(chunks, lambda: run_iteration(case, chunks, planned_schedule(case)))


def measure_cases_of_slices(cases: list[Case]) -> list[Measured]:
    """:func:`measure_slices` for several cases of one layout."""
    return [measure_slices(case) for case in cases]


def watch(chunks: list[torch.nn.Module], run_iteration: Callable[[], Any]) -> Measured:
    """Note what is held after every operation of an iteration."""
    contexts = chunks[0].module.contexts
    others = tuple if contexts is None else contexts.tensors
    moments: list[Moment] = []
    runs = {kind: kind.__call__ for kind in (Forward, Backward)}

    def noting(kind: Any) -> Any:
        def run(step: Any) -> None:
            runs[kind](step)
            moments.append(Moment(step.operation, live.bytes()))

        return run

    with LiveKept(chunks[0], others) as live:
        for kind in runs:
            kind.__call__ = noting(kind)
        try:
            run_iteration()
        finally:
            for kind, run in runs.items():
                kind.__call__ = run
    return Measured(moments, live.peak)


def measure_cases(cases: list[ElasticCase]) -> list[Measured]:
    """:func:`measure` for several cases of one layout."""
    return [measure(case) for case in cases]


def costs_of(case: ElasticCase) -> ChunkCosts:
    """What the planner believes of the case's model in fp32, without states and what operations need.

    Added to it is what PyTorch keeps on CPUs beyond what the planner counts: statistics of norms, RMSNorm's
    input twice, the loss mask, and two more halves of an unfused SwiGLU.
    """
    llama = case.case.style == "llama"
    shape = ModelShape(
        name="small",
        num_layers=case.case.num_layers,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2 if llama else 4,
        head_dim=8,
        ffn_hidden_size=80 if llama else 128,
        vocab_size=VOCABULARY,
        gated=llama,
        tied=case.case.is_tied,
    )
    tp = case.case.tp
    workload = Workload(
        model=shape,
        seq_length=tp,
        micro_batch_size=1,
        element_bytes=4,
        tensor_parallel=tp,
        sequence_parallel=case.case.sequence_parallel,
    )
    costs = predict_chunk_costs(workload, HARDWARE["h20"], case.case.pp)
    of_norm = 4 + 4 * 32 if llama else 8
    of_mlp = 2 * 4 * 80 if llama else 0
    of_loss = 4 * tp
    return replace(
        costs,
        token_bytes=costs.token_bytes + 2 * of_norm + of_mlp,
        logits_bytes=costs.logits_bytes + of_norm + of_loss,
        head_workspace_bytes=0.0,
        layer_workspace_bytes=0.0,
        layer_state_bytes=0,
        embedding_state_bytes=0,
        head_state_bytes=0,
        shared_state_bytes=0,
    )


def header_bytes(stage: int) -> int:
    """Of the message that brought a chunk, of which its input is a part; the plan does not count them."""
    return HEADER_WORDS * torch.int64.itemsize if stage else 0


def expect(case: ElasticCase, stage: int, moments: list[Moment]) -> list[int]:
    """What a stage is to hold after each of ``moments``' operations: what the simulator says, and headers."""
    recipe = recipe_of(case)
    plan = elastic_plan(recipe, case.case.num_layers)
    assert plan.orders[stage] == tuple(operation for operation, _ in moments)
    held = held_bytes(plan, costs_of_recipe(recipe, case.case.num_layers, costs_of(case)), stage)
    headers = accumulate(
        header_bytes(stage) if operation.kind is Kind.F else -header_bytes(stage) for operation, _ in moments
    )
    return [level.after + header for level, header in zip(held, headers, strict=True)]


def expect_of_slices(case: Case, stage: int, moments: list[Moment]) -> list[int]:
    """What a stage is to hold after each operation of a schedule that slices every sequence."""
    plan = sliced_plan(case)
    assert tuple(op for op in plan.orders[stage] if op.kind.is_compute) == tuple(op for op, _ in moments)
    pieces = pieces_of(plan, ends_for(plan, case.seq_length, 1))[: case.num_slices]
    layers = case.num_layers // case.pp if case.recompute == "full" else 0
    chunks = tuple(Chunk((piece,)) for piece in pieces)
    recipe = Recipe(chunks, (len(chunks),), ((layers,) * len(chunks),) * case.pp)
    costs = costs_of(ElasticCase(case))
    # The mask belongs to the loss, whose own graph ends with the last slice's forward.
    costs = replace(costs, logits_bytes=costs.logits_bytes - 4 * case.tp)
    of_chunks = costs_of_recipe(recipe, case.num_layers, costs)
    renamed = {name.replace("chunk", "slice"): cost for name, cost in of_chunks.segments.items()}
    held = held_bytes(plan.compute_only(), replace(of_chunks, segments=renamed), stage)
    headers = accumulate(
        header_bytes(stage) if operation.kind is Kind.F else -header_bytes(stage) for operation, _ in moments
    )
    return [level.after + header for level, header in zip(held, headers, strict=True)]
