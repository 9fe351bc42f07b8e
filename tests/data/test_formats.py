"""What is found in input files by looking into them, whatever they are called."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from helixpipe.data.prefix import dataset_paths
from helixpipe.data.prepare import formats, sources
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.data.prepare.formats import Format, inspect_file

LINES = b'{"text": "ships"}\n{"text": "trains"}\n'
TEXT = "Schiffe und Züge\n".encode()
COMPRESS = {"": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
NAMES = (
    "a",
    "a.txt",
    "a.ndjson",
    "a.jsonl",
    "a.json",
    "a.log.1",
    "a.gz",
    "a.jsonl.xz",
    "a.txt.bz2",
    "a.dat",
    "README",
)


def documents(path, output, **options):
    """The documents of a dataset made from one file, by the byte tokenizer."""
    summary = prepare_dataset(
        PreparationOptions([str(path)], str(output), tokenizer="byte", overwrite=True, **options)
    )
    ids = np.fromfile(dataset_paths(output).bin, dtype="<u2")
    ends = np.flatnonzero(ids == 256)
    parts = np.split(ids, ends + 1)[:-1]
    return [bytes(part[:-1].astype(np.uint8)) for part in parts], summary


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", NAMES)
def test_json_lines_under_any_name(tmp_path, name, compression):
    path = tmp_path / name
    for content in (LINES, b"\xef\xbb\xbf" + LINES, b"\n \n" + LINES):
        path.write_bytes(COMPRESS[compression](content))
        assert inspect_file(str(path)) == (Format.JSONL, compression)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    "content", [TEXT, b"", b"{\n  'not': json }\n", b"[1, 2]\n", b"1\n2\n", b'"text"\n', b"{", b"\n"]
)
def test_text_under_any_name_but_those_of_json(tmp_path, content, compression):
    for name in NAMES:
        path = tmp_path / name
        path.write_bytes(COMPRESS[compression](content))
        is_named_json = name.removesuffix(".xz").endswith((".json", ".jsonl", ".ndjson"))
        assert inspect_file(str(path)).format is (Format.JSONL if is_named_json else Format.TEXT)


@pytest.mark.parametrize("compression", COMPRESS)
def test_documents_do_not_depend_on_name_and_compression(tmp_path, compression):
    path = tmp_path / "corpus.0001"
    path.write_bytes(COMPRESS[compression](LINES))
    found, summary = documents(path, tmp_path / "set")
    assert found == [b"ships", b"trains"]
    assert (summary.formats, summary.compressed_files) == ({Format.JSONL: 1}, int(bool(compression)))
    path.write_bytes(COMPRESS[compression](TEXT * 100_000))
    found, summary = documents(path, tmp_path / "set")
    assert found == [TEXT * 100_000]
    assert summary.formats == {Format.TEXT: 1}
    assert summary.input_bytes == path.stat().st_size


def test_a_format_can_be_given(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    assert documents(path, tmp_path / "set", format=Format.TEXT)[0] == [LINES]
    path = tmp_path / "b"
    path.write_bytes(TEXT)
    with pytest.raises(ValueError, match=r"b:1: invalid JSON .*--format text takes it as one document"):
        documents(path, tmp_path / "set", format=Format.JSONL)


def archive(kind):
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as files:
            files.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=stream, mode="w") as files:
            entry = tarfile.TarInfo("a.txt")
            entry.size = 4
            files.addfile(entry, io.BytesIO(b"text"))
    return stream.getvalue()


CHANCE = random.Random(1)
BINARY = {
    "random": (CHANCE.randbytes(5000), "is a binary file"),
    "random without zeros": (CHANCE.randbytes(5000).replace(b"\0", b"\x01"), "file|is no UTF-8 text"),
    "another code": (("ПриветМир" * 90).encode("koi8-r"), "is no UTF-8 text, 809 of 810 characters"),
    "utf-16": ("text".encode("utf-16"), "is UTF-16 text: convert it to UTF-8"),
    "utf-16 without a mark": ("text".encode("utf-16-le"), "is a binary file"),
    "program": (b"\x7fELF" + bytes(64) + b"text" * 1000, "is a binary file"),
    "floats": (struct.pack("<100f", *range(100)), "is a binary file"),
    "control": (b"\x01\x02a" * 100, "is a binary file"),
    "zip": (archive("zip"), "is a zip archive"),
    "tar": (archive("tar"), "is a tar archive"),
    "arrow": (b"ARROW1" + TEXT * 9, "is Arrow: convert it to Parquet"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + TEXT, "is Zstandard data: decompress it first"),
    "twice": (gzip.compress(bz2.compress(TEXT)), "is compressed twice"),
    "tar.gz": (gzip.compress(archive("tar")), "is a tar archive"),
    "truncated gzip": (gzip.compress(TEXT * 9)[:-9], "its gzip data are damaged"),
    "wrong checksum": (gzip.compress(TEXT)[:-8] + bytes(8), "its gzip data are damaged"),
    "truncated bzip2": (bz2.compress(TEXT * 9)[:-9], "its bzip2 data are damaged"),
    "truncated xz": (lzma.compress(TEXT * 9)[:-9], "its xz data are damaged"),
    "no gzip at all": (b"\x1f\x8b" + TEXT, "its gzip data are damaged"),
    "no bzip2 at all": (b"BZh" + TEXT, "its bzip2 data are damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BINARY)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
def test_what_is_no_text_is_refused_with_its_name(tmp_path, case, name):
    content, expected = BINARY[case]
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(content)
    (tmp_path / "in" / "b.txt").write_bytes(TEXT)
    with pytest.raises(ValueError, match=expected) as caught:
        documents(tmp_path / "in", tmp_path / "set")
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


def test_damage_beyond_the_head_is_found(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT * 5000 + b"\xe9" * 100_000)
    with pytest.raises(ValueError, match=r"a\.txt: is no UTF-8 text, 100000 of 185000 characters"):
        documents(path, tmp_path / "set")
    path.write_bytes(TEXT * 50_000 + b"\xe9\n" * 100 + "\ufffd".encode() * 7)
    _, summary = documents(path, tmp_path / "set")
    assert summary.undecodable_files == (str(path),)


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_blocks_may_end_in_a_character(tmp_path, monkeypatch, block):
    text = "é\ufffd日本🙂x" * 5
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "_BLOCK_BYTES", block)
    found, summary = documents(path, tmp_path / "set")
    assert found == [text.encode()]
    assert summary.undecodable_files == ()


def test_a_line_has_a_longest_length(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * (1 << 20)}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: is longer than 1 MiB: give it as a text file"):
        documents(path, tmp_path / "set")


def test_a_mixture_in_one_file_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(LINES + b"and some text\n")
    with pytest.raises(ValueError, match=r"a\.txt:3: invalid JSON .*--format text"):
        documents(path, tmp_path / "set")


def test_thresholds_are_stated():
    assert formats.MOST_DAMAGE == 0.3
    assert formats.LONGEST_LINE == 256 << 20
