"""What commands print on terminals of all kinds, and into pipes whose reader leaves."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helixpipe.__main__ import main
from helixpipe.commands.terminal import CLOSED_PIPE, prints, run_printing
from helixpipe.report.text import ASCII, UNICODE

ROOT = Path(__file__).parents[2]
FORWARD_MS = {"first": 1, "middle": 4, "last": 3, "attention": 8}
COSTS = {"segments": {name: {"F": f, "B": 2 * f} for name, f in FORWARD_MS.items()}, "p2p_ms": {"*": 1}}


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """Arguments that draw a plan of 32 micro batches in the terminal."""
    folder = tmp_path_factory.mktemp("drawing")
    plan, costs = folder / "plan.json", folder / "costs.json"
    sizes = "--num-layers 16 --pipeline-model-parallel-size 4 --num-microbatches 32".split()
    assert main(["plan", "--schedule", "helix", *sizes, "--output", str(plan)]) == 0
    costs.write_text(json.dumps(COSTS))
    return ["draw", "--plan", str(plan), "--costs", str(costs)]


def into_closed_pipe(*command):
    """Exit code and errors of a program whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        # Buffered, as it is unless somebody asks for something else.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
        done = subprocess.run(
            [sys.executable, *map(str, command)], stdout=writer, stderr=subprocess.PIPE, text=True,
            timeout=100, env=environment,
        )  # fmt: skip
    finally:
        os.close(writer)
    return done.returncode, done.stderr


def test_a_closed_pipe_is_the_end_without_a_word(drawing, tmp_path):
    assert into_closed_pipe("-m", "helixpipe", *drawing) == (CLOSED_PIPE, "")
    assert into_closed_pipe("-m", "helixpipe", "--help") == (CLOSED_PIPE, "")
    (tmp_path / "a.txt").write_text("hello")
    prepare = ["--input", tmp_path / "a.txt", "--tokenizer", "byte", "--workers", 1]
    prepare += ["--output-prefix", tmp_path / "set"]
    assert into_closed_pipe(ROOT / "tools" / "prepare_data.py", *prepare) == (CLOSED_PIPE, "")
    # The dataset is whole all the same.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.txt",
        "set.bin",
        "set.idx",
        "set.tokenizer.json",
    ]


@pytest.fixture
def terminal(monkeypatch):
    """``terminal(encoding, columns)`` takes the place of standard output; it returns what gives its text."""

    def make(encoding, columns=80):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        stream.isatty = lambda: True
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", str(columns))
        return lambda: stream.buffer.getvalue().decode(encoding)

    return make


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("columns", [1, 20, 80, 400])
def test_a_grid_on_any_terminal(drawing, terminal, encoding, columns):
    """What it says does not depend on the characters that the terminal knows."""
    printed = terminal(encoding, columns)
    assert main(drawing) == 0
    found = printed()
    is_unicode = encoding == "utf-8"
    expected = terminal("utf-8", columns)
    assert main(drawing) == 0
    if not is_unicode:
        assert found.isascii()
        assert "\\" not in found
    table = dict(zip(UNICODE.alphabets, ASCII.alphabets, strict=True)) | {"│": "|", "─": "-", "…": "..."}
    facts, newline, rows = "".join(table.get(c, c) for c in expected()).partition("\n")
    plain = facts.replace("·", "-") + newline + rows.replace("·", ".")
    assert (found if not is_unicode else plain) == plain


def test_alphabets_tell_roles_apart():
    for glyphs in (UNICODE, ASCII):
        assert len(set(glyphs.alphabets)) == len(glyphs.alphabets) == 50
        assert not set(glyphs.alphabets) & {glyphs.idle, glyphs.edge, glyphs.line}
    assert "".join(ASCII).isascii()


def test_characters_that_have_no_likeness_are_escaped(terminal):
    printed = terminal("ascii")
    assert not prints("é")
    assert run_printing(lambda: print("naïve → 3×4 … 日") or 0) == 0
    assert printed() == "na\\xefve -> 3x4 ... \\u65e5\n"


def test_no_number_is_cut_off_on_a_narrow_terminal(terminal):
    line = (
        "advise --model gpt-1.3b --hardware h20 --seq-length 4096 --pipeline-model-parallel-size 2 "
        "--num-microbatches 4"
    )
    narrow = terminal("ascii", 30)
    assert main(line.split()) == 0
    found = narrow()
    wide = terminal("ascii", 132)
    assert main(line.split()) == 0
    assert found.split() == wide().split()
    assert "..." not in found
