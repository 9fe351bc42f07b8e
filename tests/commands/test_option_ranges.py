"""Every option of every command, tool and benchmark: a generated table of bad values, and what borders mean.

An option that is added without a range, choices or a row of its own fails here.
"""

from __future__ import annotations

import argparse
import re
from functools import cache
from pathlib import Path

import pytest
from option_rows import check_bad_values, check_ranges, numbers_of, options_of, parts_of
from scripts import load_script

from helixpipe.__main__ import build_parser as build_command_parser
from helixpipe.__main__ import main
from helixpipe.commands.parser import Parser, ScriptParser
from helixpipe.commands.ranges import Whole
from helixpipe.data.prefix import DatasetInfo
from helixpipe.kernels.__main__ import build_parser as build_kernels_parser
from helixpipe.megatron_lm.options import build_parser as build_inner_parser
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.parser import build_parser as build_training_parser

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for room in ("benchmarks", "tools") for path in sorted((ROOT / room).glob("*.py"))]
# The other example needs transformers: tests/docs/test_context_extension.py has its rows.
SCRIPTS.append(ROOT / "examples" / "side_by_side.py")
MINIMAL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused"
).split()
DATASET = DatasetInfo(
    prefix="unused", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)


@cache
def parsers():
    """Every parser by the name that its errors begin with."""
    found = [build_training_parser(), build_inner_parser(), build_kernels_parser(), build_command_parser()]
    found += [load_script(script).build_parser() for script in SCRIPTS]
    return {parser.prog: parser for whole in found for parser in parts_of(whole)}


def test_every_script_has_its_parser():
    assert len(SCRIPTS) >= 10
    names = {parser.prog for parser in parsers().values()}
    assert {"pretrain_gpt.py", "prepare_data", "benchmark_schedules", "helixpipe plan"} <= names
    for parser in parsers().values():
        assert isinstance(parser, Parser)
    assert all(isinstance(load_script(script).build_parser(), ScriptParser) for script in SCRIPTS[:2])


def test_no_parser_is_forgotten():
    """Whoever makes one is a script above, or has its parser among those above."""
    makers = {
        str(path.relative_to(ROOT))
        for room in ("helixpipe", "megatron", "benchmarks", "tools", "examples")
        for path in (ROOT / room).rglob("*.py")
        if re.search(r"\b(Script|Argument)?Parser\(", path.read_text(encoding="utf-8"))
    }
    known = {str(path.relative_to(ROOT)) for path in SCRIPTS} | {
        "examples/long_context.py", "helixpipe/__main__.py", "helixpipe/commands/parser.py",
        "helixpipe/commands/prepare_program.py", "helixpipe/kernels/__main__.py",
        "helixpipe/megatron_lm/options.py", "megatron/pretrain/settings/parser.py",
        # Of options that are among those of the one above.
        "megatron/pretrain/settings/experts.py",
    }  # fmt: skip
    assert makers <= known


@pytest.mark.parametrize("program", parsers())
def test_every_number_declares_its_range(program):
    """Python's own types take NaN, infinity, 1_0 and 10^400: use helixpipe.commands.ranges."""
    check_ranges(parsers()[program])


@pytest.mark.parametrize("program", parsers())
def test_bad_values_are_refused_in_one_line(program, capsys):
    check_bad_values(parsers()[program], capsys)


@pytest.mark.parametrize("program", parsers())
def test_borders_are_taken_as_they_are(program):
    for action in numbers_of(parsers()[program]):
        kind = action.type
        if isinstance(kind, Whole):
            assert kind(str(kind.least)) == kind.least
            assert kind(str(kind.most)) == kind.most
            assert kind.word is None or kind(kind.word) == kind.word
        else:
            for limit in (kind.least, kind.most):
                assert limit is None or kind(repr(limit)) == limit
            inner = 1.0 if kind.above is None else kind.above + 1e-6
            assert kind.below is None or kind(repr(min(inner, kind.below / 2))) < kind.below


