"""Parquet as input: the documents of the same rows in JSON lines, and what is refused."""

import json
import sys

import pytest

from helixpipe.data.prepare.formats import Format, inspect_file
from helixpipe.data.prepare.sources import Reading, find_sources, read_pieces, require_jsonl

ROWS = [
    {"text": f"row {i} " * (i % 7) + "é", "data": {"text": "in" * i}, "ask": f"q{i}?"} for i in range(1, 600)
]


@pytest.fixture
def files(tmp_path):
    """The same rows as Parquet, in several groups, and as JSON lines."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hf")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=100)
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return tmp_path


def pieces(path, **reading):
    sources = find_sources([str(path)])
    return sources[0], list(read_pieces(sources, Reading(**reading), set()))


@pytest.mark.parametrize(
    "reading",
    [{"json_key": "text"}, {"json_key": "data.text"}, {"json_key": "text", "prompt_key": "ask", "limit": 9}],
    ids=str,
)
def test_rows_are_the_documents_of_json_lines(files, reading):
    source, found = pieces(files / "rows.parquet", **reading)
    other, expected = pieces(files / "rows.jsonl", **reading)
    assert (source.format, other.format) == (Format.PARQUET, Format.JSONL)
    without_bytes = [[piece._replace(input_bytes=0) for piece in given] for given in (found, expected)]
    assert without_bytes[0] == without_bytes[1]
    assert source.size - 2 <= sum(piece.input_bytes for piece in found) <= source.size
    require_jsonl([source])


def test_what_is_not_there_is_named(files):
    with pytest.raises(ValueError, match=r"has no column 'body' \(columns: 'text', 'data', 'ask'\): set"):
        pieces(files / "rows.parquet", json_key="body")
    with pytest.raises(ValueError, match=r"row 1: has no key 'data\.body'"):
        pieces(files / "rows.parquet", json_key="data.body")
    damaged = files / "rows.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"its Parquet data are damaged .*: copy the file again"):
        pieces(damaged, json_key="text")


def test_the_format_is_found_and_may_be_named(tmp_path):
    parquet, text = tmp_path / "a", tmp_path / "b"
    parquet.write_bytes(b"PAR1 and more")
    text.write_text("PAR2")
    assert inspect_file(str(parquet)) == inspect_file(str(parquet), Format.PARQUET) == (Format.PARQUET, "")
    with pytest.raises(ValueError, match="is Parquet: leave --format out"):
        inspect_file(str(parquet), Format.TEXT)
    with pytest.raises(ValueError, match="is no Parquet: leave --format out"):
        inspect_file(str(text), Format.PARQUET)


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(ValueError, match=r'needs pyarrow .*: pip install "helixpipe\[hf\]"$'):
        pieces(tmp_path / "a.parquet", json_key="text")
