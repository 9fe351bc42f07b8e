"""From a model on Hugging Face through training, with a restart, to a model that transformers runs."""

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

import torch
from families import make_tiny

from megatron.pretrain.hf.convert import export_model, import_model

HELIX = ("--pipeline-schedule", "helix", "--pipeline-model-parallel-size", 2, "--transformer-impl", "local")


@pytest.mark.slow
def test_a_job_starts_from_imported_weights_and_goes_on_from_its_own(launch, tmp_path):
    from transformers import AutoModelForCausalLM

    hf = make_tiny("llama-yarn", tmp_path / "hf")
    words = import_model(tmp_path / "hf", tmp_path / "imported", padded_rows=1024)
    saved = tmp_path / "saved"
    files = ("--pretrained-checkpoint", tmp_path / "imported", "--load", saved, "--save", saved)
    first = launch(2, *HELIX, *words, *files, "--train-iters", 2)
    assert first.code == 0, first.errors
    assert f"starting from the weights of {tmp_path / 'imported' / 'iter_0000000'}" in first.output
    second = launch(2, *HELIX, *words, *files, "--train-iters", 4)
    assert second.code == 0, second.errors
    assert f"going on from iteration 2 of {saved}" in second.output
    assert "starting from the weights" not in second.output
    export_model(saved, tmp_path / "trained", reference=tmp_path / "hf")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    before, after = dict(hf.named_parameters()), dict(trained.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        # Adam moves every weight by about the learning rate.
        change = (parameter - before[name]).abs().detach()
        assert 0 < float(change.max()) < 0.05, name
    tokens = torch.arange(16)[None]
    assert trained.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-layers", 2), "was trained with --num-layers 4, this job has 2"),
        (("--bf16",), "this job needs torch.bfloat16"),
        (("--pretrained-checkpoint", "nowhere"), "holds no checkpoint; give a folder of --save"),
    ],
    ids=["layers", "type", "nowhere"],
)
def test_weights_that_do_not_fit_are_refused_on_every_rank(options, message, launch, tmp_path):
    make_tiny("llama-yarn", tmp_path / "hf")
    words = import_model(tmp_path / "hf", tmp_path / "imported", padded_rows=1024)
    finished = launch(
        2, *HELIX, *words, "--pretrained-checkpoint", tmp_path / "imported", *options, "--train-iters", 2
    )
    assert finished.code != 0
    assert message in finished.errors
