"""A corpus is looked at once: not by other ranks or later starts, but again when its files have changed."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helixpipe.data import corpus_record
from helixpipe.data.corpus_record import checked_corpus, known_corpus
from helixpipe.data.fingerprint import fingerprint
from helixpipe.data.index_file import hash_of_file
from helixpipe.data.prefix import check_token_ids, dataset_paths, describe_prefix, inspect_prefix
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "in.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(50)))
    prepare_dataset(PreparationOptions([str(folder / "in.jsonl")], str(folder / "set"), tokenizer="byte"))
    return folder / "set"


@pytest.fixture
def corpus(whole, tmp_path):
    for path in dataset_paths(whole):
        shutil.copy(path, tmp_path)
    return tmp_path / "set"


@pytest.fixture
def looks(monkeypatch):
    """How often all entries of an index were read."""
    seen = []
    check = corpus_record.check_index
    monkeypatch.setattr(corpus_record, "check_index", lambda index: seen.append(index.path) or check(index))
    return seen


def test_one_look_is_enough(corpus, tmp_path, looks):
    info = describe_prefix(corpus)
    first = checked_corpus(info, tmp_path / "cache")
    assert (first.index_hash, first.content) == (hash_of_file(f"{corpus}.idx"), fingerprint(info))
    assert checked_corpus(info, tmp_path / "cache") == known_corpus(info, tmp_path / "cache") == first
    assert len(looks) == 1
    # Another corpus of the same name, and the same one for another folder.
    checked_corpus(info, tmp_path / "other")
    assert len(looks) == 2


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".tokenizer.json"])
def test_what_has_changed_is_looked_at_again(corpus, tmp_path, looks, suffix):
    info = describe_prefix(corpus)
    checked_corpus(info, tmp_path)
    stat = os.stat(f"{corpus}{suffix}")
    os.utime(f"{corpus}{suffix}", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    checked_corpus(info, tmp_path)
    # A copy in its place, as old and as large as the file was.
    shutil.copy(f"{corpus}{suffix}", f"{corpus}.copy")
    os.utime(f"{corpus}.copy", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    os.replace(f"{corpus}.copy", f"{corpus}{suffix}")
    checked_corpus(info, tmp_path)
    checked_corpus(replace(info, vocab_size=info.vocab_size + 1), tmp_path)
    assert len(looks) == 4


DAMAGED = ["", "{", "[]", "7", '{"format": 1}', '{"format": 1, "files": 3}', "[" * 100_000, "\udcff"]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_is_made_anew(corpus, tmp_path, looks, content):
    info = describe_prefix(corpus)
    expected = checked_corpus(info, tmp_path / "cache")
    (record,) = (tmp_path / "cache").iterdir()
    record.write_bytes(os.fsencode(content))
    assert checked_corpus(info, tmp_path / "cache") == expected
    record.write_text(record.read_text().replace('"format": 1', '"format": 0'))
    assert checked_corpus(info, tmp_path / "cache") == expected
    assert len(looks) == 3


def test_a_damaged_corpus_leaves_no_record(corpus, tmp_path):
    info = describe_prefix(corpus)
    with open(f"{corpus}.idx", "r+b") as stream:
        stream.seek(34)
        stream.write(b"\xff\xff\xff\xff")
    for _ in range(2):
        with pytest.raises(ValueError, match="sequence 0 has a negative length"):
            checked_corpus(info, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_to_is_done_without(corpus, tmp_path, looks):
    info = describe_prefix(corpus)
    (tmp_path / "cache").write_text("a file in its place")
    expected = checked_corpus(info, tmp_path / "cache")
    assert checked_corpus(info, tmp_path / "cache") == known_corpus(info, tmp_path / "cache") == expected
    assert len(looks) == 2


def test_headers_tell_all_but_the_longest_document(corpus):
    found = inspect_prefix(corpus)
    assert describe_prefix(corpus) == replace(found, longest_document=None)


def test_of_a_large_corpus_blocks_are_read(corpus, monkeypatch):
    info = describe_prefix(corpus)
    tokens = np.memmap(f"{corpus}.bin", dtype="<u2", mode="r+")
    monkeypatch.setattr("helixpipe.data.prefix._TOKENS_PER_STEP", 4)
    monkeypatch.setattr("helixpipe.data.prefix._BYTES_READ_WHOLE", 8)
    tokens[6] = 999  # between the first two blocks of 4 among 64 in 640 tokens
    check_token_ids(corpus, info)
    tokens[12] = 999
    with pytest.raises(ValueError, match="token 12 has id 999"):
        check_token_ids(corpus, info)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="token 6 has id 999"):
        check_token_ids(corpus, info)


def test_other_ranks_read_less_than_a_megabyte_of_four_terabytes(tmp_path):
    command = [
        sys.executable,
        "benchmarks/data_startup.py",
        "--documents",
        "20000",
        "--folder",
        str(tmp_path),
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert finished.returncode == 0, finished.stderr
    rows = [line.rsplit(maxsplit=2) for line in finished.stdout.splitlines()[1:]]
    read = {name.strip(): int(count.replace(",", "")) for name, _, count in rows}
    assert read["any other rank"] < 1_000_000
    assert read["the same, again"] < 1_000_000
    assert read["first rank of a node"] > 100_000_000, "64 blocks, of which the others read none"
