"""Ranks that share one GPU over NCCL; as a program, one such rank of another program.

    torchrun --nproc-per-node 2 tests/support/one_gpu.py pretrain_gpt.py ARGUMENTS

NCCL refuses two ranks on one GPU if they are on one host. With a host's name of its own each, they talk over
sockets as ranks of several nodes do: everything of NCCL but its speed.
"""

from __future__ import annotations

import os
import runpy
import sys


def share(rank: int) -> None:
    """Let this process join a NCCL group as ``rank``; before the group is made."""
    # All are on this machine, which may have no other network.
    os.environ |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo"}


if __name__ == "__main__":
    share(int(os.environ["RANK"]))
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
