"""Communicators: one suite for every transport, and what the in-memory one checks besides."""

import pytest
import torch
from communicator_worker import GROUPS, SCENARIOS, SIZE, groups_of_messages, run_all_over_gloo
from ranks import run_on_ranks
from threads import run_on_threads

from helixpipe.runtime.communicator import InMemoryFabric


@pytest.fixture(scope="module")
def over_gloo():
    return run_on_ranks(SIZE, run_all_over_gloo)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_in_memory(scenario):
    fabric = InMemoryFabric(SIZE, timeout_s=5)
    run_on_threads(SIZE, lambda rank: SCENARIOS[scenario](fabric.communicator(rank)))
    fabric.assert_empty()


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_over_gloo(over_gloo, groups, scenario):
    failures = {rank: outcomes[groups, scenario] for rank, outcomes in enumerate(over_gloo)}
    assert not any(failures.values()), "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())


def test_messages_to_lower_ranks_use_the_second_group_at_both_ends():
    used = run_on_ranks(3, groups_of_messages)
    assert used == [
        [
            "send to 1 upward",
            "receive from 1 downward",
            "send to 2 upward",
            "receive from 2 downward",
        ],
        [
            "send to 0 downward",
            "receive from 0 upward",
            "send to 2 upward",
            "receive from 2 downward",
        ],
        [
            "send to 0 downward",
            "receive from 0 upward",
            "send to 1 downward",
            "receive from 1 upward",
        ],
    ]


@pytest.mark.parametrize(
    ("buffer", "found"),
    [
        (torch.empty(4), r"expected \(4,\) torch.float32 from rank 0, got \(3,\) torch.float32"),
        (torch.empty(3, 1), r"expected \(3, 1\) torch.float32 from rank 0, got \(3,\) torch.float32"),
        (torch.empty(3, dtype=torch.int32), r"expected \(3,\) torch.int32 from rank 0, got \(3,\) torch.flo"),
    ],
)
def test_in_memory_refuses_a_message_of_another_shape_or_type(buffer, found):
    fabric = InMemoryFabric(2)
    fabric.communicator(0).send(torch.zeros(3), 1, 0)
    with pytest.raises(ValueError, match=f"rank 1 {found}"):
        fabric.communicator(1).receive(buffer, 0, 0).wait()


def test_in_memory_timeout_names_both_ends_and_the_tag():
    fabric = InMemoryFabric(3, timeout_s=0.05)
    with pytest.raises(TimeoutError, match=r"rank 2 waited 0.05 s for tag=17 from rank 1"):
        fabric.communicator(2).receive(torch.empty(1), 1, 17).wait()


def test_in_memory_names_messages_that_nobody_received():
    fabric = InMemoryFabric(2)
    fabric.assert_empty()
    fabric.communicator(1).send(torch.zeros(1), 0, 4)
    with pytest.raises(AssertionError, match=r"\(1, 0, 4\): 1"):
        fabric.assert_empty()
    fabric.communicator(0).receive(torch.empty(1), 1, 4).wait()
    fabric.assert_empty()
