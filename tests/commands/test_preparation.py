"""``helixpipe prepare``: tools/prepare_data.py from an installed package."""

from __future__ import annotations

import pytest

from helixpipe.__main__ import main
from helixpipe.commands import prepare_program


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """``prepare(*words)``: bytes of a small file; the exit code. Signals stay pytest's."""
    monkeypatch.setattr(prepare_program, "stop_on_signals", lambda: None)
    (tmp_path / "a.txt").write_text("hello")
    common = ["--input", str(tmp_path / "a.txt"), "--output-prefix", str(tmp_path / "set"), "--workers", "1"]
    return lambda *words: main(["prepare", *common, "--tokenizer", "byte", *words])


def test_a_dataset_is_written(prepare, tmp_path, capsys):
    assert prepare() == 0
    output, errors = capsys.readouterr()
    assert output.splitlines()[1].split() == ["tokens", "6"]
    assert errors == ""
    assert {path.name for path in tmp_path.glob("set.*")} == {"set.bin", "set.idx", "set.tokenizer.json"}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--vocab-size", "300"], "--vocab-size is for --tokenizer bpe: the byte vocabulary is 257"),
        (["--input-key", "x"], "unrecognized arguments: --input-key x; did you mean --input?"),
        (["--input", "/nowhere"], "/nowhere"),
    ],
)
def test_errors_are_one_line_with_the_commands_name(prepare, capsys, words, error):
    with pytest.raises(SystemExit) as stopped:
        prepare(*words)
    assert stopped.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("helixpipe prepare: error: ")
    assert error in line


def test_its_help_has_its_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--help"])
    assert not stopped.value.code
    assert "usage: helixpipe prepare [-h] --input PATH" in capsys.readouterr().out
