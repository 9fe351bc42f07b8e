"""Families of models: weights as transformers builds them, and what experts and latents cost."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from published_models import PUBLISHED

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.cost_model import HARDWARE, Recompute, Workload, costs_of_plan, predict_pieces, read_model
from helixpipe.plan.cost_model.hugging_face import FAMILIES, from_hugging_face
from helixpipe.plan.cost_model.pieces import Pieces
from helixpipe.plan.cost_model.segments import rank_parameters
from helixpipe.plan.cost_model.shape import Experts

SUPPORT = Path(__file__).resolve().parents[1] / "support"
# In billions, as the models' cards and reports say.
BILLIONS = {
    "llama-2-7b": 6.74, "llama-3.2-1b": 1.24, "mistral-7b-v0.1": 7.24, "mixtral-8x7b": 46.7,
    "qwen2.5-7b": 7.62, "qwen3-0.6b": 0.60, "qwen3-30b-a3b": 30.5, "gemma-2-9b": 9.24, "gemma-3-1b": 1.00,
    "gpt-oss-20b": 20.9, "deepseek-v2-lite": 15.7, "deepseek-v3": 671.0, "gpt2": 0.124,
}  # fmt: skip


def model_of(name):
    return from_hugging_face(name, PUBLISHED[name])


def workload_of(name, **changes):
    return Workload(**{"model": model_of(name), "seq_length": 8192, **changes})


def test_every_family_has_a_published_model():
    assert {config["model_type"] for config in PUBLISHED.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", BILLIONS)
def test_published_sizes(name):
    assert model_of(name).parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


def test_weights_are_counted_as_transformers_builds_them():
    """Exactly."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    counted = subprocess.run(
        [sys.executable, SUPPORT / "transformers_counts.py"],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert json.loads(counted.stdout) == {name: model_of(name).parameters for name in PUBLISHED}


def test_windows_of_families():
    """As transformers lays them out where a config has no list of layers."""
    assert model_of("gemma-2-9b").windows == (4096, 0) * 21
    assert model_of("gemma-3-1b").windows == (512, 512, 512, 512, 512, 0) * 4 + (512, 512)
    assert model_of("gpt-oss-20b").windows == (128, 0) * 12


def test_what_training_does_not_know_is_planned_only():
    assert model_of("deepseek-v3").only_planned == ("latent attention",)
    for name in ("gpt-oss-20b", "mixtral-8x7b", "gemma-2-9b"):
        assert not model_of(name).only_planned


def test_a_token_passes_the_active_experts_alone():
    """Mixtral: 12.9 of 46.7 billion; DeepSeek-V3: 37 of 671 (its report counts no embedding)."""
    mixtral, deepseek = model_of("mixtral-8x7b"), model_of("deepseek-v3")
    for model, billions in ((mixtral, 12.9), (deepseek, 37.0)):
        active = model.forward_flops(1) / 2 - model.num_layers * model.core_flops(1) / 2
        active += 0 if model is deepseek else model.embedding_parameters
        assert active / 1e9 == pytest.approx(billions, rel=0.02)
    dense = replace(mixtral, experts=None, ffn_hidden_size=2 * 14336)
    assert dense.forward_flops(4096) == mixtral.forward_flops(4096)


def test_latent_attention_multiplies_more_channels_than_it_returns():
    """Queries and keys of 192 channels, values of 128: 320 a head and pair of tokens, 2 operations each."""
    model = model_of("deepseek-v3")
    assert (model.head_dim, model.value_head_dim) == (192, 128)
    assert model.core_flops(1000) == 1000 * 1000 * 128 * 320
    assert model.attention_parameters["proj"] == 7168 * 128 * 128
    kept = workload_of("deepseek-v3").kept_tensors
    assert kept["qkv"] == 8192 * 2 * 128 * (192 + 192 + 128)
    assert kept["attention output"] == 8192 * 2 * 128 * 128


def test_latents_are_whole_on_every_gpu():
    whole, cut = (workload_of("deepseek-v3", tensor_parallel=t).held_parameters(5) for t in (1, 8))
    latents = 7168 * (1536 + 512 + 64)
    assert cut["qkv"] == latents + (whole["qkv"] - latents) // 8
    assert cut["proj"] == whole["proj"] // 8


