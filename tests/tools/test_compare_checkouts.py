"""Two checkouts are compared by losses to the bit and by who computes what in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import load_script

SCRIPT = Path(__file__).parents[2] / "tools" / "compare_checkouts.py"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def plan(*orders):
    return {"orders": [order.split() for order in orders]}


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (plan("0F0 1RECV_F0@1 1F0", "0F1"), "the same plan"),
        (plan("1RECV_F0@1 0F0 1F0", "0F1"), "the same order, with receives posted elsewhere"),
        (plan("1F0 1RECV_F0@1 0F0", "0F1"), "another order"),
        (plan("0F0 1RECV_F0@1 1F0", "0F1 0SEND_F0@0"), "another order"),
        (None, "a plan's file from one of them only"),
    ],
)
def test_plans_are_compared_by_their_orders(script, after, words):
    assert script.compare_plans(plan("0F0 1RECV_F0@1 1F0", "0F1"), after) == words


def test_a_loss_of_other_bits_is_a_difference(script):
    before = script.Outcome([(5.0, 1.0), (4.0, 1.0)], None, "")
    assert script.verdict(before, before) == "losses to the bit, the same plan"
    moved = script.Outcome([(5.0, 1.0), (4.0, 1.0 + 2**-52)], None, "")
    assert script.verdict(before, moved) == "losses or norms differ, by up to 2.2e-16"
    short = script.Outcome([(5.0, 1.0)], None, "")
    assert script.verdict(before, short) == "2 and 1 iterations"
    ended = script.Outcome([], None, "ValueError: --lr")
    assert script.verdict(before, ended) == "FAILED: before: well | ValueError: --lr"
