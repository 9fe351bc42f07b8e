"""Files that are hashed while they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.pretrain.checkpoint import shards
from megatron.pretrain.checkpoint.files import digest
from megatron.pretrain.checkpoint.shards import HashingFile, describe

_FULL = Path("/dev/full")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 5_000_001])
def test_the_hash_is_the_files(tmp_path, size):
    content = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
    with HashingFile(tmp_path / "x") as stream:
        for start in range(0, size, 700_001):
            assert stream.tell() == start
            stream.write(memoryview(content)[start : start + 700_001])
    assert (tmp_path / "x").read_bytes() == content
    assert stream.digest == digest(tmp_path / "x")


def test_torch_reads_what_was_saved_through_it(tmp_path):
    tensor = torch.randn(1000, 300)
    with shards._without_torch_checksums(), HashingFile(tmp_path / "x") as stream:
        torch.save(tensor, stream)
    assert torch.equal(torch.load(tmp_path / "x", weights_only=True), tensor)
    assert torch.serialization.get_crc32_options()


@pytest.mark.parametrize("size", [10, 5_000_001])
def test_a_full_disk_is_named(size):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"), HashingFile(_FULL) as stream:
        torch.save(torch.zeros(size), stream)


def test_a_file_that_does_not_hold_what_was_written_is_noticed(tmp_path):
    (tmp_path / "x").write_bytes(bytes(10))
    stream = HashingFile(tmp_path / "x")
    stream._position = 3_000_000
    stream._has_ended.set()
    stream._follow()
    assert "10 of 3000000 bytes can be read back" in str(stream._error)


def test_an_error_of_the_caller_stays_what_it_is(tmp_path):
    with pytest.raises(TypeError), HashingFile(tmp_path / "x") as stream:
        stream.write("no bytes")


def test_errors_in_one_line():
    assert describe(RuntimeError("first\nsecond")) == "first"
    assert describe(KeyError()) == "KeyError"
