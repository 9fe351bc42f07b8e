"""The chunk cost model against its equations, its file, and the presets."""

import json
from dataclasses import replace

import pytest

from helixpipe.elastic import (
    Chunk,
    ChunkCosts,
    PassTime,
    Piece,
    costs_from_json,
    costs_to_json,
    ideal_costs,
    predict_chunk_costs,
)
from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.cost_model import (
    HARDWARE,
    MODELS,
    Recompute,
    Workload,
    costs_of_plan,
    predict_pieces,
)
from helixpipe.plan.simulation.network import Network

HYBRID = Chunk((Piece(0, 100, 20, 120), Piece(1, 0, 7, 7), Piece(2, 0, 5, 5)))
MIDDLE = Chunk((Piece(0, 100, 20, 200),))
COSTS = ChunkCosts(
    source="by hand",
    forward=PassTime(attention_ms=2e-3, token_ms=3e-2, layer_ms=0.5, communication_ms=1e-3, head_ms=4e-2),
    backward=PassTime(attention_ms=5e-3, token_ms=6e-2, layer_ms=0.7),
    token_bytes=100,
    input_bytes=10,
    kv_bytes=8,
    logits_bytes=30,
    head_workspace_bytes=90,
    layer_workspace_bytes=6,
    tensor_parallel=2,
    layer_state_bytes=1000,
    embedding_state_bytes=50,
    head_state_bytes=70,
    network=Network(latency_ms=0.1, gb_per_s=10),
)


def test_times_are_the_papers():
    """T_comp with N = d_s d_p, alpha = L times a layer's, for L = 8, d_p = 2."""
    num_layers, d_p, d_s = 8, 2, COSTS.tensor_parallel
    alpha1, alpha2, beta1 = num_layers * 2e-3, num_layers * 3e-2, num_layers * 0.5
    c, s0, rest = 100, 20, (7, 5)
    paper = alpha1 * ((c + s0) ** 2 - c**2) + alpha2 * s0 + sum(alpha1 * s * s + alpha2 * s for s in rest)
    paper = paper / (d_s * d_p) + beta1 / d_p + num_layers / d_p * 1e-3 * 32
    assert COSTS.forward_ms(HYBRID, num_layers // d_p, is_last=False) == pytest.approx(paper)
    assert COSTS.forward_ms(HYBRID, num_layers // d_p, is_last=True) == pytest.approx(paper + 4e-2 * 32 / 2)
    assert COSTS.recompute_ms(HYBRID) == pytest.approx(paper / (num_layers / d_p))
    assert COSTS.backward_ms(MIDDLE, 1, is_last=False) == pytest.approx(
        (5e-3 * (120**2 - 100**2) + 6e-2 * 20) / 2 + 0.7
    )


def test_bytes_are_the_papers():
    assert COSTS.activation_bytes(HYBRID, 4, is_last=False) == 4 * 100 * 32 // 2
    assert COSTS.activation_bytes(HYBRID, 4, is_last=True) == (4 * 100 * 32 + 30 * 32) // 2
    # Keys and values of a slice with successors: their gradients wait, and they cannot be recomputed away.
    assert COSTS.activation_bytes(MIDDLE, 4, is_last=False) == 4 * 100 * 20 // 2
    assert COSTS.gradient_bytes(MIDDLE, 4) == 4 * 8 * 20 // 2
    assert COSTS.gradient_bytes(HYBRID, 4) == 0
    assert COSTS.saved_bytes(HYBRID) == (100 - 10) * 32 // 2
    assert COSTS.saved_bytes(MIDDLE) == (100 - 10 - 8) * 20 // 2
    workspaces = {
        (is_last, recomputes): COSTS.workspace_bytes(MIDDLE, is_last=is_last, recomputes=recomputes)
        for is_last in (False, True)
        for recomputes in (False, True)
    }
    assert workspaces == {
        (False, False): 6 * 20 // 2,
        (False, True): (6 + 100) * 20 // 2,
        (True, False): 90 * 20 // 2,
        (True, True): (6 + 100) * 20 // 2,
    }
    assert COSTS.message_bytes(HYBRID) == 10 * 32
    assert [COSTS.state_bytes(stage, 3, 2) for stage in range(3)] == [2050, 2000, 2070]
    shared = replace(COSTS, shared_state_bytes=40)
    assert [shared.state_bytes(stage, 3, 2) for stage in range(3)] == [2050, 2000, 2070]
    assert (COSTS.state_bytes(0, 1, 2), shared.state_bytes(0, 1, 2)) == (2120, 2080)
    with pytest.raises(ValueError, match=r"shared_state_bytes \(71\) are among head_state_bytes \(70\)"):
        replace(COSTS, shared_state_bytes=71)


def test_padding_is_paid_for():
    """Tokens that see only each other make chunks of 20 and 32 tokens multiples of 23."""
    costs = replace(COSTS, tensor_parallel=23, token_multiple=23)
    assert (costs.padded(MIDDLE), costs.padded(HYBRID)) == (23, 46)
    assert replace(costs, token_multiple=1).padded(MIDDLE) == 20
    area = 120**2 - 100**2 + 3**2
    assert costs.recompute_ms(MIDDLE) == pytest.approx((2e-3 * area + 3e-2 * 23) / 23 + 1e-3 * 23 + 0.5)
    assert costs.activation_bytes(MIDDLE, 4, is_last=True) == (4 * 100 + 30) * 23 // 23
    assert costs.gradient_bytes(MIDDLE, 4) == -(-4 * 8 * 20 // 23)
    assert costs.saved_bytes(MIDDLE) == ((100 - 10) * 23 - 8 * 20) // 23
    assert costs.workspace_bytes(MIDDLE, is_last=True, recomputes=False) == 90
    assert costs.message_bytes(MIDDLE) == 10 * 23


def test_file_round_trip():
    for costs in (COSTS, ideal_costs()):
        assert costs_from_json(costs_to_json(costs)) == costs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "helixpipe-plan"}, '"format" must be "helixpipe-chunk-costs"'),
        ({"token_bytes": -1}, "token_bytes must be a number that is not negative"),
        ({"token_bytes": 5}, "cannot be below input_bytes"),
        ({"tokens": 1}, "'tokens' is unknown; known: source, forward"),
        ({"forward": {"token_ms": 1}}, "forward: attention_ms missing"),
        ({"forward": 3}, "forward must be an object"),
        ({"forward": {"attention_ms": True, "token_ms": 1}}, "forward.attention_ms must be a number"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1"),
        ({"token_multiple": 3}, "token_multiple is 1 or, with sequence parallelism, tensor_parallel"),
        ({"tensor_parallel": 1.5}, "tensor_parallel must be a whole number"),
        ({"network": {"latency_ms": 0, "gb_per_s": 0}}, "gb_per_s must be above 0"),
    ],
)
def test_a_wrong_file_is_one_clear_line(change, words):
    data = {**json.loads(costs_to_json(COSTS)), **change}
    with pytest.raises(ValueError, match=words) as caught:
        costs_from_json(json.dumps(data))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_json():
    with pytest.raises(ValueError, match="invalid JSON"):
        costs_from_json("{")
    data = json.loads(costs_to_json(COSTS))
    del data["kv_bytes"]
    with pytest.raises(ValueError, match="kv_bytes missing"):
        costs_from_json(json.dumps(data))


