"""Layers over chunks: the shapes, the attention over a context, the bytes, and the way to fitted costs."""

import json
from dataclasses import replace

import pytest
from profile_worker import profile_chunks_here
from ranks import run_on_ranks
from test_profile import TINY, workload

from helixpipe.__main__ import main
from helixpipe.elastic import costs_from_json, fit_costs, measurements_from_json
from helixpipe.elastic.costs.fit import measurements_to_json
from helixpipe.elastic.costs.preset import predict_chunk_costs, profiled_chunk_costs
from helixpipe.plan.cost_model import HARDWARE
from helixpipe.profiling.chunks import chunk_shapes

TOKENS = 256


def clocked(measured):
    """With times by rule: those of so small a layer on a busy machine may not grow with its tokens."""
    return tuple(
        replace(m, forward_ms=1 + 0.01 * m.tokens, backward_ms=2 + 0.02 * m.tokens) for m in measured
    )


def test_shapes_differ_in_length_context_and_packing():
    shapes = chunk_shapes(4096, multiple=8)
    assert len(set(shapes)) == len(shapes)
    assert all(shape.context + sum(shape.lengths) <= 4096 for shape in shapes)
    assert all(length % 8 == 0 for shape in shapes for length in (shape.context, *shape.lengths))
    assert max(sum(shape.lengths) for shape in shapes) == 4096
    assert any(shape.context for shape in shapes)
    assert any(len(shape.lengths) > 1 for shape in shapes)
    for length in (0, 255):
        with pytest.raises(ValueError, match="--max-seq-length must be at least 256"):
            chunk_shapes(length)
    with pytest.raises(ValueError, match="--max-seq-length must be at least 512"):
        chunk_shapes(256, multiple=32)


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [(1, workload()), (2, workload(tensor_parallel=2)), (2, workload(model=replace(TINY, gated=False)))],
    ids=["alone", "tensor", "gpt"],
)
def test_every_chunk_is_measured_and_costs_can_be_fitted(ranks, wanted):
    found = run_on_ranks(ranks, profile_chunks_here, wanted, TOKENS)
    assert all(measured == found[0] for measured in found), "every rank plans with the same numbers"
    pieces, measured = found[0]
    assert [(m.context, m.lengths) for m in measured] == list(chunk_shapes(TOKENS, wanted.tensor_parallel))
    assert all(m.forward_ms > 0 and m.backward_ms > 0 for m in measured)
    # Memory is exactly linear in the tokens, whatever the context, and about what the planner predicts.
    assert len({m.bytes / m.tokens for m in measured}) == 1
    per_token = measured[0].bytes / measured[0].tokens * wanted.tensor_parallel
    base = profiled_chunk_costs(pieces, 2)
    predicted = predict_chunk_costs(wanted, HARDWARE["a800"], 2)
    assert base.token_bytes == predicted.token_bytes
    assert 0.6 < per_token / predicted.token_bytes < 1.6
    assert (base.layer_state_bytes, base.kv_bytes) == (predicted.layer_state_bytes, predicted.kv_bytes)
    assert base.network == pieces.network
    head = pieces.times["head"]
    assert base.forward.head_ms == pytest.approx(head.forward * wanted.tensor_parallel / wanted.tokens)
    fit = fit_costs(clocked(measured), base, 1)
    assert fit.costs.token_bytes == pytest.approx(per_token)
    assert fit.bytes.largest < 1e-9
    assert fit.num_held_out == 6


def test_records_are_read_back():
    text = json.dumps([{"context": 3, "lengths": [4, 5], "forward_ms": 1.5, "backward_ms": 2, "bytes": 6}])
    measured = measurements_from_json(text)
    assert measurements_from_json(measurements_to_json(measured * 2)) == measured * 2


def test_the_command_writes_costs_and_records(tmp_path, capsys, monkeypatch):
    """The command around the measurement, which the tests above run on real ranks."""
    pieces, measured = run_on_ranks(1, profile_chunks_here, workload(), TOKENS)[0]
    measured = clocked(measured)
    asked = {}

    def profile_chunks(workload, max_seq_length, *, repeats):
        asked.update(workload=workload, max_seq_length=max_seq_length, repeats=repeats)
        return pieces, measured

    monkeypatch.setattr("helixpipe.profiling.profile_chunks", profile_chunks)
    model, costs, records = (tmp_path / name for name in ("model", "costs.json", "records.json"))
    model.write_text(
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --swiglu --ffn-hidden-size 128 "
        "--vocab-size 100"
    )
    arguments = [
        "elastic-profile", "--model", model, "--max-seq-length", TOKENS, "--fp32", "--repeats", 3,
        "--pipeline-model-parallel-size", 2, "--output", costs, "--records", records,
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert "Error on 6 measurements held out:" in printed
    assert "forward: " in printed
    assert (asked["max_seq_length"], asked["repeats"]) == (TOKENS, 3)
    assert (asked["workload"].element_bytes, asked["workload"].seq_length) == (4, TOKENS)
    assert measurements_from_json(records.read_text()) == measured
    fitted = costs_from_json(costs.read_text())
    assert fitted.source.endswith("fitted to 18 measurements")


def test_wrong_sizes_are_one_line(tmp_path, capsys):
    for option, words in (
        (["--max-seq-length", "0"], "--max-seq-length: must be at least 1, not 0"),
        (["--max-seq-length", "100"], "--max-seq-length must be at least 256, not 100"),
        (["--max-seq-length", "512", "--repeats", "0"], "--repeats: must be at least 1, not 0"),
    ):
        sizes = ["--pipeline-model-parallel-size", "2", "--output", str(tmp_path / "costs.json")]
        assert main(["elastic-profile", "--model", "gpt-7b", *sizes, *option]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
