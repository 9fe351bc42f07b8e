"""--pipeline-schedule elastic-auto: 1F1B or helix over documents, by the documents that a job begins with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from helixpipe.data.prefix import DatasetInfo, dataset_paths
from helixpipe.data.samples import ShuffledOrder
from helixpipe.elastic import costs_to_json, ideal_costs
from megatron.pretrain.settings.arguments import parse_arguments

LENGTHS = (3000, 50, 3, 700, 20, 90, 5, 5, 300, 41, 2, 2, 64, 1000)
LINE = (
    "--pipeline-schedule elastic-auto --num-layers 8 --hidden-size 64 --num-attention-heads 4 "
    "--seq-length 4096 --micro-batch-size 1 --global-batch-size 6 --train-iters 10 --lr 1e-3 "
    "--pipeline-model-parallel-size 4 --memory-limit-gib 2 --split 1,0,0 --eval-iters 0 --seed 3"
)
COSTS = ideal_costs(balanced_length=400.0)
HEAVY = {
    name: replace(getattr(COSTS, name), attention_ms=0.0, head_ms=3 * getattr(COSTS, name).token_ms)
    for name in ("forward", "backward")
}
SLOW_CUT = replace(COSTS.cut, operation_ms=50.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("documents") / "set"
    paths = dataset_paths(prefix)
    builder = IndexedDatasetBuilder(paths.bin, dtype=np.uint16)
    for length in LENGTHS:
        builder.add_document(torch.ones(length + 1, dtype=torch.long), [length + 1])
    builder.finalize(paths.idx)
    total = sum(LENGTHS) + len(LENGTHS)
    return DatasetInfo(str(prefix), 300, 0, len(LENGTHS), total, max(LENGTHS) + 1)


@pytest.fixture
def parse(monkeypatch, tmp_path, dataset):
    """``parse(costs, words)``."""
    monkeypatch.setenv("WORLD_SIZE", "4")

    def parsed(costs=COSTS, words="", info=dataset):
        path = tmp_path / "costs.json"
        path.write_text(costs_to_json(costs), encoding="utf-8")
        line = f"{LINE} --data-path {info.prefix or 'none'} --elastic-costs {path} {words}"
        return parse_arguments(line.split(), info)

    return parsed


def test_a_family_is_chosen_and_announced(parse):
    settings = parse()
    job = settings.elastic_job
    assert (settings.schedule.name, job.schedule) == ("elastic-helix", "elastic-helix")
    assert (job.attention_range, job.recompute) == ("core", "none")
    assert not settings.memory.memory_saving.recomputes
    assert settings.schedule.plan is None
    assert settings.schedule.reason.startswith(
        "elastic-auto chose elastic-helix (range core, recompute none)"
    )
    assert parse().schedule.reason == settings.schedule.reason, "every rank chooses alike"
    slow = parse(replace(COSTS, cut=SLOW_CUT))
    assert (slow.schedule.name, slow.elastic_job.attention_range) == ("elastic", None)
    assert slow.schedule.reason.startswith("elastic-auto chose elastic: predicted ")


def test_stages_are_those_that_balance_the_head(parse):
    """As options of the job, which the model is built by."""
    settings = parse(replace(COSTS, cut=SLOW_CUT, **HEAVY))
    parallel = settings.parallel
    ends = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    assert settings.elastic_job.stage_layers == (ends[0], 3, 3, ends[1])
    assert sum(settings.elastic_job.stage_layers) == 8
    assert ends[1] == 1


def test_the_choice_is_made_by_the_first_batches(parse, monkeypatch, dataset):
    """What three batches hold, in the order that is trained on, of at most so many tokens."""
    seen = []

    def noted(batches, job, schedules):
        seen.extend(batches)
        raise ValueError("enough")

    monkeypatch.setattr("megatron.pretrain.settings.elastic_choice.choose_family", noted)
    with pytest.raises(ValueError, match="enough"):
        parse(words="--max-seq-length 1500")
    order = ShuffledOrder(len(LENGTHS), 3)
    expected = [[min(LENGTHS[i], 1500) for i in order.samples(6 * number, 6)] for number in range(3)]
    assert seen == expected


def test_what_goes_with_1f1b_alone_leaves_1f1b(parse):
    found = parse(words="--softmax-type learnable").schedule
    assert found.name == "elastic"
    assert "helix" not in found.reason


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--attention-range block",
            "--attention-range does not apply to elastic-auto, which chooses it; leave",
        ),
        ("--recompute-levels none", "--recompute-levels does not apply to elastic-auto"),
        ("--decoder-last-pipeline-num-layers 2", "--decoder-last-pipeline-num-layers does not apply to"),
        ("--attention-dropout 0.1", "--attention-dropout does not go with elastic-auto, whose attention"),
        ("--hardware h20", "--hardware is for --pipeline-schedule auto"),
        ("--num-fold 2", "cannot honour --num-fold: .*; leave it out"),
        ("--memory-limit-gib 0.00001", "elastic: .*; elastic-helix: "),
        ("--num-layers 6", "number of layers .6. must be a multiple"),
    ],
)
def test_what_no_choice_can_have_is_refused_in_a_line(parse, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(words=words)
    assert "\n" not in str(caught.value)


def test_made_up_data_has_no_documents(parse, dataset):
    with pytest.raises(ValueError, match="elastic-auto chooses by documents; give their --data-path"):
        parse(info=replace(dataset, prefix=""))
