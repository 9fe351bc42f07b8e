"""Megatron's forward-step contract: the stand-in model, the placeholder, and the segments fed by them."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from models import Case, forget_router_losses, make_config

from helixpipe.megatron_adapter.forward_step import (
    IterationInput,
    PendingOutput,
    StandInModel,
)
from helixpipe.megatron_adapter.segments.helix import GPTSegments
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

LENGTH, BATCH = 6, 2
USED = {"self", "input_ids", "position_ids", "attention_mask", "labels", "loss_mask"}
UNSUPPORTED = sorted(set(inspect.signature(GPTModel.forward).parameters) - USED)


@pytest.fixture
def tokens():
    return torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)


@pytest.fixture
def model():
    return StandInModel(SimpleNamespace(pre_process=True, module=SimpleNamespace(vp_stage=3)))


def causal(length=LENGTH, dtype=torch.bool):
    """Megatron's form: true where a position must not be seen."""
    return torch.ones(1, 1, length, length).triu(1).to(dtype)


def test_everything_but_the_call_is_the_models_own(model):
    assert model.pre_process is True
    assert model.module.vp_stage == 3
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute
    assert not hasattr(model, "no_such_attribute")


def test_a_call_is_noted_by_position_and_by_name(model, tokens):
    positions, labels = tokens + 1, tokens + 2
    for output in (
        model(tokens, positions, None, labels=labels),
        model(input_ids=tokens, position_ids=positions, attention_mask=None, labels=labels, loss_mask=tokens),
        model(tokens, positions, causal(), None, labels),
    ):
        assert isinstance(output, PendingOutput)
        assert output.call.tokens is tokens
        assert output.call.position_ids is positions
        assert output.call.labels is labels
    assert model(tokens, None, None).call.labels is None


def test_the_signature_is_megatrons(model, tokens):
    with pytest.raises(TypeError, match="attention_mask"):
        model(tokens, tokens)
    with pytest.raises(TypeError, match="no_such_argument"):
        model(tokens, tokens, None, no_such_argument=1)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_arguments_that_would_be_ignored_are_refused_by_name(model, tokens, name):
    with pytest.raises(ValueError, match=rf"does not support (the model argument '|Megatron's ){name}"):
        model(tokens, tokens, None, **{name: object()})
    model(tokens, tokens, None, **{name: None})


def test_megatron_has_the_arguments_that_were_thought_of():
    assert {"decoder_input", "packed_seq_params", "inference_context"} <= set(UNSUPPORTED)


@pytest.mark.parametrize(
    "mask", [causal(), causal()[0, 0], causal().expand(BATCH, -1, -1, -1), causal(dtype=torch.uint8)]
)
def test_the_causal_mask_is_accepted(model, tokens, mask):
    model(tokens, tokens, mask)