def plan_of(model, p=2, schedule="1f1b", **options):
    return build_plan(
        schedule,
        ScheduleRequest(num_layers=model.num_layers, num_ranks=p, num_microbatches=4, **options),
        compute_only=True,
    )


def test_experts_are_shared_out_whole():
    """Eight GPUs of a stage have an expert each; their weights have half as many holders as the others."""
    found = workload_of(
        "mixtral-8x7b", tensor_parallel=4, data_parallel=4, expert_parallel=8, distributed_optimizer=True
    )
    model = found.model
    experts = 3 * 4096 * 14336
    held = found.held_parameters(0)
    assert (held["experts"], held["mlp"]) == (experts, 0)
    assert held["qkv"] + held["proj"] == sum(model.attention_parameters.values()) // 4
    assert (found.holders(), found.holders(of_experts=True)) == (4, 2)
    pieces = predict_pieces(found, HARDWARE["h100"])
    plan = plan_of(model)
    own, routed = (rank_parameters(pieces, plan, of_experts=of) for of in (False, True))
    assert routed == [16 * experts] * 2
    # Every weight once: those of experts over 8 GPUs, the others over 4.
    assert sum(own) * 4 + sum(routed) * 8 == model.parameters - model.other_parameters
    rank = costs_of_plan(pieces, plan, Recompute.NONE).ranks[0]
    assert rank.static_bytes == own[0] * 6 + own[0] * 12 // 4 + routed[0] * 6 + routed[0] * 12 // 2
    assert rank.gradient_reduction_ms == pytest.approx(
        pieces.reduction_ms(own[0]) + pieces.reduction_ms(routed[0]) * (1 / 2) / (3 / 4)
    )


def test_tokens_travel_to_experts_and_back():
    """Seven of eight copies leave, two of every token; nothing travels where experts are whole."""
    slow = replace(HARDWARE["h100"], nvlink_gb_per_s=1.0, nic_gb_per_s=1.0, link_efficiency=1.0)
    alone, shared = (
        predict_pieces(workload_of("mixtral-8x7b", data_parallel=8, expert_parallel=size), slow)
        for size in (1, 8)
    )
    exchange_ms = 2 * 8192 * 4096 * 2 * 7 / 8 / 1e6
    for piece in ("fc1", "fc2"):
        before, after = alone.times[piece], shared.times[piece]
        assert after.forward - before.forward == pytest.approx(exchange_ms)
        assert after.backward - before.backward == pytest.approx(exchange_ms)
        assert after.weight == before.weight
    assert alone.times["qkv"] == shared.times["qkv"]


def test_experts_cost_what_a_dense_mlp_of_the_active_width_does_and_the_copies():
    dense = replace(model_of("mixtral-8x7b"), experts=None, ffn_hidden_size=2 * 14336)
    machine = HARDWARE["h20"]  # it counts no idle last wave
    experts = predict_pieces(workload_of("mixtral-8x7b"), machine)
    plain = predict_pieces(Workload(model=dense, seq_length=8192), machine)
    unit = 8192 * 4096 * 2
    copied_ms = 3 * unit / (4000 * 0.85 * 1e6)
    for piece in ("fc1", "fc2"):
        assert experts.times[piece].forward == pytest.approx(plain.times[piece].forward + copied_ms)
        assert experts.times[piece].weight == pytest.approx(plain.times[piece].weight)
    kept, of_dense = experts.workload.kept_tensors, plain.workload.kept_tensors
    assert kept["norm2 output"] == 3 * of_dense["norm2 output"]
    assert kept["fc1 output"] == of_dense["fc1 output"]


