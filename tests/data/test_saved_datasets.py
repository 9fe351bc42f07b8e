"""Datasets of Hugging Face's library, saved to disk: the documents of the same rows in JSON lines."""

import json
import sys

import pytest

from helixpipe.data.prepare.formats import Format
from helixpipe.data.prepare.sources import Reading, find_sources, read_pieces, require_jsonl

ROWS = [
    {"text": f"row {i} " * (i % 7) + "é", "data": {"text": "in" * i}, "ask": f"q{i}?", "id": i}
    for i in range(1, 400)
]


@pytest.fixture
def library():
    return pytest.importorskip("datasets", reason="needs the extra hf")


def pieces(path, **reading):
    sources = find_sources([str(path)])
    return sources[0], list(read_pieces(sources, Reading(**reading), set()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "reading",
    [{"json_key": "text"}, {"json_key": "data.text"}, {"json_key": "text", "prompt_key": "ask", "limit": 9}],
    ids=str,
)
def test_rows_are_the_documents_of_json_lines(library, tmp_path, reading):
    """In the order of the dataset, which is not that of its files, whatever format it was saved with."""
    dataset = library.Dataset.from_list(ROWS).shuffle(seed=3).select(range(300))
    dataset.with_format("numpy").save_to_disk(str(tmp_path / "saved"), num_shards=3)
    lines = [json.dumps(row) + "\n" for row in dataset]
    assert lines != [json.dumps(row) + "\n" for row in ROWS[:300]]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    source, found = pieces(tmp_path / "saved", **reading)
    other, expected = pieces(tmp_path / "rows.jsonl", **reading)
    assert (source.format, other.format) == (Format.DATASET, Format.JSONL)
    without_bytes = [[piece._replace(input_bytes=0) for piece in given] for given in (found, expected)]
    assert without_bytes[0] == without_bytes[1]
    assert source.size - 2 <= sum(piece.input_bytes for piece in found) <= source.size
    require_jsonl([source])


@pytest.mark.slow
def test_what_is_not_there_is_named(library, tmp_path):
    saved = tmp_path / "saved"
    library.Dataset.from_list(ROWS).save_to_disk(str(saved), num_shards=2)
    with pytest.raises(ValueError, match=r"saved: has no column 'body' \(columns: 'text', 'data', 'ask', "):
        pieces(saved, json_key="body")
    with pytest.raises(ValueError, match=r"row 1: has no key 'data\.body'"):
        pieces(saved, json_key="data.body")
    second = saved / "data-00001-of-00002.arrow"
    second.write_bytes(second.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"saved: its files are damaged .*: save the dataset again"):
        pieces(saved, json_key="text")
    second.unlink()
    with pytest.raises(ValueError, match=r"saved: its files are damaged .*: save the dataset again"):
        pieces(saved, json_key="text")


def marked(folder):
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_folder_of_several_is_refused(tmp_path):
    marked(tmp_path / "train")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="holds datasets for several uses: give the folder of one"):
        find_sources([str(tmp_path)])
    assert find_sources([str(tmp_path / "train")])[0].format is Format.DATASET


def test_the_format_may_be_named(tmp_path):
    folder = marked(tmp_path / "saved")
    assert find_sources([str(folder)], wanted=Format.DATASET) == find_sources([str(folder)])
    with pytest.raises(ValueError, match="is a saved dataset: leave --format out"):
        find_sources([str(folder)], wanted=Format.TEXT)
    with pytest.raises(ValueError, match="--format dataset takes folders"):
        find_sources([str(folder / "state.json")], wanted=Format.DATASET)


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'needs datasets .*: pip install "helixpipe\[hf\]"$'):
        pieces(marked(tmp_path / "saved"), json_key="text")
