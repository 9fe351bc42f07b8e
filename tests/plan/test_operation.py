"""The text form of operations, and the relations between them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixpipe.plan import Kind, Operation, Plan, ScheduleRequest, build_plan
from helixpipe.plan.operation import input_of, message_of, output_edge

NUMBERS = st.integers(0, 10**6)
COMPUTE = st.builds(Operation, NUMBERS, st.sampled_from([Kind.F, Kind.B, Kind.W]), NUMBERS, st.none())
MESSAGES = st.builds(
    Operation, NUMBERS, st.sampled_from([k for k in Kind if not k.is_compute]), NUMBERS, NUMBERS
)


@given(COMPUTE | MESSAGES)
def test_text_round_trip(operation):
    assert Operation.parse(str(operation)) == operation


@pytest.mark.parametrize(
    ("text", "operation"),
    [
        ("3F2", Operation(3, Kind.F, 2)),
        ("7B0", Operation(7, Kind.B, 0)),
        ("0W11", Operation(0, Kind.W, 11)),
        ("4SEND_F2@1", Operation(4, Kind.SEND_F, 2, 1)),
        ("4RECV_F2@0", Operation(4, Kind.RECV_F, 2, 0)),
        ("12SEND_B3@15", Operation(12, Kind.SEND_B, 3, 15)),
        ("12RECV_B3@14", Operation(12, Kind.RECV_B, 3, 14)),
        ("3SEND_P8@1", Operation(3, Kind.SEND_P, 8, 1)),
        ("3RECV_P8@0", Operation(3, Kind.RECV_P, 8, 0)),
        ("3SEND_G8@0", Operation(3, Kind.SEND_G, 8, 0)),
        ("3RECV_G8@1", Operation(3, Kind.RECV_G, 8, 1)),
        ("5SEND_K4@3", Operation(5, Kind.SEND_K, 4, 3)),
        ("5RECV_K4@2", Operation(5, Kind.RECV_K, 4, 2)),
        ("5SEND_KB4@3", Operation(5, Kind.SEND_KB, 4, 3)),
        ("5RECV_KB4@2", Operation(5, Kind.RECV_KB, 4, 2)),
        ("5SEND_D4@2", Operation(5, Kind.SEND_D, 4, 2)),
        ("5RECV_D4@3", Operation(5, Kind.RECV_D, 4, 3)),
    ],
)
def test_text_form_is_the_documented_one(text, operation):
    assert str(operation) == text
    assert Operation.parse(text) == operation


@pytest.mark.parametrize("text", ["", "F", "3F", "F2", "3G2", "-1F2", "3F-2", "3F2@", "3SEND2@1", "3F2 4F2"])
def test_other_text_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"is not an operation; expected .* like 3F2 or 4SEND_F2@1"):
        Operation.parse(text)


def test_peers_belong_to_messages():
    with pytest.raises(ValueError, match="F has no peer"):
        Operation.parse("3F2@1")
    with pytest.raises(ValueError, match="SEND_F needs its peer, like @1"):
        Operation.parse("3SEND_F2")


@given(st.text("0123456789FBWSENDRCV_@ -", max_size=12))
def test_parse_answers_any_text(text):
    try:
        operation = Operation.parse(text)
    except ValueError:
        return
    assert Operation.parse(str(operation)) == operation


@given(MESSAGES, NUMBERS)
def test_counterpart_of_the_counterpart_is_the_message(message, rank):
    other = message.counterpart(rank)
    assert other.peer == rank
    assert other.kind.is_send != message.kind.is_send
    assert other.kind.value[-1] == message.kind.value[-1]
    assert other.counterpart(message.peer) == message


@given(st.integers(0, 9), st.sampled_from([Kind.F, Kind.B]))
def test_output_and_input_are_inverse(segment, kind):
    """Who a result goes to is who takes it as input; the ends of the chain have no neighbour."""
    operation = Operation(segment, kind, 5)
    edge = output_edge(operation, 10)
    if edge is None:
        assert segment == (9 if kind is Kind.F else 0)
        return
    assert edge[0] == segment
    assert input_of(Operation(edge[1], kind, 5), 10) == operation
    # Both directions of an edge carry the number of its first segment.
    assert message_of(operation)[2] == min(edge)


def test_weight_gradients_have_neither_input_nor_output():
    assert input_of(Operation(3, Kind.W, 0), 10) is None
    assert output_edge(Operation(3, Kind.W, 0), 10) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_microbatches": 10**10}, "more than are planned"),
        ({"placement": [True, True]}, "instead of a rank"),
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "format"),
        ({"orders": [["0F0", 1]]}, "lists of strings"),
        ({"num_ranks": "2"}, "num_ranks"),
    ],
)
def test_a_damaged_plan_file_is_one_clear_error(change, message):
    plan = build_plan("1f1b", ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=2))
    damaged = json.loads(plan.to_json()) | change
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(damaged))


def test_deeply_nested_json_is_one_clear_error():
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json("[" * 100_000)