def test_dense_layers_before_those_with_experts():
    """DeepSeek-V2-Lite: its first MLP is 10944 wide, where 11264 are active."""
    model = model_of("deepseek-v2-lite")
    assert model.layer_kinds == ("dense",) + ("experts",) * 26
    assert model.mlp_share(0) == 10944 / 11264
    pieces = predict_pieces(workload_of("deepseek-v2-lite"), HARDWARE["h20"])
    costs = costs_of_plan(pieces, plan_of(model, p=27), Recompute.NONE)
    fc_ms = sum(pieces.times[piece].forward for piece in ("fc1", "fc2"))
    first, second = (costs.segments[f"stage{s}"] for s in (0, 1))
    lighter = second.forward - first.forward + pieces.times["embedding"].forward
    assert lighter == pytest.approx(fc_ms * (1 - 10944 / 11264))
    helix = plan_of(replace(model, num_layers=26), schedule="helix", num_fold=1)
    with pytest.raises(ValueError, match="in their MLP; plan with a kind for each kind of layer"):
        costs_of_plan(
            predict_pieces(replace(pieces.workload, model=replace(model, num_layers=26)), HARDWARE["h20"]),
            helix,
            Recompute.NONE,
        )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama-2-7b",
            {"data_parallel": 2, "expert_parallel": 2},
            "has no experts for expert-parallel size 2",
        ),
        ("mixtral-8x7b", {"data_parallel": 3, "expert_parallel": 3}, "8 experts cannot be shared by"),
        ("mixtral-8x7b", {"expert_parallel": 8}, "must divide the 1 GPUs of a stage"),
        ("mixtral-8x7b", {"tensor_parallel": 2, "sequence_parallel": False}, "need sequence parallelism"),
        ("llama-2-7b", {"context_parallel": 3}, "8192 tokens cannot be shared by context-parallel size 3"),
    ],
)
def test_layouts_that_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        workload_of(name, **changes)


def test_experts_that_are_refused():
    with pytest.raises(ValueError, match="9 of 8 experts of width 4 cannot be active"):
        Experts(count=8, active=9, ffn_hidden_size=4)
    with pytest.raises(ValueError, match="must not be negative"):
        Experts(count=8, active=2, ffn_hidden_size=4, dense_layers=(-1,))
    with pytest.raises(ValueError, match="a dense layer 32 of 32 layers"):
        replace(
            model_of("mixtral-8x7b"),
            experts=Experts(count=8, active=2, ffn_hidden_size=4, dense_layers=(5, 32)),
        )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama-2-7b", {"num_local_experts": 8}, "'num_local_experts' is not understood"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 of 8 experts"),
        ("mixtral-8x7b", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ("mixtral-8x7b", {"num_local_experts": "many"}, "num_local_experts must be a whole number"),
        ("gpt-oss-20b", {"experts_per_token": 2}, "experts_per_token and num_experts_per_tok differ"),
        ("gpt-oss-20b", {"quantization_config": {}}, "'quantization_config' is not understood"),
        ("gemma-2-9b", {"sliding_window": None}, "sliding_window is missing"),
        ("gemma-2-9b", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' other than"),
        ("gemma-2-9b", {"hidden_activation": "relu"}, "the activation 'relu' of gemma2"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "'moe_layer_freq' other than 1"),
        ("deepseek-v3", {"first_k_dense_replace": 99}, "first_k_dense_replace must be from 0 to 61"),
        ("deepseek-v3", {"first_k_dense_replace": None}, "first_k_dense_replace is missing"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("deepseek-v3", {"rope_head_count": 1}, "'rope_head_count' is not understood"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number above 0"),
        ("qwen3-30b-a3b", {"mlp_only_layers": ["0"]}, "mlp_only_layers must be a list of layers"),
    ],
)  # fmt: skip
def test_configs_of_families_that_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face(name, {**PUBLISHED[name], **changes})


def test_queries_without_a_latent_are_said_to_have_none():
    config = {key: value for key, value in PUBLISHED["deepseek-v2-lite"].items() if key != "q_lora_rank"}
    with pytest.raises(ValueError, match="q_lora_rank is missing; null stands for"):
        from_hugging_face("here", config)


def test_a_profile_keeps_experts_and_latents(tmp_path):
    pieces = predict_pieces(workload_of("deepseek-v2-lite"), HARDWARE["h100"])
    assert Pieces.from_object(json.loads(pieces.to_json())).workload == pieces.workload
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED["deepseek-v2-lite"]))
    assert read_model(str(path)) == pieces.workload.model
