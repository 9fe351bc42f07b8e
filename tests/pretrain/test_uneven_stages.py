"""``--decoder-first-pipeline-num-layers`` and its like: the same training, with layers elsewhere."""

from __future__ import annotations

import pytest
from ranks import run_on_ranks
from training_worker import Fault, run_cases, small_model

from helixpipe.data.prefix import DatasetInfo
from megatron.pretrain.settings.arguments import parse_arguments

FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"


GROUP = "--global-batch-size 5 --microbatch-group-size-per-virtual-pipeline-stage 5"


class Layers(Fault):
    """Tells how many layers this rank has."""

    def on_build(self, state, schedule):
        self.seen.append(sum(len(chunk.module.decoder.layers) for chunk in state.model))


def losses(outcome):
    assert outcome["error"] == ""
    return [float(line.split("lm loss:")[1].split()[0]) for line in outcome["lines"] if "lm loss:" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    common = f"{small_model(folder)} --pipeline-model-parallel-size 2"
    cases = {
        "even": "--pipeline-schedule 1f1b",
        "first": f"--pipeline-schedule 1f1b {FIRST} 1 --exit-interval 2 --save {folder}/saved",
        "resumed": f"--pipeline-schedule helix {LAST} 1 --load {folder}/saved",
        "five": f"--pipeline-schedule 1f1b {GROUP}",
        "group": f"--pipeline-schedule interleaved --num-layers-per-virtual-pipeline-stage 1 {GROUP}",
        "split": f"--pipeline-schedule zb-h1 {FIRST} 3 {LAST} 1",
    }
    ranks = run_on_ranks(2, run_cases, [(line, Layers()) for line in cases.values()], 1, 2, common)
    return [dict(zip(cases, rank, strict=True)) for rank in ranks]


def test_uneven_stages_learn_what_even_ones_learn(runs):
    first, last = runs
    assert [rank["first"]["seen"] for rank in (first, last)] == [[1], [3]]
    assert [rank["split"]["seen"] for rank in (first, last)] == [[3], [1]]
    expected = losses(first["even"])
    assert len(expected) == 3
    # The same operations on the same numbers; a tied head is reduced in another order.
    assert losses(first["first"]) == pytest.approx(expected[:2], rel=1e-6)
    assert losses(first["split"]) == pytest.approx(expected, rel=1e-6)


def test_micro_batches_in_groups_of_another_size_learn_the_same(runs):
    first, _ = runs
    expected = losses(first["five"])
    assert len(expected) == 3
    assert losses(first["group"]) == pytest.approx(expected, rel=1e-6)
    assert any("per-virtual-pipeline-stage (there are no virtual" in line for line in first["five"]["lines"])


def test_a_job_goes_on_with_layers_in_no_stages(runs):
    first, _ = runs
    assert losses(first["resumed"]) == pytest.approx(losses(first["even"])[2:], rel=1e-5)
    assert f"accepted, but change nothing here: {LAST} (layers are in no stages)" in first["resumed"]["lines"]


DATASET = DatasetInfo("unused", 300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500)
SIZES = (
    "--num-layers 12 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused --pipeline-model-parallel-size 4"
)


@pytest.mark.parametrize(
    ("line", "layers"),
    [(f"{FIRST} 2 {LAST} 2", "2,4,4,2"), (f"{FIRST} 3", "3,3,3,3"), (f"{LAST} 6", "2,2,2,6"), ("", None)],
)
def test_layers_of_stages_are_megatrons(monkeypatch, line, layers):
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = parse_arguments(f"{SIZES} {line}".split(), DATASET)
    assert settings.schedule.plan.parameters.get("stage_layers") == layers
    assert settings.schedule.execution.name == "MEGATRON"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{FIRST} 2", "leaves 10 of --num-layers 12 for 3 other stages; use --num-layers 11 or 14$"),
        (f"{FIRST} 8 {LAST} 3", "leaves 1 of --num-layers 12 for 2 other stages; use --num-layers 13 or 15$"),
        (f"{FIRST} 2 --pipeline-model-parallel-size 1", "2 needs --pipeline-model-parallel-size of 2"),
        (f"{FIRST} 2 {LAST} 2 --pipeline-model-parallel-size 2", "are 4 layers of --num-layers 12; let"),
        (f"{FIRST} 3 --num-layers-per-virtual-pipeline-stage 1", "do not apply to interleaved; remove them"),
        (f"{FIRST} 3 --pipeline-schedule seq1f1b", "do not apply to seq1f1b; remove them"),
        (f"{FIRST} 2 --pipeline-schedule helix", "leaves 10 of --num-layers 12 for 3 other stages"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit_are_refused(monkeypatch, line, message):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message):
        parse_arguments(f"{SIZES} {line}".split(), DATASET)
