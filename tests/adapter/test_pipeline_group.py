"""Groups of their own for pipeline messages, beside Megatron's: made on all ranks in one order."""

from types import SimpleNamespace

import pytest
from pipeline_group_worker import OptionsOfTorch26, talk_in_two_ways
from ranks import run_on_ranks

from helixpipe.megatron_adapter.pipeline_group import MAX_BLOCKS_OF_A_MESSAGE, message_options


@pytest.mark.parametrize(
    ("tp", "pp"),
    [(1, 4), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)],
)
def test_ranks_meet_in_groups_made_after_megatrons_own(tp, pp):
    """Megatron's embedding groups have only some ranks of a pipeline: ranks differ in how many they have."""
    found = run_on_ranks(tp * pp, talk_in_two_ways, tp, pp, timeout_s=100)
    assert [(rank, size) for rank, size, _ in found] == [(rank // tp, pp) for rank in range(tp * pp)]
    if pp > 2:
        assert len({num_groups for _, _, num_groups in found}) > 1


def test_messages_have_a_stream_of_high_priority_and_few_blocks():
    options = message_options(SimpleNamespace(Options=OptionsOfTorch26))
    assert options.is_high_priority_stream
    assert options.config.max_ctas == MAX_BLOCKS_OF_A_MESSAGE


@pytest.mark.parametrize(
    "backend",
    [None, SimpleNamespace(), SimpleNamespace(Options=SimpleNamespace)],
    ids=["no NCCL", "no options", "options of another kind"],
)
def test_what_torch_does_not_offer_is_left_out(backend):
    options = message_options(backend)
    assert options is None or vars(options) == {}
