"""Elastic batches, evaluation, dropout and what is refused."""

from dataclasses import replace

import pytest
import torch
from elastic_models import (
    build_elastic,
    documents,
    elastic,
    forward_step,
    losses_by_sequence,
    recipe_of,
    reference,
    run_case,
    train_once,
)
from models import gather_gradients, initialize, relative_error
from pretend import pretend_rank
from ranks import run_on_ranks

from helixpipe.elastic import ElasticPlan, Prediction, Recipe
from helixpipe.elastic.chunk_schedule import elastic_plan
from helixpipe.layers.elastic.model import check_supported
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward
from helixpipe.plan.build import complete
from helixpipe.runtime.trace import HostClock

CASE = elastic(1, checkpointed=None)


def batch_of(case=CASE):
    return ElasticBatch(recipe_of(case), documents(case))


def run(chunks, batch, **options):
    return train_once(CASE, chunks, ElasticForwardBackward(clock=HostClock()), batch, **options)


@pytest.mark.parametrize("multiple", [1, 4])
def test_every_token_is_in_one_chunk_with_its_label_and_position(multiple):
    batch = batch_of()
    seen = {index: torch.zeros(len(s) - 1, dtype=torch.long) for index, s in enumerate(batch.sequences)}
    assembled = batch.assemble(multiple, torch.device("cpu"))
    for chunk, tensors in zip(batch.recipe.chunks, assembled, strict=True):
        length = tensors["tokens"].shape[1]
        assert length % multiple == 0
        assert length - chunk.tokens < multiple
        assert all(tensor.shape == (1, length) for tensor in tensors.values())
        mask = tensors["loss_mask"][0]
        assert mask.tolist() == [1.0] * chunk.tokens + [0.0] * (length - chunk.tokens)
        first = 0
        for piece in chunk.pieces:
            part = slice(first, first + piece.length)
            positions = tensors["position_ids"][0, part]
            document = batch.sequences[piece.sequence]
            assert torch.equal(tensors["tokens"][0, part], document[positions])
            assert torch.equal(tensors["labels"][0, part], document[positions + 1])
            seen[piece.sequence][positions] += 1
            first += piece.length
    assert all(bool((count == 1).all()) for count in seen.values())


def test_a_plan_and_its_recipe_are_the_same_batch():
    recipe = recipe_of(CASE)
    plan = ElasticPlan(recipe, complete(elastic_plan(recipe, 4)), Prediction(1.0, 0.0, 0.0, (1,), (0,)))
    assert ElasticBatch(plan, documents(CASE)).plan(4) == batch_of().plan(4)


def test_the_fingerprint_tells_plans_and_tokens_apart():
    recipe, sequences = recipe_of(CASE), documents(CASE)
    assert ElasticBatch(recipe, sequences).fingerprint == batch_of().fingerprint
    others = [*sequences[:-1], sequences[-1] + 1]
    unchecked = recipe_of(replace(CASE, checkpointed=0))
    batches = (
        batch_of(),
        ElasticBatch(recipe, others),
        ElasticBatch(unchecked, sequences),
        ElasticBatch(recipe, sequences, masks_of()),
    )
    assert len({batch.fingerprint for batch in batches}) == len(batches)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[:-1], "sequence 8 has no tokens .*, the plan has 130"),
        (lambda s: [*s, s[0]], "sequence 9 has 5 tokens .*, the plan has none"),
        (lambda s: [s[0][:-1], *s[1:]], "sequence 0 has 4 tokens .*, the plan has 5"),
        (lambda s: [s[0][None], *s[1:]], "sequence 0 must be at least 2 token ids, one-dim.*found .1, 6."),
        (lambda s: [s[0].int(), *s[1:]], "sequence 0 .* torch.long .*found .6,. torch.int32 on cpu"),
        (lambda s: [*s[:2], s[2][:1], *s[3:]], "sequence 2 must be at least 2"),
    ],
)
def test_sequences_that_are_not_the_plans_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ElasticBatch(recipe_of(CASE), change(documents(CASE)))


