"""What a rank holds after every operation of an elastic iteration, and what its plan says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from elastic_models import ElasticCase, build_elastic, documents, recipe_of, train_once
from kept import LiveKept
from models import VOCABULARY, initialize

from helixpipe.elastic import ChunkCosts, predict_chunk_costs
from helixpipe.elastic.chunk_schedule import stage_cost
from helixpipe.megatron_adapter.elastic import ElasticForwardBackward
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.plan import Kind, Operation
from helixpipe.plan.cost_model import HARDWARE, Workload
from helixpipe.plan.cost_model.model import ModelShape
from helixpipe.runtime.executor import Executor
from helixpipe.runtime.message import HEADER_WORDS
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
    contexts = chunks[0].module.contexts
    moments: list[Moment] = []
    originals = {name: getattr(Executor, name) for name in ("_forward", "_backward")}

    def noting(name: str) -> Any:
        def run(executor: Executor, operation: Operation) -> None:
            originals[name](executor, operation)
            moments.append(Moment(operation, live.bytes()))

        return run

    batch = ElasticBatch(recipe_of(case), documents(case))
    with LiveKept(chunks[0], contexts.tensors) as live:
        for name in originals:
            setattr(Executor, name, noting(name))
        try:
            train_once(case, chunks, ElasticForwardBackward(clock=HostClock()), batch)
        finally:
            for name, original in originals.items():
                setattr(Executor, name, original)
    return Measured(moments, live.peak)


def measure_cases(cases: list[ElasticCase]) -> list[Measured]:
    """:func:`measure` for several cases of one layout."""
    return [measure(case) for case in cases]


def costs_of(case: ElasticCase) -> ChunkCosts:
    """What the planner believes of the case's model in fp32, without states and the head's transients.

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
    workload = Workload(model=shape, seq_length=1, micro_batch_size=1, element_bytes=4)
    costs = predict_chunk_costs(workload, HARDWARE["h20"], case.case.pp)
    of_norm = 4 + workload.unit_bytes if llama else 8
    of_mlp = 2 * 4 * 80 if llama else 0
    of_loss = 4
    return replace(
        costs,
        token_bytes=costs.token_bytes + 2 * of_norm + of_mlp,
        logits_bytes=workload.head_bytes + of_norm + of_loss,
        layer_state_bytes=0,
        embedding_state_bytes=0,
        head_state_bytes=0,
    )


def header_bytes(stage: int) -> int:
    """Of the message that brought a chunk, of which its input is a part; the plan does not count them."""
    return HEADER_WORDS * torch.int64.itemsize if stage else 0


class Expected(NamedTuple):
    """What a plan says is held after an operation.

    Attributes:
        held: that exists by then: gradients of a slice's keys and values from the backward of its sequence's
            last slice on.
        planned: by the planner's rows, which count those gradients from the slice's forward on.
    """

    held: int
    planned: int


def expect(case: ElasticCase, stage: int, moments: list[Moment]) -> list[Expected]:
    """What is to be held on a stage after each of ``moments``' operations."""
    costs, recipe = costs_of(case), recipe_of(case)
    layers = case.case.num_layers // case.case.pp
    is_last = stage == case.case.pp - 1
    last_slices = {group[-1]: group for group in recipe.slices}
    begun: dict[int, int] = {}
    without_gradients: dict[int, int] = {}
    expected = []
    for operation, _ in moments:
        i = operation.micro_batch
        chunk = recipe.chunks[i]
        if operation.kind is Kind.F:
            cost = stage_cost(chunk, costs, layers, recipe.checkpointed[stage][i], is_last=is_last)
            begun[i] = cost.bytes + header_bytes(stage)
            without_gradients[i] = int(layers * costs.kv_bytes * chunk.continued_tokens)
        else:
            del begun[i], without_gradients[i]
            for slice_ in last_slices.get(i, ())[:-1]:
                without_gradients[slice_] = 0
        planned = sum(begun.values())
        expected.append(Expected(planned - sum(without_gradients.values()), planned))
    return expected
