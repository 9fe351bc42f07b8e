"""What HelixForwardBackward refuses, and how: one error on every rank before any message."""

import pytest
from adapter_worker import DISAGREEMENTS, SEQ_LENGTH, disagree
from models import Case
from pretend import pretend_rank
from ranks import run_on_ranks
from stages import segmented_share

from helixpipe.megatron_adapter.forward_backward import HelixForwardBackward
from helixpipe.runtime.trace import HostClock


def call(**arguments):
    return HelixForwardBackward(clock=HostClock())(
        **{
            "forward_step_func": None,
            "data_iterator": None,
            "model": [None],
            "num_microbatches": 2,
            "seq_length": SEQ_LENGTH,
            "micro_batch_size": 1,
            **arguments,
        }
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_seq_length", SEQ_LENGTH + 1),
        ("adjust_tensor_shapes_fn", lambda *shapes: shapes),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"does not support {name}"):
        call(**{name: value})


def test_model_chunks_come_one_per_rank():
    with pytest.raises(ValueError, match="one model chunk per rank, not 2"):
        call(model=[None, None])
    with pytest.raises(ValueError, match="one model chunk per rank, not 0"):
        call(model=[])


def test_data_iterators_come_one_per_rank():
    case = Case(pp=1, seq_length=SEQ_LENGTH)
    with pretend_rank(case):
        model = segmented_share(case)
        with pytest.raises(ValueError, match="one data iterator per rank, not 2"):
            call(model=[model], data_iterator=[iter(()), iter(())], decoder_seq_length=SEQ_LENGTH)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"num_microbatches": 0}, "micro batches must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, rule):
    case = Case(pp=1)
    with pretend_rank(case), pytest.raises(ValueError, match=rule):
        call(model=[segmented_share(case)], **arguments)


def test_ranks_that_disagree_are_told_before_any_message():
    of_ranks = run_on_ranks(2, disagree)
    for name in DISAGREEMENTS:
        refusals = [of_rank[name] for of_rank in of_ranks]
        assert all(refusals), name
        for refusal in refusals:
            assert "pipeline ranks disagree" in refusal.message
            assert refusal.messages_sent == 0
            assert refusal.seconds < 5
        # Both ranks see the same two values, which differ.
        assert refusals[0].message == refusals[1].message
        _, values = refusals[0].message.split("rank 0: ")
        assert len(set(values.split(". Start")[0].split("; rank 1: "))) == 2