def masks_of(case=CASE):
    """No loss on the first third, as of a prompt; none at all on sequence 6, most of which is one chunk."""
    return [
        (torch.arange(len(s) - 1) >= (len(s) // 3 if index != 6 else len(s)))
        for index, s in enumerate(documents(case))
    ]


def test_tokens_without_loss_do_not_count():
    def change(batch):
        return ElasticBatch(batch.recipe, batch.sequences, masks_of())

    with pretend_rank(CASE.case):
        found = run_case(CASE, change)
    losses, expected = reference(CASE, masks=masks_of())
    for a, b in zip(found["losses"], losses[0], strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=0, atol=1e-5)
    for name in expected:
        assert relative_error(torch.as_tensor(found["gradients"][name]), expected[name]) < 4e-6, name
    # The prompts' losses would make a difference.
    _, unmasked = reference(CASE)
    assert all(relative_error(unmasked[name], expected[name]) > 1e-3 for name in expected)


def test_masks_that_do_not_fit_are_refused():
    masks = masks_of()
    masks[4] = masks[4][1:]
    for wrong in (masks, masks[:-1]):
        with pytest.raises(ValueError, match="a loss mask that is one shorter than its ids; found masks of"):
            ElasticBatch(recipe_of(CASE), documents(CASE), wrong)


def test_a_recipe_that_loses_tokens_is_refused():
    recipe = recipe_of(CASE)
    last = recipe.chunks[-1]
    doubled = replace(recipe, chunks=(*recipe.chunks, last), pipelines=(len(recipe.chunks) + 1,))
    with pytest.raises(ValueError, match="not in one chunk each"):
        ElasticBatch(doubled, documents(CASE))


def test_evaluation_gives_the_same_losses_and_leaves_nothing():
    with pretend_rank(CASE.case):
        chunks = build_elastic(CASE)
        trained = losses_by_sequence(recipe_of(CASE), run(chunks, batch_of()))
        before = {name: gradient.clone() for name, gradient in gather_gradients(chunks).items()}
        with torch.no_grad():
            chunks[0].eval()
            evaluated = losses_by_sequence(recipe_of(CASE), run(chunks, batch_of(), forward_only=True))
        chunks[0].module.contexts.assert_empty()
        assert all(torch.equal(a, b) for a, b in zip(evaluated, trained, strict=True))
        after = gather_gradients(chunks)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_same_objects_run_batch_after_batch():
    """Plans differ from call to call; what a failed iteration left does not stay."""
    other = replace(CASE, num_slices=2, lengths=CASE.lengths[1:])
    with pretend_rank(CASE.case):
        chunks, schedule = build_elastic(CASE), ElasticForwardBackward(clock=HostClock())
        first = train_once(CASE, chunks, schedule, batch_of())
        with pytest.raises(RuntimeError, match="half way"):
            fail_half_way(chunks, schedule)
        train_once(other, chunks, schedule, ElasticBatch(recipe_of(other), documents(other)))
        again = train_once(CASE, chunks, schedule, batch_of())
        assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, again, strict=True))


def fail_half_way(chunks, schedule):
    calls = []

    def step(data_iterator, model):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("half way")
        return forward_step(data_iterator, model)

    schedule(forward_step_func=step, data_iterator=iter([batch_of()]), model=chunks)


def test_dropout_is_the_same_when_layers_are_computed_again():
    """Gradients with everything recomputed are those without: masks are drawn once."""

    def gradients(checkpointed):
        case = elastic(1, hidden_dropout=0.3, checkpointed=checkpointed)
        with pretend_rank(case.case):
            return run_case(case)["gradients"]

    plain, recomputed = gradients(0), gradients(4)
    for name in plain:
        assert relative_error(*(torch.as_tensor(g[name]) for g in (recomputed, plain))) < 1e-6, name


def test_bfloat16_is_as_exact_as_without_slices():
    def gradients(**values):
        case = elastic(1, style="llama", checkpointed=None, **values)
        with pretend_rank(case.case):
            return {n: torch.as_tensor(g) for n, g in run_case(case)["gradients"].items()}

    exact = gradients(dtype=torch.float64)
    whole = gradients(dtype=torch.bfloat16, num_slices=1)
    sliced = gradients(dtype=torch.bfloat16, num_slices=8)
    for name in exact:
        assert relative_error(sliced[name], exact[name]) <= 2 * relative_error(whole[name], exact[name])


