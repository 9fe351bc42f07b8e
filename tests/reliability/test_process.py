"""What a sentinel learns from its rank without the rank's help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from helixpipe.reliability.process import force_stacks, is_stopped, keep_stacks

BUSY = """
import faulthandler, signal, sys
faulthandler.register(signal.SIGUSR2, file=int(sys.argv[1]))
def stand_still():
    print("ready", flush=True)
    while True:
        signal.pause()
stand_still()
"""


@pytest.fixture
def stacks():
    descriptor = os.memfd_create("stacks")
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def process(stacks):
    started = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(stacks)], stdout=subprocess.PIPE, text=True, pass_fds=[stacks]
    )
    assert started.stdout.readline() == "ready\n"
    yield started
    started.kill()
    started.wait()


def test_a_stopped_process_is_seen(process):
    assert not is_stopped(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    end = time.monotonic() + 10
    while not is_stopped(process.pid):
        assert time.monotonic() < end


def test_stacks_of_a_process_that_does_not_answer(process, stacks, tmp_path):
    force_stacks(process.pid, stacks)
    path = tmp_path / "new folder" / "stacks.txt"
    assert keep_stacks(stacks, path) == f"stacks in {path}"
    assert "in stand_still" in path.read_text()


def test_stacks_of_an_earlier_hang_stay(stacks, tmp_path):
    path = tmp_path / "stacks.txt"
    os.write(stacks, b"first")
    keep_stacks(stacks, path)
    for count in (2, 3):
        os.write(stacks, b", then another")
        assert keep_stacks(stacks, path) == f"stacks in {tmp_path}/stacks-{count}.txt"
    assert [found.read_text().count("another") for found in sorted(tmp_path.iterdir())] == [1, 2, 0]


def test_stacks_that_cannot_be_kept_are_no_error(stacks, tmp_path):
    assert keep_stacks(stacks, tmp_path / "stacks.txt") == "its stacks could not be written"
    os.write(stacks, b"Thread 1")
    (tmp_path / "file").touch()
    assert "could not be written to" in keep_stacks(stacks, tmp_path / "file" / "stacks.txt")


def test_a_process_that_has_gone_is_not_stopped():
    assert not is_stopped(2**22 + 1)
