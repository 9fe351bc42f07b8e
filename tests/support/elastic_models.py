"""Elastic models, batches of documents and their unsliced reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from models import (
    VOCABULARY,
    Case,
    _model_arguments,
    _wrap,
    build_optimizer,
    build_reference,
    gather_gradients,
    initialize,
    make_config,
)
from pretend import pretend_rank

from helixpipe.elastic import Recipe, ideal_costs
from helixpipe.elastic.chunk_schedule import order_chunks, sequence_groups
from helixpipe.elastic.recipe import BatchRecipe
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.elastic.round_schedule import owned_segments
from helixpipe.elastic.search.rounds import make_rounds
from helixpipe.elastic.search.sequence_processor import equal_time_mesh, make_chunks
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.model import build_elastic_gpt
from helixpipe.layers.initialization import canonical_parameters, deferred_initialization
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.spec import LOCAL
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward
from helixpipe.plan import Kind, Plan
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.stage_layers import stage_counts
from helixpipe.runtime.trace import HostClock

COSTS = ideal_costs(balanced_length=256.0)
MIXED = (300, 1, 4096, 77, 2048, 33, 1500, 2, 640, 129, 1000)
SMALL = (5, 160, 1, 33, 97, 2, 64, 17, 130)


@dataclass(frozen=True)
class ElasticCase:
    """A model and layout, the lengths of a batch and how it is run.

    Attributes:
        case: layout and model; with data parallelism, replicas get ``lengths`` rotated by their number, the
            first also loses the last one.
        lengths: tokens of the documents.
        num_slices: K.
        checkpointed: layers per stage and chunk that are recomputed; None: different everywhere.
        pipelines: how many run back to back.
        rounds: of elastic helix, instead of pipelines; None for 1F1B.
        fold: chunks of a slot of a round.
        recompute: level under elastic helix.
        attention_range: of elastic helix.
    """

    case: Case
    lengths: tuple[int, ...] = SMALL
    num_slices: int = 4
    checkpointed: int | None = 0
    pipelines: int = 1
    rounds: int | None = None
    fold: int = 2
    recompute: str = "none"
    attention_range: str = "core"

    def __str__(self) -> str:
        words = [f"K{self.num_slices}", f"ckpt{self.checkpointed}", f"max{max(self.lengths)}"]
        if self.rounds is not None:
            words[:2] = [f"rounds{self.rounds}", f"fold{self.fold}", self.recompute, self.attention_range]
        words += [f"pipelines{self.pipelines}"] * (self.pipelines > 1)
        return "-".join([str(self.case), *words])

    def lengths_of(self, replica: int) -> tuple[int, ...]:
        turned = self.lengths[replica:] + self.lengths[:replica]
        return turned[: len(turned) - 1] if replica == 0 and self.case.dp > 1 else turned


def elastic(pp: int, **values: Any) -> ElasticCase:
    """A case by all its values; those of the model's case by their names, too."""
    own = {name: values.pop(name) for name in list(values) if name in ElasticCase.__dataclass_fields__}
    lengths = own.get("lengths", SMALL)
    values = {"seq_length": max(lengths), "schedule": "elastic", "per_token_loss": True, **values}
    return ElasticCase(Case(pp=pp, **values), **own)


def recipe_of(case: ElasticCase, replica: int = 0) -> Recipe | RoundRecipe:
    """The chunks of a batch, with as many checkpointed layers as the case asks for."""
    lengths = case.lengths_of(replica)
    if case.rounds is not None:
        model = case.recompute, case.attention_range
        return make_rounds(lengths, COSTS, case.case.pp, case.rounds, case.fold, *model)
    mesh = equal_time_mesh(max(lengths), case.num_slices, COSTS)
    chunks = order_chunks(make_chunks(lengths, mesh, COSTS, max(lengths)), COSTS)
    layers = stage_counts(case.case.stage_layers, case.case.num_layers, case.case.pp)
    counts = tuple(
        tuple(
            (stage + 2 * i) % (own + 1) if case.checkpointed is None else case.checkpointed
            for i in range(len(chunks))
        )
        for stage, own in enumerate(layers)
    )
    pipelines = _pipelines(sequence_groups(chunks), case.pipelines)
    return Recipe(chunks, pipelines, counts, case.case.stage_layers)


