"""Who is to blame: the rank that nobody keeps waiting, in every way that ranks can stand still."""

from __future__ import annotations

import dataclasses
import math

import pytest

from helixpipe.reliability.diagnosis import (
    culprits,
    describe_failed,
    describe_hang,
    describe_lost,
    last_completed,
)
from helixpipe.reliability.status import DEAD, ENDED, FAILED, STOPPED, Status, explain


def status(rank, **changes):
    return Status(**{"rank": rank, "stage": rank, "host": f"node{rank}", "place": 7, "step": 20, **changes})


def by_rank(*statuses):
    return {each.rank: each for each in statuses}


def waits_for(rank, peer, **changes):
    return status(rank, message=f"2RECV_F3@{peer}", peer=peer, seconds=6.0, deadline_s=5.0, **changes)


def computes(rank, **changes):
    return status(rank, operation="4B3", seconds=6.0, deadline_s=5.0, **changes)


def test_the_end_of_a_chain_of_waits():
    assert culprits(by_rank(waits_for(0, 1), waits_for(1, 2), waits_for(2, 3), computes(3))) == [3]


def test_a_stopped_rank_even_if_it_waits_itself():
    assert culprits(by_rank(computes(0), waits_for(1, 0, condition=STOPPED), waits_for(2, 1))) == [1]


def test_a_dead_or_failed_rank_before_a_stopped_one():
    assert culprits(by_rank(computes(0, condition=STOPPED), computes(1, condition=DEAD))) == [1]
    assert culprits(by_rank(computes(0), computes(1, condition=FAILED))) == [1]


def test_a_rank_that_never_came():
    assert culprits(by_rank(status(0), status(2)), missing=[1]) == [1]


def test_a_hanging_interpreter_among_ranks_in_one_collective():
    """Tensor-parallel ranks are inside the same operation; the one that waits in the transport answers."""
    assert culprits(by_rank(computes(0), computes(1, answers=False))) == [1]


def test_the_rank_that_is_behind_where_others_wait_in_a_collective():
    behind = computes(2, place=7)
    assert culprits(by_rank(status(0, place=8), status(1, place=8), behind, status(3, place=8))) == [2]


def test_the_computing_rank_where_waits_are_not_told():
    """Megatron's own schedules wait between operations, for nobody knows whom."""
    assert culprits(by_rank(status(0), computes(1), status(2))) == [1]


def test_a_circle_is_named_whole():
    circle = by_rank(waits_for(0, 1), waits_for(1, 0), waits_for(2, 0))
    assert culprits(circle) == [0, 1]
    assert "wait for each other in a circle" in describe_hang(circle)


def test_ranks_in_the_same_place_are_all_suspects():
    assert culprits(by_rank(status(0), status(1))) == [0, 1]


def test_a_rank_that_has_ended_is_no_suspect():
    assert culprits(by_rank(status(0, condition=ENDED, place=1), computes(1))) == [1]


def test_a_hang_is_described_with_culprit_and_victims():
    found = by_rank(waits_for(0, 1), computes(1, condition=STOPPED, last="4F3"))
    text = describe_hang(found)
    assert text.startswith("hang: rank 1 (stage 1, host node1) is stopped")
    assert "step 20, 6.0 s in 4B3 (backward of segment 4, micro batch 3); last completed 4F3" in text
    assert text.endswith("held up: rank 0")
    assert last_completed(found) == "last completed: rank 0: none (step 20), rank 1: 4F3 (step 20)"


def test_who_waits_but_is_not_overdue_yet_is_held_up_too():
    found = by_rank(waits_for(0, 1), computes(1), status(2, seconds=0.1, deadline_s=5.0))
    found[0] = dataclasses.replace(found[0], seconds=4.8)
    assert describe_hang(found).endswith("held up: rank 0")


def test_a_missing_rank_is_described():
    assert "rank 1 has not joined the job" in describe_hang(by_rank(status(0)), [1])


def test_loss_and_failure_are_described_with_where_they_happened():
    found = by_rank(computes(0, condition=DEAD), computes(1, condition=FAILED, error="OSError: no space"))
    for text in (describe_lost(found, [0]), describe_failed(found, [1])):
        assert "step 20, 6.0 s in 4B3 (backward of segment 4, micro batch 3)" in text
    assert describe_lost(found, [0]).startswith("rank 0 (stage 0, host node0) was lost")
    assert describe_failed(found, [1]).startswith("rank 1 (stage 1, host node1) failed: OSError: no space")


def test_overdue_is_past_the_deadline_and_never_without_one():
    assert status(0, seconds=5.1, deadline_s=5.0).is_overdue
    assert not status(0, seconds=4.9, deadline_s=5.0).is_overdue
    assert not status(0, seconds=1e9, deadline_s=math.inf).is_overdue
    assert not status(0, seconds=5.1, deadline_s=5.0, condition=ENDED).is_overdue


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("3F12", "forward of segment 3, micro batch 12"),
        ("10B0", "backward of segment 10, micro batch 0"),
        ("1W2", "weight gradient of segment 1, micro batch 2"),
        ("2RECV_F3@1", "the activations of micro batch 3 after segment 2"),
        ("2SEND_B3@0", "the gradient of micro batch 3 after segment 2"),
        ("5RECV_P4@3", "the weights lent for segment 5 from micro batch 4 on"),
        ("5SEND_G4@3", "the gradients of the weights lent for segment 5 from micro batch 4 on"),
        ("5RECV_K4@3", "the keys and values lent for segment 5 from micro batch 4 on"),
        ("5SEND_KB4@3", "the keys and values lent again for segment 5 from micro batch 4 on"),
        ("5SEND_D4@3", "the gradients of the keys and values lent for segment 5 from micro batch 4 on"),
    ],
)
def test_operations_are_put_into_words(operation, words):
    assert explain(operation) == words
