"""Starts that cannot work, without torchrun: one line with the address and the cause, and a non-zero exit."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from jobs import MODEL, free_port, run

from helixpipe.reliability.exit_codes import BAD_USAGE, PEER_LOST


def start(corpus, **environment):
    command = [sys.executable, "pretrain_gpt.py", *MODEL, "--data-path", str(corpus)]
    return run([*command, "--distributed-timeout-minutes", "1"], 150, **environment)


def assert_one_line(finished, rank, code, *words):
    assert finished.code == code, finished.errors
    (line,) = [line for line in finished.errors.splitlines() if line.startswith("pretrain_gpt: ")]
    assert line.startswith(f"pretrain_gpt: rank {rank}: error: ")
    assert all(word in line for word in words), line
    assert "Traceback" not in finished.errors


@pytest.fixture
def foreign_port():
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def test_the_port_is_taken_by_another_program(corpus, foreign_port):
    finished = start(corpus, MASTER_PORT=str(foreign_port))
    assert_one_line(finished, 0, BAD_USAGE, f"localhost:{foreign_port}", "another program has the port")


@pytest.mark.slow
def test_the_address_does_not_exist(corpus):
    finished = start(corpus, RANK="1", WORLD_SIZE="2", MASTER_ADDR="nosuch.invalid", MASTER_PORT="29784")
    assert_one_line(finished, 1, BAD_USAGE, "MASTER_ADDR nosuch.invalid has no address")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_never_comes_and_another_finds_nobody(corpus):
    ports = free_port(), free_port()
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with ThreadPoolExecutor() as pool:
        alone, nobody = (
            pool.submit(start, corpus, RANK=rank, MASTER_PORT=str(port), **address)
            for rank, port in zip("01", ports, strict=True)
        )
    missing = f"rank 1 did not come to 127.0.0.1:{ports[0]} within 60 s"
    assert_one_line(alone.result(), 0, PEER_LOST, missing)
    lonely = f"nobody listens at 127.0.0.1:{ports[1]} after 60 s (Connection refused)"
    assert_one_line(nobody.result(), 1, PEER_LOST, lonely)
