"""Schedules of stages: which are executed how, what they refuse, and where their data comes from."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import Case
from pretend import pretend_rank
from stages import gpt_stage

from helixpipe.data.prefix import DatasetInfo
from helixpipe.megatron_adapter.forward_backward import (
    PlannedForwardBackward,
    SegmentForwardBackward,
    StageForwardBackward,
)
from helixpipe.megatron_adapter.forward_step import IterationInput
from helixpipe.megatron_adapter.plan_source import PlanOnDemand
from helixpipe.megatron_adapter.schedule import (
    MegatronForwardBackward,
    chunk_iterators,
    make_forward_backward,
)
from helixpipe.megatron_adapter.segments.stages import StageSegments
from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.execution import Execution
from helixpipe.plan.fit import stages_follow_ranks
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.runtime.trace import HostClock, NullClock
from helixpipe.runtime.weight_gradients import DeferredWeightGradients
from megatron.pretrain.settings.arguments import parse_arguments

LENGTH = 8


def request_for(name, ranks=2):
    virtual_stages = 2 if name == "interleaved" else None
    return ScheduleRequest(num_layers=8, num_ranks=ranks, num_microbatches=4, virtual_stages=virtual_stages)


def made(name):
    return make_forward_backward(SCHEDULES[name].execution, build_plan(name, request_for(name)), NullClock())


CLASSES = {
    Execution.MEGATRON: MegatronForwardBackward,
    Execution.STAGES: StageForwardBackward,
    Execution.SEGMENTS: SegmentForwardBackward,
}
EXECUTED = [name for name, entry in SCHEDULES.items() if entry.execution in CLASSES]


@pytest.mark.parametrize("name", EXECUTED)
def test_every_executable_schedule_is_made_in_its_way(name):
    forward_backward, entry = made(name), SCHEDULES[name]
    assert isinstance(forward_backward, CLASSES[entry.execution])
    assert forward_backward.plan == build_plan(name, request_for(name))
    assert forward_backward.trace.sees_waits == (entry.execution is not Execution.MEGATRON)
    if entry.execution is not Execution.MEGATRON:
        assert forward_backward.name == name
        assert forward_backward.chunks_per_rank == (2 if entry.needs_untied_weights else 1)


@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_an_entry_needs_is_what_its_plans_need(name, ranks):
    """Both ends of a model on one rank as two chunks cannot share a weight."""
    entry = SCHEDULES[name]
    request = replace(request_for(name, ranks), num_microbatches=8)
    follows = stages_follow_ranks(build_plan(name, request))
    assert (entry.execution is Execution.STAGES and not follows) == entry.needs_untied_weights


def chunk(*, pre_process=False, post_process=False):
    return SimpleNamespace(pre_process=pre_process, post_process=post_process)


def test_both_ends_of_the_model_on_one_rank_read_the_same_data_at_their_own_pace():
    data = iter(range(5))
    first, last = chunk_iterators(data, [chunk(pre_process=True), chunk(post_process=True)])
    assert [next(first), next(first), next(last), next(first), next(last)] == [0, 1, 0, 2, 1]
    # The next iteration goes on behind what the first stage has read, if each stage has read all of this one.
    assert next(last) == 2
    first, last = chunk_iterators(data, [chunk(pre_process=True), chunk(post_process=True)])
    assert (next(first), next(last)) == (3, 3)


def test_a_chunk_between_the_ends_gets_no_data():
    data = iter(range(2))
    end, between = chunk_iterators(data, [chunk(pre_process=True), chunk()])
    assert between is None
    assert next(end) == 0
    assert chunk_iterators(None, [chunk(), chunk()]) == [None, None]
    assert chunk_iterators(data, [chunk()]) is data


@pytest.mark.parametrize(
    ("schedule", "chunks", "words"),
    [
        ("zb-h1", [None, None], "the zb-h1 schedule takes one model chunk per rank, not 2"),
        ("zb-v", [None], "the zb-v schedule takes 2 model chunks per rank, not 1"),
    ],
)
def test_model_chunks_are_counted(schedule, chunks, words):
    forward_backward = made(schedule)
    with pytest.raises(ValueError, match=words):
        forward_backward(
            forward_step_func=None,
            data_iterator=None,
            model=chunks,
            num_microbatches=4,
            seq_length=LENGTH,
            micro_batch_size=1,
        )


def test_a_schedule_without_segments_of_its_own_is_abstract():
    with pytest.raises(NotImplementedError):
        PlannedForwardBackward(PlanOnDemand("gpipe"), clock=HostClock()).make_segments(
            [], None, None, None, 0
        )


REFUSED = {
    "moe_latent_size": (8, "latent experts"),
    "multi_latent_attention": (True, "multi-latent attention"),
    "mtp_num_layers": (1, "multi-token prediction"),
    "virtual_pipeline_model_parallel_size": (2, "virtual pipeline stages"),
    "num_microbatches_with_partial_activation_checkpoints": (1, "recomputation of some micro batches only"),
    "variable_seq_lengths": (True, "variable sequence lengths"),
    "fp8": ("e4m3", "fp8 or fp4"),
    "cpu_offloading": (True, "CPU offloading"),
    "cuda_graph_impl": ("local", "CUDA graphs"),
}


def segments_of(model, seq_length=LENGTH):
    plan = build_plan("zb-h1", ScheduleRequest(num_layers=4, num_ranks=1, num_microbatches=2))
    return StageSegments([model], plan, 0, seq_length, 1, torch.float32, DeferredWeightGradients())


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_would_be_ignored_are_refused(option):
    value, words = REFUSED[option]
    with pretend_rank(Case(pp=1)):
        model = gpt_stage(Case(pp=1))
        setattr(model.config, option, value)
        with pytest.raises(ValueError, match=f"the zb-h1 schedule does not support {words}"):
            segments_of(model)


def test_a_stage_hands_on_its_share_of_the_sequence():
    with pretend_rank(Case(pp=1, tp=2)):
        model = gpt_stage(Case(pp=1, tp=2))
        assert segments_of(model).layout(0, 0).shapes == (torch.Size((LENGTH, 1, 32)),)
        model.config.sequence_parallel = True
        assert segments_of(model).layout(0, 0).shapes == (torch.Size((LENGTH // 2, 1, 32)),)


def test_the_forward_step_gets_the_model_itself_and_its_output():
    """Unlike under helix it may compute with the output: nothing stands in for the model."""
    case = Case(pp=1, seq_length=LENGTH)
    seen = []

    def step(data_iterator, model):
        seen.append((next(data_iterator), model))
        tokens = torch.zeros(1, LENGTH, dtype=torch.long)
        output = model(tokens, torch.arange(LENGTH)[None], None, labels=tokens)
        return 2 * output, lambda output: (output.mean(), {"lm loss": output.detach().mean()})

    with pretend_rank(case):
        model = gpt_stage(case)
        model.config.grad_scale_func = lambda loss: 8 * loss
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.2)
        segments = segments_of(model)
        for differentiate, factor in ((True, 8), (False, 1)):
            segments.begin(IterationInput(step, [iter("ab")], 2, False, differentiate))
            losses = [segments.forward(0, i, ())[0] for i in range(2)]
            assert [data for data, _ in seen[-2:]] == ["a", "b"]
            assert all(found is model for _, found in seen)
            for loss, entry in zip(losses, segments.result.loss_data, strict=True):
                # Megatron divides the loss by the number of micro batches, not what is reported.
                assert loss.item() == pytest.approx(factor * entry["lm loss"].item() / 2)


COMMAND = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused --pipeline-model-parallel-size 2"
)
DATASET = DatasetInfo("unused", 300, 0, 100, 10_000, 500)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--pipeline-schedule zb-v", "zb-v .* add --untie-embeddings-and-output-weights"),
        ("--pipeline-schedule zb-h1 --transformer-impl transformer_engine", "zb-h1 .* use local"),
    ],
)
def test_arguments_that_stages_cannot_honour_are_refused_before_any_rank_starts(monkeypatch, options, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=words):
        parse_arguments(f"{COMMAND} {options}".split(), DATASET)
    separate = "--untie-embeddings-and-output-weights --transformer-impl local"
    parse_arguments(f"{COMMAND} {options} {separate}".split(), DATASET)
