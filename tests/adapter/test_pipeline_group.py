"""Groups of their own for pipeline messages, beside Megatron's: made on all ranks in one order."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from models import Case
from pipeline_group_worker import OptionsOfTorch26, talk_in_two_ways
from pretend import pretend_rank
from ranks import run_on_ranks

from helixpipe.megatron_adapter import pipeline_group
from helixpipe.megatron_adapter.pipeline_group import (
    MAX_BLOCKS_OF_A_MESSAGE,
    make_communicator,
    message_options,
)


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
    options = message_options(SimpleNamespace(Options=OptionsOfTorch26), timedelta(minutes=7))
    assert options.is_high_priority_stream
    assert options.config.max_ctas == MAX_BLOCKS_OF_A_MESSAGE
    assert options._timeout == timedelta(minutes=7)


def test_over_nccl_every_rank_makes_two_groups_of_each_pipeline_with_options_of_their_own(monkeypatch):
    """The calls that this process makes, recorded; groups themselves are of no transport."""
    made = []
    new_group = dist.new_group

    def record(ranks, *, timeout, backend, pg_options, group_desc):
        made.append((ranks, timeout, backend, pg_options))
        return new_group(ranks, backend="fake")

    def gather(everyone, mine):
        everyone[:] = [(rank % 2, rank % 2 + 2) for rank in range(4)]

    with pretend_rank(Case(pp=2, tp=2), rank=3):
        group = parallel_state.get_pipeline_model_parallel_group()
        monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
        monkeypatch.setattr(dist, "new_group", record)
        monkeypatch.setattr(dist, "all_gather_object", gather)
        monkeypatch.setattr(pipeline_group, "_timeout_of", lambda group: timedelta(minutes=7))
        monkeypatch.setattr(
            dist, "ProcessGroupNCCL", SimpleNamespace(Options=OptionsOfTorch26), raising=False
        )
        communicator = make_communicator(group)
    assert (communicator.rank, communicator.size) == (1, 2)
    assert [ranks for ranks, *_ in made] == [[0, 2], [1, 3]] * 2
    assert {(timeout, backend) for _, timeout, backend, _ in made} == {(timedelta(minutes=7), "nccl")}
    options = [chosen for *_, chosen in made]
    assert all(chosen.is_high_priority_stream for chosen in options)
    assert len({id(chosen) for chosen in options}) == 4


@pytest.mark.parametrize(
    "backend",
    [None, SimpleNamespace(), SimpleNamespace(Options=SimpleNamespace)],
    ids=["no NCCL", "no options", "options of another kind"],
)
def test_what_torch_does_not_offer_is_left_out(backend):
    options = message_options(backend, timedelta(minutes=7))
    assert options is None or vars(options) == {}


def test_messages_of_gpus_do_not_go_over_gloo(monkeypatch):
    with pretend_rank(Case(pp=2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ValueError, match=r"use --distributed-backend nccl$"):
            make_communicator(parallel_state.get_pipeline_model_parallel_group())