@pytest.mark.parametrize("hardware", ["a800", "h20"])
@pytest.mark.parametrize("t", [1, 8])
def test_a_preset_agrees_with_the_analytic_model(hardware, t):
    """A chunk that is one whole sequence costs what the common cost model says of a micro batch."""
    workload = Workload(model=MODELS["llama-7b"], seq_length=32768, tensor_parallel=t)
    pieces = predict_pieces(workload, HARDWARE[hardware])
    plan = build_plan("1f1b", ScheduleRequest(num_layers=32, num_ranks=4, num_microbatches=2))
    expected = costs_of_plan(pieces, plan, Recompute.NONE).segments["stage1"]
    costs = predict_chunk_costs(workload, HARDWARE[hardware], num_stages=4)
    chunk = Chunk((Piece(0, 0, 32768, 32768),))
    assert costs.forward_ms(chunk, 8, is_last=False) == pytest.approx(expected.forward, rel=1e-6)
    assert costs.backward_ms(chunk, 8, is_last=False) == pytest.approx(
        expected.backward + expected.weight, rel=0.02
    )
    assert costs.activation_bytes(chunk, 8, is_last=False) == pytest.approx(expected.bytes, rel=1e-6)
    last = costs_of_plan(pieces, plan, Recompute.NONE).segments["stage3"]
    assert costs.forward_ms(chunk, 8, is_last=True) == pytest.approx(last.forward, rel=0.02)


def test_a_preset_does_not_depend_on_the_sequence_length():
    workload = Workload(model=MODELS["llama-7b"], seq_length=32768, tensor_parallel=8)
    shorter = replace(workload, seq_length=100)
    assert predict_chunk_costs(workload, HARDWARE["h20"], 4) == predict_chunk_costs(
        shorter, HARDWARE["h20"], 4
    )


def test_gradients_of_keys_and_values_are_summed_in_fp32():
    """In bf16 they are twice as large as keys and values; files of costs say that, or leave it open."""
    found = predict_chunk_costs(Workload(model=MODELS["llama-7b"], seq_length=8192), HARDWARE["h20"], 4)
    assert found.kv_gradient_bytes == 2 * found.kv_bytes
    papers = replace(found, kv_gradient_bytes=None)
    assert found.gradient_bytes(MIDDLE, 4) == 2 * papers.gradient_bytes(MIDDLE, 4)
    for costs in (found, COSTS):
        assert costs_from_json(costs_to_json(costs)) == costs