def worded(program):
    """Flags whose ``metavar`` shows choices that the registry of schedules checks, with the nearest name."""
    return [
        action.option_strings[0]
        for action in options_of(parsers()[program])
        if str(action.metavar).startswith("{") and action.choices is None and not action.type
    ]


def test_words_with_a_check_of_their_own(tmp_path, capsys):
    assert {name for name in parsers() if worded(name)} == {"helixpipe plan", "pretrain_gpt.py"}
    for flag in worded("pretrain_gpt.py"):
        schedule = [] if flag == "--pipeline-schedule" else ["--pipeline-schedule", "helix"]
        with pytest.raises(ValueError, match="'no-such'") as caught:
            parse_arguments([*MINIMAL, *schedule, flag, "no-such"], DATASET)
        assert "\n" not in str(caught.value)
    sizes = "--num-layers 2 --pipeline-model-parallel-size 2 --num-microbatches 4".split()
    for flag in worded("helixpipe plan"):
        output = ["--output", str(tmp_path / "plan.json")]
        assert main(["plan", "--schedule", "helix", *sizes, *output, flag, "no-such"]) == 2
        assert "'no-such'" in capsys.readouterr().err
    train = ["train", "--dry-run", "no-such", "--nproc-per-node", "1", "--vocab-size", "300"]
    assert main([*train, *MINIMAL]) == 2
    assert "'no-such'" in capsys.readouterr().err


# Set from other options in some layouts, which is no other meaning of them.
DERIVED = {"num_query_groups"}


def border_values(kind):
    if isinstance(kind, Whole):
        return (kind.least, kind.least + 1, 7, 4096, kind.most)
    limits = (kind.least, kind.most, kind.above and kind.above * 2, 1e-9, 0.05, 0.5, 0.999, 50.0, 1e300)
    return [value for value in limits if value is not None]


@pytest.mark.parametrize("extra", ["", "--position-embedding-type rope"])
def test_training_takes_a_value_as_it_is_or_refuses_it(monkeypatch, extra):
    """No number within its range means another one in silence, and none ends in a traceback."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    for action in numbers_of(build_training_parser()):
        flag = action.option_strings[0]
        for value in border_values(action.type):
            try:
                taken = action.type(repr(value))
            except argparse.ArgumentTypeError:
                continue
            message = ""
            try:
                settings = parse_arguments([*MINIMAL, *extra.split(), f"{flag}={value!r}"], DATASET)
                assert action.dest in DERIVED or settings.options[action.dest] == taken
            except ValueError as error:
                message = str(error) or "nothing\n"
            assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "channels"),
    [("--rotary-percent 0.05", 0), ("--rotary-percent 0.2", 3), ("--kv-channels 7", 7)],
)
def test_rotary_channels_are_pairs(arguments, channels):
    rope = [*MINIMAL, "--position-embedding-type", "rope"]
    with pytest.raises(ValueError, match=rf"leaves {channels} channels to rotate.*; use [0-9.]+$") as caught:
        parse_arguments([*rope, *arguments.split()], DATASET)
    remedy = str(caught.value).rpartition(" ")[2]
    kept = [word for word in arguments.split() if "7" in word or "kv" in word]
    parse_arguments([*rope, *kept, "--rotary-percent", remedy], DATASET)


@pytest.mark.parametrize(
    "arguments",
    ["--rotary-percent 0.5", "--rotary-base 500000", "--rotary-seq-len-interpolation-factor 2"],
)
def test_rotary_options_need_rotary_positions(arguments):
    with pytest.raises(ValueError, match="needs --position-embedding-type rope"):
        parse_arguments([*MINIMAL, *arguments.split()], DATASET)
    parse_arguments([*MINIMAL, "--position-embedding-type", "rope", *arguments.split()], DATASET)


def test_a_single_iteration_has_percentiles():
    schedules = load_script(ROOT / "benchmarks" / "schedules.py")
    assert schedules._fifths([3.0]) == (3.0, 3.0)
    assert schedules._fifths([1.0, 2.0, 3.0, 4.0]) == pytest.approx((1.0, 4.0))
