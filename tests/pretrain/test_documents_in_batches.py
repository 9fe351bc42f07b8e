"""--reset-attention-mask and --reset-position-ids: as Megatron's dataset has them, under every schedule."""

import json
from itertools import pairwise

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from plan_worker import train_and_watch
from ranks import run_on_ranks

from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.layers.documents import documents_of
from megatron.pretrain.data.gpt import DocumentBatches
from megatron.pretrain.settings.arguments import parse_arguments

EOD = 3
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --micro-batch-size 2 "
    "--global-batch-size 8 --train-iters 2 --lr 3e-3 --eval-iters 1 --split 80,20,0 --eod-mask-loss "
    "--untie-embeddings-and-output-weights --data-path"
)
RESET = "--reset-attention-mask --reset-position-ids --pipeline-schedule"


def texts():
    """Rows of ids: random, and with ends at the edges, side by side, nowhere, everywhere."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 9, (40, 17), generator=generator)
    rows[0, [0, 16]] = EOD
    rows[1, 4:7] = EOD
    rows[2] = 5
    rows[3] = EOD
    return rows


def test_documents_are_those_that_megatron_masks_and_counts():
    tokens = texts()
    documents = documents_of(tokens, EOD)
    for row, spans, positions in zip(tokens, documents.rows, documents.positions, strict=True):
        mask, _, expected = _get_ltor_masks_and_position_ids(row, EOD, True, True, True, True)
        assert positions.tolist() == expected.tolist()
        seen = torch.zeros(17, 17, dtype=torch.bool)
        for first, last in spans.bounds:
            seen[first:last, first:last] = torch.ones(last - first, last - first).tril().bool()
        assert torch.equal(~seen, mask[0])
        assert [spans.bounds[0][0], spans.bounds[-1][1]] == [0, 17]
        assert all(before[1] == after[0] for before, after in pairwise(spans.bounds))


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_each_option_does_its_own(positions, mask):
    given = [{"tokens": texts(), "position_ids": torch.arange(17).expand(40, 17)}]
    (batch,) = DocumentBatches(
        iter(dict(batch) for batch in given), EOD, reset_position_ids=positions, reset_attention_mask=mask
    )
    assert ("documents" in batch) == mask
    expected = documents_of(texts(), EOD).positions if positions else given[0]["position_ids"]
    assert torch.equal(batch["position_ids"], expected)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"{i} {'abcdefgh'[: i % 8]}" * (1 + i % 3) for i in range(400)]
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_dataset(PreparationOptions([str(folder / "in.jsonl")], str(folder / "data"), tokenizer="byte"))
    return folder / "data"


def test_the_program_trains_alike_under_every_kind_of_schedule(tmp_path, corpus):
    runs = {
        "1f1b": f"{RESET} 1f1b",
        "helix": f"{RESET} helix --num-fold 1",
        "interleaved": f"{RESET} interleaved --num-layers-per-virtual-pipeline-stage 1",
        "zb-v": f"{RESET} zb-v",
        "positions": "--reset-position-ids --pipeline-schedule helix --num-fold 1",
        "one_by_one": f"{RESET} 1f1b --micro-batch-size 1",
        "sliced": f"{RESET} sliced-helix --attention-range block --micro-batch-size 1",
    }
    first, _ = run_on_ranks(2, train_and_watch, tmp_path, f"{MODEL} {corpus}", runs)
    assert [first[name]["error"] for name in runs] == [""] * len(runs)
    losses = {name: found["losses"] for name, found in first.items()}
    for name in ("helix", "interleaved", "zb-v"):
        assert losses[name] == pytest.approx(losses["1f1b"], rel=1e-5)
    assert losses["sliced"] == pytest.approx(losses["one_by_one"], rel=1e-5)
    assert losses["positions"] != pytest.approx(losses["1f1b"], rel=1e-4)


@pytest.mark.parametrize("schedule", ["seq1f1b --num-slices 2", "sliced-helix"])
def test_slices_are_of_one_sequence(monkeypatch, corpus, schedule):
    monkeypatch.setenv("WORLD_SIZE", "1")
    line = f"{MODEL} {corpus} {RESET} {schedule} --hardware h20"
    with pytest.raises(ValueError, match=f"with {schedule.split()[0]} needs --micro-batch-size 1, not 2"):
        parse_arguments(line.split())
    assert parse_arguments(f"{line} --micro-batch-size 1".split()).data.ends_at_documents
