"""Between an iteration's first operation and its last, the host never waits for the device."""

from functools import partial

import pytest
import torch
from elastic_models import build_elastic, documents, elastic, recipe_of, train_once
from host_waits import host_waits
from models import Case, build_planned, initialize, planned_schedule, run_iteration
from pretend import pretend_rank
from threads import run_on_threads
from toy_segments import SplitToySegments, ToySegments, make_executor

from helixpipe.layers.elastic.positions import angles_at
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward
from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.runtime.communicator import InMemoryFabric
from helixpipe.runtime.header import HeaderCheck
from helixpipe.runtime.trace import HostClock

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="builds its models on a CPU")

AGREEMENT = "helixpipe/megatron_adapter/pipeline_group.py:agree"
# Once before or after all operations of an iteration: ranks agree on a batch that is still on the host, and
# Megatron divides by the number of tokens.
ONCE = {
    "numpy in helixpipe/megatron_adapter/elastic_batch.py:fingerprint",
    *(f"{what} in {AGREEMENT}" for what in ("cpu", "numpy", "blocking to", "_local_scalar_dense")),
    "_local_scalar_dense in megatron.core finalize_model_grads.py:finalize_model_grads",
}
TENSOR, MASK = torch.arange(3.0), torch.tensor([True, False, True])


@pytest.mark.parametrize(
    "wait",
    [
        lambda: TENSOR[0].item(),
        lambda: bool(TENSOR[0]),
        lambda: int(TENSOR[0]),
        lambda: TENSOR.tolist(),
        lambda: TENSOR.cpu(),
        lambda: TENSOR.numpy(),
        lambda: TENSOR.nonzero(),
        lambda: TENSOR[MASK],
        lambda: torch.masked_select(TENSOR, MASK),
        lambda: torch.unique(TENSOR),
        lambda: torch.equal(TENSOR, TENSOR),
        lambda: torch.tensor([1.0], device="cpu"),
        lambda: TENSOR.to("cpu"),
        lambda: TENSOR.to(device=torch.device("cpu")),
    ],
)  # fmt: skip
def test_whatever_waits_is_noticed(wait):
    with host_waits() as found:
        wait()
    assert found.total() >= 1


def test_what_does_not_wait_is_not():
    with host_waits() as found:
        (TENSOR + 1).sum()
        TENSOR.to("cpu", non_blocking=True)
        TENSOR.to(torch.float64)
        TENSOR[torch.tensor([0, 1])]
        torch.zeros(3, device="cpu")
    assert not found


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_elastic_training_does_not_wait(style):
    case = elastic(1, style=style)
    with pretend_rank(case.case):
        initialize(case.case)
        chunks, schedule = build_elastic(case), ElasticForwardBackward(clock=HostClock())
        with host_waits() as found:
            train_once(case, chunks, schedule, ElasticBatch(recipe_of(case), documents(case)))
    assert set(found) <= ONCE


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("helix", {}),
        ("helix", {"attention_range": "qkv", "head_placement": "spread"}),
        ("helix", {"attention_range": "block", "without_attention": True, "mlp_chunk": 7, "loss_chunk": 10}),
        ("zb-h1", {}),
        ("gpipe", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("per_token_loss", [False, True])
def test_training_by_a_plan_does_not_wait(schedule, options, per_token_loss):
    case = Case(pp=1, schedule=schedule, style="llama", per_token_loss=per_token_loss, **options)
    with pretend_rank(case):
        initialize(case)
        chunks, forward_backward = build_planned(case), planned_schedule(case)
        # The first builds the executor.
        run_iteration(case, chunks, forward_backward)
        with host_waits() as found:
            run_iteration(case, chunks, forward_backward)
    assert set(found) <= ONCE | {"tolist in the test"}


@pytest.mark.parametrize(
    ("schedule", "options"),
    [("1f1b", {}), ("zb-h1", {}), ("helix", {}), ("helix", {"attention_range": "qkv"})],
    ids=str,
)
def test_messages_do_not_wait(schedule, options):
    """With headers that are compared after the iteration, as on a GPU."""
    plan = build_plan(schedule, ScheduleRequest(num_layers=3, num_ranks=3, num_microbatches=6, **options))
    fabric = InMemoryFabric(plan.num_ranks)
    make = partial(SplitToySegments if plan.splits_backward else ToySegments, plan.num_segments)

    def run(rank):
        executor = make_executor(plan, make(), fabric.communicator(rank))
        messages = executor.mail.headers._messages
        executor.mail.headers = HeaderCheck(1, messages, torch.device("meta"))
        with host_waits() as found:
            executor.run()
        executor.check_messages()
        return found

    for found in run_on_threads(plan.num_ranks, run):
        assert set(found) <= {"_local_scalar_dense in the test"}


def test_frequencies_of_rotary_positions_are_moved_once():
    case = Case(pp=1, style="llama", schedule="elastic", per_token_loss=True)
    with pretend_rank(case):
        rotary = build_elastic(elastic(1, style="llama"))[0].module.rotary_pos_emb
        positions = torch.arange(5)[None].to("meta")
        moved = []
        for _ in range(3):
            with host_waits() as found:
                angles_at(rotary, positions)
            moved.append(found.total())
    assert moved == [1, 0, 0]
    assert rotary.inv_freq.is_meta