def changed(row, column, value):
    mask = causal().repeat(BATCH, 1, 1, 1)
    mask[-1, 0, row, column] = value
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        changed(0, 5, False),
        changed(4, 1, True),
        ~causal(),
        torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool),
        causal(LENGTH - 1),
        causal(LENGTH + 1),
        torch.zeros(BATCH, LENGTH, dtype=torch.bool),
    ],
    ids=["sees ahead", "document end", "inverted", "bidirectional", "short", "long", "padding"],
)
def test_other_masks_are_refused(model, tokens, mask):
    with pytest.raises(ValueError, match="not the causal one"):
        model(tokens, tokens, mask)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_share_sequences_have_the_rows_of_their_tokens(monkeypatch, model, tokens, rank):
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: rank)
    rows = [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    model(tokens, tokens, causal(2 * LENGTH)[:, :, rows[rank]])
    for wrong in (causal(2 * LENGTH)[:, :, rows[1 - rank]], causal(2 * LENGTH)[:, :, :LENGTH], causal()):
        with pytest.raises(ValueError, match="not the causal one"):
            model(tokens, tokens, wrong)


@pytest.mark.parametrize(
    "use",
    [
        lambda output: output.float(),
        lambda output: output.shape,
        lambda output: output.view(-1),
        lambda output: output * 2,
        lambda output: 2 * output,
        lambda output: output + output,
        lambda output: output[0],
        lambda output: torch.sum(output),
    ],
    ids=["method", "attribute", "view", "times", "rtimes", "plus", "index", "torch"],
)
def test_using_the_output_too_early_says_what_to_do(model, tokens, use):
    with pytest.raises(ValueError, match="hand it on untouched and compute in the loss function"):
        use(model(tokens, tokens, None))


class FakeSegmented:
    """Three segments; the last one's output depends on the labels and on what was handed on."""

    num_segments = 3
    share_embeddings_and_output_weights = False
    pre_process = True
    needs_documents = False

    def __init__(self, **config):
        self.config = make_config(Case(pp=1))
        for name, value in config.items():
            setattr(self.config, name, value)
        self.calls = []

    def edge_shapes(self, edge, seq_length, micro_batch_size):
        return [torch.Size((edge, seq_length, micro_batch_size))]

    def forward_segment(self, segment, inputs, **given):
        self.calls.append((segment, sorted(given)))
        if segment == 0:
            return (given["tokens"].float().requires_grad_(),)
        if segment == 1:
            return inputs
        return (inputs[0] + given["labels"],)


def mean_loss(output):
    loss = output.mean()
    # Megatron scales the loss in place.
    return loss, {"lm loss": loss.detach().clone()}


def segments_for(
    model_step, num_microbatches=2, *, differentiate=True, non_loss=False, losses_here=None, **config
):
    segmented = FakeSegmented(**config)
    segments = GPTSegments(
        SimpleNamespace(),
        segmented,
        LENGTH,
        BATCH,
        torch.float32,
        DeferredWeightGradients(),
        losses_here=losses_here,
    )
    data = iter(range(num_microbatches))
    segments.begin(IterationInput(model_step, [data], num_microbatches, non_loss, differentiate))
    return segments


def step_with(loss_func=mean_loss, shape=(BATCH, LENGTH)):
    """A forward step whose micro batch ``i`` holds the token ``i`` and the label ``10 i``."""

    def step(data_iterator, model):
        value = next(data_iterator)
        tokens = torch.full(shape, value)
        return model(tokens, tokens, None, labels=10 * tokens), loss_func

    return step


def run(segments, micro_batch):
    values = ()
    for segment in range(3):
        values = segments.forward(segment, micro_batch, values)
    return values[0]


def test_each_loss_function_meets_the_output_of_its_own_micro_batch():
    """The last segment may meet micro batches in another order than the first."""
    segments = segments_for(step_with(), 3)
    handed_on = {i: segments.forward(1, i, segments.forward(0, i, ())) for i in range(3)}
    losses = {i: segments.forward(2, i, handed_on[i])[0] for i in (2, 0, 1)}
    # Megatron divides the loss by the number of micro batches, not what is reported.
    assert {i: loss.item() for i, loss in losses.items()} == pytest.approx({i: 11 * i / 3 for i in range(3)})
    assert [entry["lm loss"].item() for entry in segments.result.loss_data] == [22, 0, 11]


def test_segments_get_only_what_they_need():
    segments = segments_for(step_with())
    run(segments, 0)
    assert segments.segmented.calls == [
        (0, ["layout", "position_ids", "tokens"]),
        (1, ["borrowed", "layout"]),
        (2, ["borrowed", "labels"]),
    ]


def recorded_reads(reads):
    def step(data_iterator, model):
        output, loss_func = step_with()(data_iterator, model)
        reads.append(output.call.tokens[0, 0].item())
        return output, loss_func

    return step


def test_a_rank_with_some_of_the_losses_reads_every_micro_batch_once_and_in_order():
    """Its data iterator stands where the others' do when the iteration ends."""
    reads = []
    segments = segments_for(recorded_reads(reads), 6, losses_here=[1, 2, 4])
    segments.segmented.pre_process = False
    inputs = (torch.ones(BATCH, LENGTH),)
    for micro_batch, read in ((1, [0, 1]), (2, [0, 1, 2]), (4, [0, 1, 2, 3, 4, 5])):
        segments.forward(2, micro_batch, inputs)
        assert reads == read
    # Each loss is that of its own micro batch's labels.
    assert [entry["lm loss"].item() for entry in segments.result.loss_data] == [11, 21, 41]
    assert not segments._pending


def test_a_rank_without_losses_keeps_no_labels():
    segments = segments_for(step_with(), 3, losses_here=[0])
    for micro_batch in range(3):
        segments.forward(0, micro_batch, ())
    assert list(segments._pending) == [0]
    run_last = segments.forward(2, 0, (torch.ones(BATCH, LENGTH),))
    assert len(run_last) == 1
    assert not segments._pending


def test_layouts_follow_the_models_edges():
    layout = segments_for(step_with()).layout(1, 0)
    assert layout.shapes == (torch.Size((1, LENGTH, BATCH)),)
    assert layout.dtype is torch.float32


@pytest.mark.parametrize(
    "shape", [(BATCH, LENGTH - 1), (BATCH, LENGTH + 1), (BATCH + 1, LENGTH), (1, LENGTH)]
)
def test_a_micro_batch_of_another_shape_is_refused(shape):
    segments = segments_for(step_with(shape=shape))
    with pytest.raises(ValueError, match="micro batch 0 holds tokens of shape") as raised:
        segments.forward(0, 0, ())
    assert str(shape) in str(raised.value)
    assert str((BATCH, LENGTH)) in str(raised.value)


def test_the_forward_step_must_return_the_models_output():
    def step(data_iterator, model):
        output, loss_func = step_with()(data_iterator, model)
        return {"output": output}, loss_func

    with pytest.raises(ValueError, match="must return the model's output itself"):
        segments_for(step).forward(0, 0, ())


def test_a_loss_of_one_element_becomes_a_scalar_for_the_backward_pass():
    def loss_func(output):
        return output.mean().reshape(1), {}

    assert run(segments_for(step_with(loss_func)), 0).shape == ()
    assert run(segments_for(step_with(loss_func), differentiate=False), 0).shape == (1,)


def test_the_loss_is_scaled_for_the_backward_pass_only():
    def loss_of(differentiate):
        segments = segments_for(
            step_with(), differentiate=differentiate, grad_scale_func=lambda loss: loss * 8
        )
        run(segments, 0)
        return run(segments, 1).item(), segments.result.loss_data[1]["lm loss"].item()

    assert loss_of(differentiate=True) == (8 * 11 / 2, 11)
    assert loss_of(differentiate=False) == (11 / 2, 11)


def test_tokens_are_counted_and_losses_not_divided_with_a_loss_per_token():
    def loss_func(output):
        return output.sum(), torch.tensor(7, dtype=torch.int), {}

    segments = segments_for(step_with(loss_func), calculate_per_token_loss=True)
    run(segments, 0)
    assert run(segments, 1).item() == 11 * BATCH * LENGTH
    assert segments.result.num_tokens.item() == 14


def test_half_precision_outputs_reach_the_loss_function_in_float32():
    seen = []

    def loss_func(output):
        seen.append(output.dtype)
        return mean_loss(output)

    segments = segments_for(step_with(loss_func))
    segments.forward(0, 0, ())
    segments.forward(2, 0, (torch.zeros(BATCH, LENGTH, dtype=torch.bfloat16),))
    assert seen == [torch.float32]


def test_other_data_than_losses_can_be_collected():
    def loss_func(output, non_loss_data=False):
        assert non_loss_data
        return output.max().item()

    segments = segments_for(step_with(loss_func), differentiate=False, non_loss=True)
    for i in range(2):
        run(segments, i)
    assert segments.result.loss_data == [0, 11]


def test_an_iteration_begins_with_nothing_of_the_last():
    segments = segments_for(step_with())
    run(segments, 0)
    first = segments.result
    segments.begin(IterationInput(step_with(), [iter([5])], 1, False, True))
    assert run(segments, 0).item() == 55
    assert len(segments.result.loss_data) == 1
    assert len(first.loss_data) == 1


@pytest.mark.parametrize("per_token_loss", [False, True])
@pytest.mark.parametrize("loss_scale", [None, 512.0])
def test_losses_of_routers_weigh_as_under_megatrons_functions(per_token_loss, loss_scale):
    """On ranks that compute no loss: Megatron sets the weight on every stage, with every forward step."""
    config = make_config(Case(pp=1, experts=4, style="llama", per_token_loss=per_token_loss))
    config.grad_scale_func = None if loss_scale is None else (lambda loss: loss * loss_scale)
    forget_router_losses()
    forward_step_calc_loss(None, torch.ones(1), None, config, None, False, 4, [], 1, False)
    expected = MoEAuxLossAutoScaler.main_loss_backward_scale
    assert float(expected) == (loss_scale or 1.0) / (1 if per_token_loss else 4)
    forget_router_losses()
    iteration = IterationInput(None, [None], 4, collect_non_loss_data=False, differentiate=True)
    iteration.scale_router_losses(config, torch.nn.Linear(1, 1))
    assert torch.equal(MoEAuxLossAutoScaler.main_loss_backward_scale, expected)


def test_a_dense_model_has_no_losses_of_routers():
    forget_router_losses()
    iteration = IterationInput(None, [None], 4, collect_non_loss_data=False, differentiate=True)
    iteration.scale_router_losses(make_config(Case(pp=1)), torch.nn.Linear(1, 1))
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is None
