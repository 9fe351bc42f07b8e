"""Every family of models on Hugging Face: import, logits, losses and gradients under helix, export.

``tools/family_table.py`` prints what is measured here.
"""

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

from families import (
    TINY,
    changed_by_round_trip,
    errors_under_helix,
    gradients_error,
    import_tiny,
    logits_error,
    losses_error,
)
from models import Case

FAST = {"llama-3.1"}
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in TINY]
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """By the name of a family: its tiny model, imported once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = import_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@every_family
def test_logits_are_those_of_transformers(name, imported):
    assert logits_error(imported(name)) <= 1e-5


@every_family
@pytest.mark.parametrize("p", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_megatrons_and_those_of_transformers(name, p, imported):
    for errors in errors_under_helix(imported(name), p).values():
        assert max(errors) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen-3-moe", "qwen-3-moe-sparse", "gpt-oss"])
def test_losses_and_gradients_are_theirs_where_ranks_share_experts(name, imported):
    for errors in errors_under_helix(imported(name), 2, ep=2).values():
        assert max(errors) <= 1e-5


@every_family
def test_what_was_imported_is_exported_to_the_bit(name, imported, tmp_path):
    assert changed_by_round_trip(imported(name), tmp_path / "hf") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "schedule", "options"),
    [
        (Case(pp=2, tp=2), "helix", ()),
        (Case(pp=2, tp=2), "helix", ("--attention-range", "block")),
        (Case(pp=2, tp=2), "1f1b", ("--sequence-parallel",)),
        (Case(pp=2), "zb-h1", ()),
        (Case(pp=2), "zb-v", ()),
        (Case(pp=2), "helix", ("--recompute-levels", "without-attention")),
        (Case(pp=2), "helix", ("--head-placement", "spread", "--loss-chunk-size", "5")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gemma-2-untied", "gemma-3-untied", "mistral"])
def test_a_checkpoint_is_loaded_under_any_layout_and_schedule(name, case, schedule, options, imported):
    assert losses_error(imported(name), case, schedule, *options) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "options"),
    [("seq1f1b", ("--num-slices", "2")), ("sliced-helix", ("--attention-range", "block"))],
)
@pytest.mark.parametrize(
    "name", ["gemma-2-untied", "gemma-3-untied", "mistral", "qwen-2.5-window", "llama-yarn", "gpt-oss"]
)
def test_slices_of_sequences_have_caps_windows_and_yarn(name, schedule, options, imported):
    assert losses_error(imported(name), Case(pp=2), schedule, *options) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "schedule", "options"),
    [
        (Case(pp=2, dp=2, ep=2), "helix", ("--expert-model-parallel-size", "2")),
        (Case(pp=2, tp=2), "helix", ("--sequence-parallel", "--attention-range", "block")),
        (Case(pp=2), "zb-v", ("--moe-token-dispatcher-type", "alltoall")),
        (Case(pp=2), "sliced-helix", ("--mlp-chunk-size", "5")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mixtral", "qwen-3-moe"])
def test_experts_are_loaded_wherever_they_are(name, case, schedule, options, imported):
    assert losses_error(imported(name), case, schedule, *options) <= 1e-5


WHOLE = ("--expert-tensor-parallel-size", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "schedule", "options"),
    [
        (Case(pp=2, dp=2, ep=2, same_data=True), "helix", ("--expert-model-parallel-size", "2")),
        (Case(pp=2, tp=2, etp=1), "helix", ("--sequence-parallel", "--attention-range", "qkv", *WHOLE)),
        (Case(pp=2, tp=2, etp=1), "1f1b", ("--sequence-parallel", *WHOLE)),
        (
            Case(pp=1, tp=2, ep=2, etp=1),
            "1f1b",
            ("--sequence-parallel", "--expert-model-parallel-size", "2", *WHOLE),
        ),
        (Case(pp=2), "zb-v", ("--moe-token-dispatcher-type", "alltoall")),
        (Case(pp=2), "helix", ("--recompute-levels", "products:2,without-attention:2")),
        (Case(pp=2), "helix", ("--mlp-chunk-size", "5", "--head-placement", "spread")),
    ],
    ids=str,
)
def test_biases_of_experts_learn_wherever_they_are(case, schedule, options, imported):
    assert gradients_error(imported("gpt-oss"), case, schedule, *options) <= 1e-5
