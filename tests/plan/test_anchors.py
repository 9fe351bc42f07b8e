"""Published throughput: the rows, the conventions they are counted by, and what is predicted of a row."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from helixpipe.plan.cost_model import MODELS, Recompute
from helixpipe.plan.cost_model.segments import whole_layer_cost

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("anchors", ROOT / "benchmarks" / "anchors.py")
anchors = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(anchors)
ROWS = {row["id"]: row for row in anchors.read_rows()}


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.get("computed")], ids=lambda row: row["id"]
)
def test_tokens_were_computed_from_the_whole_square(row):
    model = MODELS[row["assumed"]["model"]]
    per_token = anchors.flops_per_token(model, row["seq"], whole_square=True)
    assert row["tokens_per_s_gpu"] * per_token / 1e12 == pytest.approx(row["published_tflops"], rel=0.005)


def test_the_causal_count_is_that_of_the_cost_model():
    """Three times the forward's operations, attention at half of its square."""
    model = MODELS["llama3-8b"]
    counted = 3 * model.forward_flops(32768) / 32768
    assert anchors.flops_per_token(model, 32768, whole_square=False) == pytest.approx(counted)


def test_all_gpus_of_a_row_are_used():
    for row in ROWS.values():
        if "tp" in row:
            layout = anchors._layout_of({**row, **row["assumed"]})
            assert layout.tp * layout.cp * layout.pp * layout.dp == row["gpus"]


def test_a_row_without_a_layout_gets_the_fastest():
    row = ROWS["nemo-7b-32k-nocp"]
    found = anchors.predict(row)
    for tp in (2, 4, 8):
        assert anchors.predict({**row, "tp": tp}).tokens_per_s <= found.tokens_per_s


def test_a_named_kernel_replaces_the_files():
    row = ROWS["nemo-7b-128k"]
    assert anchors.predict(row, "cudnn").tokens_per_s > 1.2 * anchors.predict(row).tokens_per_s


def test_layers_recompute_only_where_memory_forces_it():
    row = ROWS["nemo-7b-32k"]
    assert "recomputed" not in anchors.predict(row).layout
    small = {**row, "assumed": {**row["assumed"], "hardware": {"base": "h100", "memory_gib": 50}}}
    forced = anchors.predict(small)
    assert "% of layers recomputed" in forced.layout
    assert forced.peak_gib <= 50
    assert forced.tokens_per_s < anchors.predict(row).tokens_per_s


def test_the_first_and_the_last_stage_of_126_layers_are_one_layer_shorter():
    row = ROWS["titan-405b-8k-1f1b"]
    known = {**row, **row["assumed"]}
    machine, layout = anchors._machine(known, None), anchors._layout_of(known)
    model = replace(MODELS["llama3-405b"], num_layers=128)
    pieces = anchors._pieces(model, known, machine, layout)
    plan = anchors._plan(model, 8, 32, 1)
    levels = [Recompute.FULL] * 128
    short, whole = (
        anchors._costs(pieces, plan, levels, known, layout, is_short=is_short) for is_short in (True, False)
    )
    layer = whole_layer_cost(pieces, Recompute.FULL)
    for stage in ("stage0", "stage7"):
        less = whole.segments[stage].backward - short.segments[stage].backward
        assert less == pytest.approx(layer.backward)
    assert short.segments["stage3"] == whole.segments["stage3"]
    # Weights of the whole model, without norms.
    held = anchors._rank_parameters(pieces, plan, is_short=True)
    assert sum(held) * 8 == MODELS["llama3-405b"].parameters


def test_micro_batches_are_what_a_ranks_batch_is_cut_into():
    """Torchtitan's 32 sequences are 8 micro batches of 4; as 32 of one they would leave a smaller bubble."""
    row = ROWS["titan-405b-8k-1f1b"]
    assert (row["local_batch"], row["assumed"]["num_microbatches"]) == (32, 8)
    found = anchors.predict(row)
    alone = anchors.predict({**row, "assumed": {**row["assumed"], "num_microbatches": 32}})
    assert "m=8 of 4" in found.layout
    assert "m=32," in alone.layout
    # (m + p - 1) / m times a micro batch's time, for both.
    assert found.tokens_per_s / alone.tokens_per_s == pytest.approx((8 / 15) / (32 / 39), rel=0.05)
    assert found.peak_gib > alone.peak_gib + 10


def test_ranks_with_consecutive_parts_wait_for_the_last():
    row = ROWS["titan-8b-256k"]
    known = {**row, **row["assumed"]}
    machine, layout = anchors._machine(known, None), anchors._layout_of(known)
    model = MODELS["llama3-8b"]
    even, uneven = (
        anchors._pieces(model, {**known, "consecutive": consecutive}, machine, layout).times
        for consecutive in (False, True)
    )
    # Of 8 parts the last attends to 7 and half of its own; the mean is 4.
    assert uneven["core"].forward / even["core"].forward == pytest.approx(7.5 / 4)
    assert uneven["core"].backward / even["core"].backward == pytest.approx(7.5 / 4)
    assert uneven["qkv"] == even["qkv"]


def test_errors_are_summed_up():
    row = ROWS["trl-8b-1m"]
    found = [
        anchors.Prediction(row, row["tokens_per_s_gpu"] * factor, row["peak_gib"] * factor, "")
        for factor in (1.1, 0.8, 1.0)
    ]
    assert [one.error for one in found] == pytest.approx([0.1, -0.2, 0.0])
    assert anchors.summary(found) == (
        "Throughput of 3 rows: median error 10%, worst -20% (trl-8b-1m). Memory of 3: median 10%, worst 20%."
    )


def test_an_unknown_row_is_refused(capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        anchors.main(["--rows", "nemo"])
    assert "there is no row nemo; known: nemo-7b-32k, " in str(caught.value) + capsys.readouterr().err
    assert anchors.main(["--rows", "nemo-7b-32k"]) == 0
    assert "| nemo-7b-32k | tp2 cp2 dp8, m=16 | flash-attn-2 | 6690 |" in capsys.readouterr().out
