"""The example of a longer context: its helper on a tiny text, and, slow, all of it on a few iterations."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

import torch
from jobs import run_example
from option_rows import check_bad_values, check_ranges, parts_of
from safetensors.torch import load_file
from scripts import load_script
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megatron.pretrain.hf.config import read_config
from megatron.pretrain.hf.families import describe_model

ROOT = Path(__file__).parents[2]
WORDS = 40
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def helper():
    return load_script(ROOT / "examples" / "long_context.py")


@pytest.fixture
def folder(helper, tmp_path):
    """A model of 8 tokens, its copy with YaRN for 16, and a text: word n of file f is f + n."""
    vocabulary = {helper.END_TOKEN: 0} | {f"w{number}": number for number in range(1, WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=helper.END_TOKEN))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    helper.make(tmp_path / "tokenizer.json", 8, tmp_path / "plain")
    helper.stretch(tmp_path / "plain", 2.0, tmp_path / "yarn")
    (tmp_path / "text").mkdir()
    for file, length in ((1, 35), (2, 16), (3, 17), (4, 1)):
        text = " ".join(f"w{(file + n) % (WORDS - 1) + 1}" for n in range(length))
        (tmp_path / "text" / f"{file}.py").write_text(text)
    return tmp_path


def test_bad_options_are_refused_in_one_line(helper, capsys):
    for parser in parts_of(helper.build_parser()):
        check_ranges(parser)
        check_bad_values(parser, capsys)


def test_loss_by_position_is_the_mean_over_sequences(helper):
    torch.manual_seed(0)
    table = torch.randn(WORDS, WORDS)
    tokens = torch.randint(WORDS, (helper.BATCH + 3, 6))
    found = helper.loss_by_position(lambda batch: SimpleNamespace(logits=table[batch]), tokens)
    expected = [
        sum(-table[row[at]].log_softmax(0)[row[at + 1]].double() for row in tokens) / len(tokens)
        for at in range(5)
    ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0)


def test_bins_tell_their_middle_and_mean(helper):
    size = helper.BIN
    curve = torch.arange(size + 3, dtype=torch.float64)
    assert list(helper.binned(curve)) == [((size - 1) / 2, (size - 1) / 2), (size + 1, size + 1)]


def test_windows_lie_within_files_and_spread_over_the_text(helper, folder):
    found = helper.windows(folder / "plain", folder / "text", 17, 3)
    start = torch.tensor([1, 18, 3])
    assert torch.equal(found, (start[:, None] + torch.arange(17)) % (WORDS - 1) + 1)
    # Eight windows of 8: the first, and the fifth, with which the second file begins.
    assert helper.windows(folder / "plain", folder / "text", 8, 2)[:, 0].tolist() == [2, 3]
    with pytest.raises(ValueError, match="has 3 windows of 17 tokens; ask for no more"):
        helper.windows(folder / "plain", folder / "text", 17, 4)


def test_the_copy_is_imported_with_yarn_and_only_plain_positions_are_stretched(helper, folder):
    options = describe_model(read_config(folder / "yarn")).arguments
    names = ("rotary_scaling_factor", "yarn_original_max_position_embeddings", "max_position_embeddings")
    assert options["position_embedding_type"] == "yarn"
    assert [options[name] for name in names] == [2.0, 8, 16]
    assert describe_model(read_config(folder / "plain")).arguments["position_embedding_type"] == "rope"
    with pytest.raises(ValueError, match="has yarn positions; give a model of plain RoPE"):
        helper.stretch(folder / "yarn", 2.0, folder / "again")
    assert not (folder / "again").exists()


@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_a_configuration_keeps_its_form_and_its_base(older, helper, folder):
    """The second form is that of transformers 4."""
    path = folder / "plain" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    if older:
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    path.write_text(json.dumps(config))
    helper.stretch(folder / "plain", 2.0, folder / "copy")
    assert json.loads((folder / "copy" / "config.json").read_text()).keys() == config.keys()
    found, default = (describe_model(read_config(folder / name)).arguments for name in ("copy", "yarn"))
    assert found == default | {"rotary_base": 5000}


def test_losses_are_drawn_and_told_and_a_text_goes_on(helper, folder, capsys):
    picture = folder / "losses.png"
    models = [folder / "plain", folder / "yarn"]
    helper.losses(models, folder / "text", 16, 3, picture)
    assert picture.read_bytes().startswith(PNG)
    curves = json.loads(picture.with_suffix(".json").read_text())
    assert list(curves) == ["plain", "yarn"]
    assert {len(curve) for curve in curves.values()} == {16}
    assert curves["plain"] != curves["yarn"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "mean loss at positions 0 to 7 8 to 15".split()
    for line, (name, curve) in zip(lines[1:], curves.items(), strict=True):
        assert line.split() == [name, f"{sum(curve[:8]) / 8:.3f}", f"{sum(curve[8:]) / 8:.3f}"]
    helper.generate(folder / "yarn", folder / "text", 16, 4)
    assert "12 tokens, which end with:\nw10 w11 w12 w13\n4 generated:\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--seq-length 8 is within the 8 of"):
        helper.losses(models, folder / "text", 8, 3, picture)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_of_it(tmp_path):
    finished = run_example("context_extension.sh", tmp_path, iterations=6)
    assert finished.code == 0, finished.errors
    assert "--position-embedding-type yarn" in finished.output
    assert finished.output.count("starting from the weights of") == 2
    assert "24 generated:" in finished.output
    assert (tmp_path / "loss_by_position.png").read_bytes().startswith(PNG)
    curves = json.loads((tmp_path / "loss_by_position.json").read_text())
    assert list(curves) == ["before", "yarn-untrained", "after"]
    for curve in curves.values():
        assert len(curve) == 1024
        # Even six iterations make a model better than one that knows nothing.
        assert sum(curve) / len(curve) < math.log(1024)
    check_the_export(tmp_path)


def check_the_export(run):
    """YaRN alone changes no weight, training each; transformers is told of the new length."""
    weights = {
        name: load_file(run / name / "model.safetensors") for name in ("before", "yarn-untrained", "after")
    }
    assert weights["before"].keys() == weights["after"].keys()
    for name, tensor in weights["before"].items():
        assert torch.equal(weights["yarn-untrained"][name], tensor)
        assert not torch.equal(weights["after"][name], tensor), name
    config = json.loads((run / "after" / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 256)
