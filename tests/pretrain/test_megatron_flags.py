"""The table of Megatron's flags: complete, without contradictions, and followed by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from unpack_cores import VERSIONS

from helixpipe.data.prefix import DatasetInfo
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.megatron_command_line import note_of, translate
from megatron.pretrain.settings.megatron_flags import ALIASES, NEEDLESS, REFUSED, SUPPORTED
from megatron.pretrain.settings.parser import build_parser

ROOT = Path(__file__).parents[2]
CORES = Path(os.environ.get("HELIXPIPE_CORES", ROOT / "build/cores"))
# Prints Megatron's flags, each with how many values it takes.
FLAGS_OF_CORE = """
import argparse, json
from megatron.training.arguments import add_megatron_arguments
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
print(json.dumps({word[2:]: action.nargs for action in parser._actions for word in action.option_strings
                  if word.startswith("--") and word != "--help"}))
"""

NEEDLESS_WORDS = [word for words in NEEDLESS.values() for word in words.split()]
REFUSED_NAMES = [name for names in REFUSED.values() for name in names.split()]


def flags_of_core(version):
    paths = (CORES / version, ROOT / "tests/support/cores")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", FLAGS_OF_CORE]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def values_of_needless(word):
    """As argparse says it: 0 for none, None for one."""
    _, equals, values = word.partition("=")
    return 0 if not equals else "+" if values == "+" else None


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_flag_of_a_release_is_in_the_table(version):
    if not (CORES / version).is_dir():
        pytest.skip(f"no megatron-core {version} is unpacked in {CORES}")
    theirs = flags_of_core(version)
    assert len(theirs) > 700
    needless = {word.partition("=")[0]: values_of_needless(word) for word in NEEDLESS_WORDS}
    assert theirs.keys() - {*SUPPORTED, *ALIASES, *needless, *REFUSED_NAMES} == set()
    wrong = {
        name: (theirs[name], values)
        for name, values in needless.items()
        if name in theirs and theirs[name] != values and not (values == "+" and theirs[name] in ("*", None))
    }
    assert wrong == {}


def test_each_flag_has_one_place():
    anything = [w.partition("=")[0] for w in NEEDLESS_WORDS if w.partition("=")[2] in ("", "+")]
    only_some = [w.partition("=")[0] for w in NEEDLESS_WORDS if w.partition("=")[2] not in ("", "+")]
    names = [*SUPPORTED, *ALIASES, *anything, *REFUSED_NAMES]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
    # Other values of these are refused.
    assert set(only_some) <= set(REFUSED_NAMES)


def test_what_is_supported_is_an_option():
    options = {word[2:] for action in build_parser()._actions for word in action.option_strings}
    assert options >= SUPPORTED
    assert options.isdisjoint([*ALIASES, *REFUSED_NAMES, *(w.partition("=")[0] for w in NEEDLESS_WORDS)])
    for words in ALIASES.values():
        assert words[0][2:] in options


@pytest.mark.parametrize(
    ("line", "words", "needless"),
    [
        ("--use-mcore-models --lr 1", "--lr 1", ("--use-mcore-models",)),
        ("--distributed-backend nccl --lr 1", "--lr 1", ("--distributed-backend",)),
        ("--distributed-backend=gloo --lr=1", "--lr=1", ("--distributed-backend",)),
        ("--cp-comm-type p2p a2a --lr 1", "--lr 1", ("--cp-comm-type",)),
        ("--ckpt-format torch_dist", "", ("--ckpt-format",)),
        ("--ckpt-format torch", "", ("--ckpt-format torch (they are saved as torch_dist)",)),
        ("--hierarchical-context-parallel-sizes 2 2", "", ("--hierarchical-context-parallel-sizes",)),
        ("--use-rotary-position-embeddings", "--position-embedding-type rope", ()),
        ("--check-weight-hash-across-dp-replicas-interval 10", "--check-gradients-every 10", ()),
        ("--no-such-flag 3", "--no-such-flag 3", ()),
    ],
)
def test_a_command_line_is_translated(line, words, needless):
    translated = translate(line.split())
    assert (translated.words, translated.needless) == (words.split(), needless)
    assert all(flag in note_of(translated.needless) for flag in needless)
    assert bool(note_of(translated.needless)) == bool(needless)


SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused"
)
DATASET = DatasetInfo(
    prefix="unused", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)


@pytest.mark.parametrize(
    ("line", "note"),
    [
        (
            "",
            "not given, and another default than Megatron's: --attention-dropout 0 (0.1 in Megatron), "
            "--hidden-dropout 0 (0.1 in Megatron), --eval-iters 0 (100 in Megatron)",
        ),
        (
            "--attention-dropout 0 --hidden-dropout=0.1",
            "not given, and another default than Megatron's: --eval-iters 0 (100 in Megatron)",
        ),
        ("--attention-dropout 0 --hidden-dropout 0 --eval-iters 0", ""),
        (
            "--use-mcore-models --hidden-dropout 0 --ckpt-format torch_dist",
            "not given, and as in Megatron, whose command line has --use-mcore-models: "
            "--attention-dropout 0.1, --eval-iters 100",
        ),
        ("--use-mcore-models --attention-dropout 0 --hidden-dropout 0 --eval-iters 0", ""),
    ],
)
def test_other_defaults_than_megatrons_are_told(monkeypatch, line, note):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parse_arguments(f"{SIZES} {line}".split(), DATASET).other_defaults == note


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", (0.0, 0.0, 0)),
        ("--use-mcore-models", (0.1, 0.1, 100)),
        ("--use-rotary-position-embeddings", (0.1, 0.1, 100)),
        ("--sequence-parallel", (0.0, 0.0, 0)),
        ("--distributed-backend nccl --hidden-dropout 0 --eval-iters=5", (0.1, 0.0, 5)),
        ("--hidden-dropout 0.2 --use-mcore-models --pipeline-schedule helix", (0.1, 0.2, 100)),
    ],
)
def test_what_a_line_of_megatrons_leaves_out_is_as_there(monkeypatch, line, values):
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = parse_arguments(f"{SIZES} --num-layers 2 {line}".split(), DATASET)
    model = settings.model
    assert (model.attention_dropout, model.hidden_dropout, settings.training.eval_iters) == values
    # What ranks and checkpoints are compared by.
    assert (settings.options["attention_dropout"], settings.options["hidden_dropout"]) == values[:2]


@pytest.mark.parametrize("line", ["--pipeline-schedule seq1f1b", "--context-parallel-size 2"])
def test_a_default_of_megatrons_that_cannot_be_is_demanded(monkeypatch, line):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"--attention-dropout .*does not go with .*; use --attention-drop"):
        parse_arguments(f"{SIZES} --use-mcore-models {line}".split(), DATASET)


def test_one_tensor_rank_has_the_sequence_to_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = parse_arguments(f"{SIZES} --sequence-parallel --use-mcore-models".split(), DATASET)
    assert not settings.parallel.sequence_parallel
    assert settings.needless_flags.endswith("here: --use-mcore-models, --sequence-parallel")


def test_what_megatron_chooses_by_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = f"{SIZES} --pipeline-model-parallel-size 2"
    assert parse_arguments(line.split(), DATASET).schedule.name == "1f1b"
    more = "--num-layers-per-virtual-pipeline-stage 1 --vocab-file vocab.json --merge-file merges.txt"
    settings = parse_arguments(f"{line} {more}".split(), DATASET, makes_folders=False)
    assert settings.schedule.name == "interleaved"
    assert settings.options["tokenizer_type"] == "GPT2BPETokenizer"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--fp8-format hybrid", "--fp8-format hybrid: .*use --bf16"),
        ("--hybrid-context-parallel", "--hybrid-context-parallel: .*use --context-parallel-size"),
        ("--ckpt-format=torch_dcp", "--ckpt-format torch_dcp: "),
        ("--ckpt-format torch_dcp", "--ckpt-format torch_dcp: .*torch_dist"),
        ("--use-mup", "--use-mup: mup is not built here; train with python -m helixpipe.megatron_lm"),
        ("--use-mcore-models yes", "takes no value, and 'yes'"),
        ("--use-mcore-models=yes", "takes no value, and 'yes'"),
        ("--distributed-backend", "--distributed-backend takes a value"),
        ("--timing-log-option max 3", "--timing-log-option takes one value; it has 2"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(line, message):
    with pytest.raises(ValueError, match=message) as caught:
        translate(line.split())
    assert "\n" not in str(caught.value)


def test_every_refusal_says_what_to_use():
    for reason in REFUSED:
        assert len(reason) < 120
        assert any(word in reason for word in ("; use ", "; remove", "; train", "; serve", "; see", "; give",
                                               "; scale", "; prepare"))  # fmt: skip
    for name in REFUSED_NAMES:
        with pytest.raises(ValueError, match=f"^--{name} other: "):
            translate([f"--{name}", "other"])
