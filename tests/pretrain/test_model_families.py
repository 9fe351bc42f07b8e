"""Every family of models on Hugging Face: import, logits, losses and gradients under helix, export."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf")

from families import (
    TINY,
    case_of,
    expected_of,
    logits_of_both,
    losses_and_gradients,
    make_tiny,
    tiny_model,
    train_options,
)
from models import relative_error
from ranks import run_on_ranks
from safetensors.torch import load_file
from stages import batch_of

from megatron.pretrain.hf.convert import export_model, import_model

FAST = {"llama-3.1"}
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in TINY]
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """By the name of a family: transformers' model, its folder, the checkpoint and the options printed."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            hf = make_tiny(name, folder / "hf")
            words = import_model(folder / "hf", folder / "checkpoint")
            made[name] = hf, folder / "hf", folder / "checkpoint", words
        return made[name]

    return make


@every_family
def test_logits_are_those_of_transformers(name, imported):
    hf, _, checkpoint, words = imported(name)
    case = case_of(1)
    options = [train_options(words, checkpoint, case, schedule) for schedule in ("1f1b", "helix")]
    expected = hf(batch_of(case)["tokens"]).logits
    for found in run_on_ranks(1, logits_of_both, case, *options)[0]:
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@every_family
@pytest.mark.parametrize("p", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_megatrons_and_those_of_transformers(name, p, imported):
    hf, folder, checkpoint, words = imported(name)
    case = case_of(p)
    theirs = expected_of(hf, tiny_model(name, folder), case)
    megatrons = run_on_ranks(p, losses_and_gradients, case, train_options(words, checkpoint, case, "1f1b"))[0]
    losses, gradients = run_on_ranks(
        p, losses_and_gradients, case, train_options(words, checkpoint, case, "helix")
    )[0]
    for expected_losses, expected in (megatrons, theirs):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            assert gradient.norm() > 0, key
            assert relative_error(gradients[key], gradient) < 1e-5, key


@every_family
def test_what_was_imported_is_exported_to_the_bit(name, imported, tmp_path):
    _, folder, checkpoint, _ = imported(name)
    export_model(checkpoint, tmp_path / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key
    for path in folder.glob("*.json"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