def _pipelines(groups: Sequence[int], count: int) -> tuple[int, ...]:
    """Groups shared out over ``count`` pipelines in order."""
    bounds = [len(groups) * i // count for i in range(count + 1)]
    return tuple(sum(groups[a:b]) for a, b in pairwise(bounds))


def documents(case: ElasticCase, replica: int = 0, seed: int = 5) -> list[torch.Tensor]:
    """Token ids of every sequence, one more than its length; each from a random stream of its own."""
    return [
        torch.randint(VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(100 * seed + length))
        for length in case.lengths_of(replica)
    ]


def build_elastic(case: ElasticCase) -> list[torch.nn.Module]:
    """This rank's stage, wrapped for training."""
    config = make_config(case.case)
    if case.rounds is not None:
        saving = replace(case.case.saving, recompute=Recompute(case.recompute))
        rank, p = parallel_state.get_pipeline_model_parallel_rank(), case.case.pp
        owned = owned_segments(case.case.num_layers, p, rank, case.attention_range)
        with deferred_initialization(config):
            segmented = SegmentedGPTModel(
                config,
                LOCAL,
                owned,
                attention_range=case.attention_range,
                lends_head=True,
                saving=saving,
                contexts=ContextStore(),
                **_model_arguments(case.case),
            )
        return _wrap(case.case, config, [segmented])
    with deferred_initialization(config):
        model = build_elastic_gpt(
            config,
            LOCAL,
            case.case.saving,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **_model_arguments(case.case),
        )
    return _wrap(case.case, config, [model])


def loss_of_tokens(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    """Megatron's form for losses per token; reports every token's."""
    total, count = (losses * mask).sum(), mask.sum()
    report = {"lm loss": torch.stack([total.detach(), count]), "tokens": losses.detach()[0].clone()}
    return total, count.int(), report


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: Any) -> Any:
    """A forward step as in pretrain_gpt."""
    if data_iterator is None:
        return model(None, None, None, labels=None), partial(loss_of_tokens, None)
    data = next(data_iterator)
    output = model(data["tokens"], data["position_ids"], None, labels=data["labels"])
    return output, partial(loss_of_tokens, data["loss_mask"])


def train_once(
    case: ElasticCase,
    chunks: list[torch.nn.Module],
    schedule: ElasticForwardBackward,
    batch: ElasticBatch,
    *,
    forward_only: bool = False,
) -> list[Any]:
    """One iteration; what the loss function reported, where it is known."""
    if not forward_only:
        for chunk in chunks:
            chunk.zero_grad_buffer()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iter([batch]),
        model=chunks,
        num_microbatches=1,
        seq_length=case.case.seq_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def losses_by_sequence(
    recipe: BatchRecipe, reports: list[Any], chunks: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Every token's loss, sequence by sequence, from a report for each of ``chunks``, or of all in order."""
    losses: dict[int, list[torch.Tensor]] = {}
    by_chunk = dict(zip(range(len(recipe.chunks)) if chunks is None else chunks, reports, strict=True))
    for i, chunk in enumerate(recipe.chunks):
        report = by_chunk[i]
        parts = report["tokens"][: chunk.tokens].split(list(chunk.lengths))
        for piece, part in zip(chunk.pieces, parts, strict=True):
            losses.setdefault(piece.sequence, []).append(part)
    return [torch.cat(losses[sequence]) for sequence in range(len(losses))]


def run_case(
    case: ElasticCase, change: Callable[[ElasticBatch], ElasticBatch] | None = None
) -> dict[str, Any]:
    """One iteration on this rank: losses by sequence (on the last stage) and all gradients (on rank 0)."""
    initialize(case.case)
    replica = parallel_state.get_data_parallel_rank()
    chunks = build_elastic(case)
    schedule = ElasticForwardBackward(clock=HostClock())
    recipe = recipe_of(case, replica)
    batch = ElasticBatch(recipe, documents(case, replica))
    batch = batch if change is None else change(batch)
    reports = train_once(case, chunks, schedule, batch)
    assert schedule.plan is not None
    numbers = None
    if case.rounds is not None:
        numbers, reports = _everywhere(schedule.plan, reports)
    gradients = gather_shards(chunks, gather_gradients(chunks))
    rank = parallel_state.get_pipeline_model_parallel_rank()
    is_first = torch.distributed.get_rank() == 0
    # Arrays, because tensors would be shared with ranks that are about to end.
    return {
        "case": str(case),
        "replica": replica,
        "losses": [loss.numpy() for loss in losses_by_sequence(recipe, reports, numbers)]
        if reports
        else None,
        "gradients": {name: gradient.numpy() for name, gradient in gradients.items()} if is_first else None,
        "trace_is_plan": tuple(schedule.trace.operations) == schedule.plan.orders[rank],
    }


def _everywhere(plan: Plan, reports: list[Any]) -> tuple[list[int], list[Any]]:
    """Chunks whose losses are on any rank, and what was reported of each."""
    rank, last = parallel_state.get_pipeline_model_parallel_rank(), plan.num_segments - 1
    own = [op.micro_batch for op in plan.orders[rank] if op.segment == last and op.kind is Kind.F]
    everyone: list[Any] = [None] * plan.num_ranks
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_gather_object(everyone, list(zip(own, reports, strict=True)), group=group)
    found = [entry for entries in everyone for entry in entries]
    return [number for number, _ in found], [report for _, report in found]


def gather_shards(
    chunks: list[torch.nn.Module], gradients: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole gradients from those of the tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return gradients
    splits = {
        _kind(name): (parameter.partition_dim, parameter.partition_stride)
        for name, parameter in canonical_parameters(chunks[0].module)
        if getattr(parameter, "tensor_model_parallel", False)
    }
    stages: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_gather_object(stages, splits, group=pipeline)
    splits = {name: split for stage in stages for name, split in stage.items()}
    everyone: list[Any] = [None] * size
    torch.distributed.all_gather_object(everyone, gradients, group=group)
    whole = {}
    for name, gradient in gradients.items():
        dim, stride = splits.get(_kind(name), (None, 1))
        if dim is None:
            whole[name] = gradient
            continue
        blocks = [shares[name].chunk(stride, dim) for shares in everyone]
        whole[name] = torch.cat([part for block in zip(*blocks, strict=True) for part in block], dim)
    return whole


def _kind(name: str) -> str:
    """What all layers' parameters of one kind are called."""
    return re.sub(r"layers\.\d+\.", "", name)


def train(case: ElasticCase, steps: int) -> list[tuple[float, float]]:
    """Mean loss over all ranks and gradient norm of training steps, each with its own batch and plan."""
    torch.set_num_threads(1)
    initialize(case.case)
    replica = parallel_state.get_data_parallel_rank()
    chunks = build_elastic(case)
    optimizer = build_optimizer(case.case, chunks)
    schedule = ElasticForwardBackward(clock=HostClock())
    history = []
    for step in range(steps):
        this = replace(case, num_slices=1 + step % case.num_slices)
        batch = ElasticBatch(recipe_of(this, replica), documents(case, replica, seed=step))
        optimizer.zero_grad()
        reports = train_once(case, chunks, schedule, batch)
        is_counted = parallel_state.get_tensor_model_parallel_rank() == 0
        total = sum((r["lm loss"] for r in reports if is_counted), torch.zeros(2)).double()
        torch.distributed.all_reduce(total)
        _, norm, _ = optimizer.step()
        history.append((float(total[0] / total[1]), float(norm)))
    return history


def train_reference(case: ElasticCase, steps: int) -> list[tuple[float, float]]:
    """The same on one rank, with whole sequences under Megatron's function."""
    torch.set_num_threads(1)
    single = _single(case)
    initialize(single)
    chunks = build_reference(single)
    optimizer = build_optimizer(single, chunks)
    history = []
    for step in range(steps):
        everything = [d for replica in range(case.case.dp) for d in documents(case, replica, seed=step)]
        optimizer.zero_grad()
        reports = _run_whole(chunks, everything)
        total = sum((r["lm loss"] for r in reports), torch.zeros(2))
        _, norm, _ = optimizer.step()
        history.append((float(total[0] / total[1]), float(norm)))
    return history


def run_cases(cases: list[ElasticCase]) -> list[dict[str, Any]]:
    """:func:`run_case` for several cases of one layout."""
    torch.set_num_threads(1)
    return [run_case(case) for case in cases]


def reference(
    case: ElasticCase, *, stock_attention: bool = False, masks: Sequence[torch.Tensor] | None = None
) -> tuple[list[list[torch.Tensor]], dict[str, torch.Tensor]]:
    """Token losses by replica and sequence, and gradients, of whole sequences one after the other.

    By Megatron's function without pipelining, on one rank, with its GPTModel; with ``stock_attention`` also
    with its own core attention, which holds all scores. ``masks``: of all sequences, where there is loss.
    """
    single = _single(case)
    everything = [document for replica in range(case.case.dp) for document in documents(case, replica)]
    with pretend_rank(single):
        chunks = _stock_model(single) if stock_attention else build_reference(single)
        reports = _run_whole(chunks, everything, masks)
        gradients = gather_gradients(chunks)
    losses = iter([report["tokens"] for report in reports])
    return [[next(losses) for _ in case.lengths_of(r)] for r in range(case.case.dp)], gradients


def _single(case: ElasticCase) -> Case:
    return replace(
        case.case, pp=1, tp=1, dp=1, sequence_parallel=False, overlap=False, distributed_optimizer=False
    )


def _run_whole(
    chunks: list[torch.nn.Module],
    sequences: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor] | None = None,
) -> list[Any]:
    for chunk in chunks:
        chunk.zero_grad_buffer()
    return forward_backward_no_pipelining(
        forward_step_func=_whole_sequence_step,
        data_iterator=zip(sequences, masks or [None] * len(sequences), strict=True),
        model=chunks,
        num_microbatches=len(sequences),
        seq_length=max(map(len, sequences)) - 1,
        micro_batch_size=1,
    )


def _whole_sequence_step(data_iterator: Iterator[Any], model: Any) -> Any:
    document, mask = next(data_iterator)
    document = document[None]
    positions = torch.arange(document.shape[1] - 1)[None]
    output = model(document[:, :-1], positions, None, labels=document[:, 1:])
    ones = torch.ones(1, document.shape[1] - 1)
    return output, partial(loss_of_tokens, ones if mask is None else mask.float()[None])


def _stock_model(case: Case) -> list[torch.nn.Module]:
    """Megatron's GPTModel with nothing of ours."""
    from megatron.core.models.gpt import GPTModel

    config = make_config(case)
    with deferred_initialization(config):
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
        model = GPTModel(config, spec, **_model_arguments(case))
    return _wrap(case, config, [model])