def call(case=CASE, *, prepare=None, **arguments):
    with pretend_rank(case.case):
        chunks = build_elastic(case)
        if prepare is not None:
            prepare(chunks[0].module)
        arguments = {
            "forward_step_func": forward_step,
            "data_iterator": iter([batch_of()]),
            "model": chunks,
            **arguments,
        }
        ElasticForwardBackward(clock=HostClock())(**arguments)


def set_on_config(**values):
    def prepare(model):
        for name, value in values.items():
            setattr(model.config, name, value)

    return prepare


def two_values(data_iterator, model):
    output, _ = forward_step(data_iterator, model)
    return output, lambda losses: (losses.mean(), {})


def with_mask(data_iterator, model):
    data = next(data_iterator)
    mask = torch.ones(1, 1, dtype=torch.bool)
    return model(data["tokens"], data["position_ids"], mask, labels=data["labels"]), None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prepare": set_on_config(calculate_per_token_loss=False)}, "set calculate_per_token_loss"),
        ({"prepare": set_on_config(variable_seq_lengths=True)}, "does not support variable sequence lengths"),
        ({"adjust_tensor_shapes_fn": print}, "does not support adjust_tensor_shapes_fn"),
        ({"forward_step_func": two_values}, "must return three values: the sum"),
        ({"forward_step_func": with_mask}, "takes no attention mask"),
        ({"prepare": set_on_config(pipeline_model_parallel_size=2)}, "planned for 1 stages, the job has 2"),
        (
            {"prepare": set_on_config(num_layers=8)},
            "planned for 8 layers over 1 .* this stage has layers 1, 2, 3, 4$",
        ),
        (
            {"prepare": lambda model: setattr(model.decoder.layers[0], "layer_number", 2)},
            "planned for 4 layers over 1 stages of 4; this stage has layers 2, 2, 3, 4$",
        ),
        (
            {"prepare": lambda model: setattr(model, "max_sequence_length", 100)},
            "a sequence has 160 tokens, the model 100 learned positions; truncate",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_what_cannot_be_honoured_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        call(**options)


def test_more_checkpointed_layers_than_there_are_are_refused():
    recipe = recipe_of(CASE)
    counts = ((5,) * len(recipe.chunks),)
    batch = ElasticBatch(Recipe(recipe.chunks, recipe.pipelines, counts), documents(CASE))
    with pytest.raises(ValueError, match="checkpoints 5 layers of a stage of 4"):
        call(data_iterator=iter([batch]))


def test_recomputation_without_attention_is_refused():
    case = elastic(1, without_attention=True)
    with pretend_rank(case.case), pytest.raises(ValueError, match="leave --recompute-levels out"):
        build_elastic(case)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"recompute_granularity": "full"}, "the plan decides which layers"),
        ({"context_parallel_size": 2}, "context parallelism"),
        ({"num_moe_experts": 2, "moe_latent_size": 8}, "latent experts"),
        ({"multi_latent_attention": True}, "multi-latent"),
    ],
    ids=lambda value: str(value),
)
def test_models_that_cannot_be_elastic_are_refused(values, words):
    with pretend_rank(CASE.case):
        config = build_elastic(CASE)[0].module.config
    check_supported(config, "rope")
    with pytest.raises(ValueError, match="mrope positions"):
        check_supported(config, "mrope")
    for name, value in values.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"do not support .*{words}"):
        check_supported(config, "rope")


def disagree(case):
    """Rank 1 has one other token; what the call raises."""
    initialize(case.case)
    sequences = documents(case)
    sequences[3] = sequences[3] + torch.distributed.get_rank()
    try:
        train_once(
            case,
            build_elastic(case),
            ElasticForwardBackward(clock=HostClock()),
            ElasticBatch(recipe_of(case), sequences),
        )
    except ValueError as error:
        return str(error)
    return None


def test_ranks_with_other_tokens_are_told_before_the_first_message():
    for message in run_on_ranks(2, disagree, elastic(2)):
        assert message is not None
        assert "disagree on (plan and tokens, dtype, forward only)" in message
