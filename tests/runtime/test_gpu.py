"""Which GPU a rank takes, on machines that are pretended."""

from __future__ import annotations

import os

import pytest
import torch

from helixpipe.runtime.gpu import take_gpu


@pytest.fixture
def take(monkeypatch):
    """``take(local_rank, ranks, gpus)``: the GPU that was taken, and the host's name for NCCL."""

    def run(local_rank, ranks, gpus, named=None):
        taken = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        # As monkeypatch finds it, so that it is put back.
        monkeypatch.setenv("NCCL_HOSTID", named or "")
        if not named:
            monkeypatch.delenv("NCCL_HOSTID")
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        take_gpu()

        return taken[0], os.environ.get("NCCL_HOSTID")

    return run


def test_a_gpu_for_each_rank(take):
    assert [take(rank, 4, 4) for rank in range(4)] == [(rank, None) for rank in range(4)]


@pytest.mark.parametrize(("ranks", "gpus"), [(2, 1), (4, 1), (4, 2), (5, 2), (8, 3)])
def test_nccl_never_sees_two_ranks_on_one_gpu_of_one_host(take, ranks, gpus):
    taken = [take(rank, ranks, gpus) for rank in range(ranks)]
    assert len(set(taken)) == ranks
    assert {gpu for gpu, _ in taken} == set(range(gpus))
    # Those that can reach each other's GPU directly still do.
    assert len({host for _, host in taken}) == -(-ranks // gpus)


def test_a_name_that_was_given_stays(take):
    assert take(1, 2, 1, named="mine") == (0, "mine")
