"""Every option of every command, tool and benchmark: a generated table of bad values, and what borders mean.

An option that is added without a range, choices or a row of its own fails here.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import pytest
from scripts import load_script

from helixpipe.__main__ import build_parser as build_command_parser
from helixpipe.__main__ import main
from helixpipe.commands.parser import Parser, ScriptParser, UsageError
from helixpipe.commands.ranges import Real, Whole
from helixpipe.data.prefix import DatasetInfo
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.parser import build_parser as build_training_parser

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
MINIMAL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused"
).split()
DATASET = DatasetInfo(
    prefix="unused", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)
# No number in any of the forms that an option takes; Python's int and float take some of them.
NO_NUMBERS = (
    "", " ", "nine", "1 2", "0x10", "1_0", "1,000", "nan", "-nan", "inf", "-inf", "1e999", "-1e999",
    "--", "+", "١٢", "½", "9" * 5000, "1" + "0" * 400,
)  # fmt: skip
NO_WHOLE_NUMBERS = ("1.5", "1.0", "1e3", " 4", "4 ")


@cache
def parsers():
    """Every parser by the name that its errors begin with."""
    found = [build_training_parser(), *(load_script(script).build_parser() for script in SCRIPTS)]
    (commands,) = (a for a in build_command_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {parser.prog: parser for parser in [*found, *commands.choices.values()]}


def options_of(parser):
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def numbers_of(parser):
    return [action for action in options_of(parser) if isinstance(action.type, (Whole, Real))]


def bad_numbers(kind):
    yield from NO_NUMBERS
    if isinstance(kind, Whole):
        yield from NO_WHOLE_NUMBERS
        yield from (str(kind.least - 1), str(kind.most + 1), "-1" if kind.least >= 0 else str(kind.least - 9))
        return
    for limit, step in (
        (kind.least, -1),
        (kind.above, 0),
        (kind.above, -1),
        (kind.below, 0),
        (kind.below, 1),
    ):
        if limit is not None:
            yield repr(limit + step)
    if kind.most is not None:
        yield repr(kind.most * 1.001)


def rows(action):
    """Words of the command line that misuse one option."""
    if not action.option_strings:
        return [[]]  # left out
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [[f"{flag}=yes"]]
    found = [] if action.nargs == "?" else [[flag]]  # without its value
    if isinstance(action.type, (Whole, Real)):
        found += [[f"{flag}={value}"] for value in bad_numbers(action.type)]
    elif action.choices is not None:
        found += [[f"{flag}={value}"] for value in ("", "no-such", "1")]
    elif action.type not in (None, Path):
        found += [[f"{flag}={value}"] for value in NO_NUMBERS]
    return found


def refusal(parser, words, capsys):
    """The one line with which a parser ends."""
    if isinstance(parser, ScriptParser):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(words)
        output = capsys.readouterr()
        assert (stop.value.code, output.out) == (2, "")
        return output.err.removesuffix("\n")
    with pytest.raises(UsageError) as caught:
        parser.parse_args(words)
    return f"{caught.value.program}: error: {caught.value}"


def test_every_script_has_its_parser():
    assert len(SCRIPTS) >= 10
    names = {parser.prog for parser in parsers().values()}
    assert {"pretrain_gpt.py", "prepare_data", "benchmark_schedules", "helixpipe plan"} <= names
    for parser in parsers().values():
        assert isinstance(parser, Parser)
    assert all(isinstance(load_script(script).build_parser(), ScriptParser) for script in SCRIPTS[:2])


@pytest.mark.parametrize("program", parsers())
def test_every_number_declares_its_range(program):
    """Python's own types take NaN, infinity, 1_0 and 10^400: use helixpipe.commands.ranges."""
    parser = parsers()[program]
    bare = [action.option_strings[0] for action in options_of(parser) if action.type in (int, float, complex)]
    assert bare == []
    for action in numbers_of(parser):
        default = action.default
        for value in default if isinstance(default, list) else [default]:
            assert value is None or action.type(str(value)) == value, f"{action.dest} has no valid default"


@pytest.mark.parametrize("program", parsers())
def test_bad_values_are_refused_in_one_line(program, capsys):
    parser = parsers()[program]
    for action in options_of(parser):
        for words in rows(action):
            line = refusal(parser, words, capsys)
            assert line.count("\n") == 0
            assert line.startswith(f"{program}: error: ")
            name = action.option_strings[0] if action.option_strings else action.metavar
            assert name in line
            assert len(line) < 400


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
