"""Options for mixtures of experts: what goes together, what is filled in, and what Megatron's layer gets."""

import dataclasses

import pytest
from job_settings import DATASET, job_settings
from megatron.core.transformer import TransformerConfig

from helixpipe.plan.cost_model.hugging_face import from_hugging_face
from helixpipe.plan.layer_patterns import parse_expert_frequency
from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families import command_line, describe_model
from megatron.pretrain.model import build_config
from megatron.pretrain.settings.arguments import parse_arguments

EXPERTS = "--num-experts 8 --disable-bias-linear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--moe-router-topk 3", "--moe-router-topk needs --num-experts; add it"),
        ("--moe-ffn-hidden-size 64", "--moe-ffn-hidden-size needs --num-experts"),
        ("--moe-grouped-gemm", "--moe-grouped-gemm needs --num-experts"),
        ("--expert-tensor-parallel-size 2", "--expert-tensor-parallel-size needs --num-experts"),
        (
            "--num-experts 8 --moe-shared-expert-intermediate-size 64",
            "--moe-shared-expert-intermediate-size needs --disable-bias-linear",
        ),
        (f"{EXPERTS} --sandwich-norm", "does not go with --sandwich-norm"),
        (f"{EXPERTS} --moe-router-topk 9", "topk 9 of --num-experts 8; use at most 8"),
        (f"{EXPERTS} --moe-router-topk 1", "--moe-router-topk 1 needs --moe-router-pre-softmax"),
        (
            f"{EXPERTS} --moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1",
            "does not apply to --moe-router-load-balancing-type none; remove it",
        ),
        (f"{EXPERTS} --moe-token-drop-policy position", "needs --moe-expert-capacity-factor"),
        (
            f"{EXPERTS} --moe-router-load-balancing-type sinkhorn --moe-expert-capacity-factor 2",
            "does not go with balancing by sinkhorn",
        ),
        (f"{EXPERTS} --moe-router-num-groups 4", "need each other; give both"),
        (f"{EXPERTS} --moe-router-num-groups 3 --moe-router-group-topk 1", "3 must divide --num-experts 8"),
        (f"{EXPERTS} --moe-router-num-groups 2 --moe-router-group-topk 4", "must be at most that"),
        (f"{EXPERTS} --expert-tensor-parallel-size 2", "must divide the 1 ranks of a stage"),
        (
            f"{EXPERTS} --moe-grouped-gemm --transformer-impl local",
            "needs --transformer-impl transformer_eng",
        ),
        (
            f"{EXPERTS} --moe-aux-loss-coeff 0.1 --mlp-chunk-size 8",
            "--moe-aux-loss-coeff is about all tokens of a micro batch, and --mlp-chunk-size runs",
        ),
        (
            f"{EXPERTS} --moe-z-loss-coeff 0.1 --pipeline-schedule seq1f1b --num-slices 2",
            "--moe-z-loss-coeff is about all tokens of a micro batch, and seq1f1b runs them in parts",
        ),
        (
            f"{EXPERTS} --recompute-granularity selective --recompute-modules mlp",
            "--recompute-modules mlp finds none in a model with --num-experts; use moe",
        ),
        (
            "--recompute-granularity selective --recompute-modules moe",
            "--recompute-modules moe finds none in a model without --num-experts; use mlp",
        ),
        ("--moe-layer-freq 2", "--moe-layer-freq needs --num-experts; add it"),
        (f"{EXPERTS} --moe-layer-freq [1,0]", "--moe-layer-freq has 2 layers, and --num-layers is 4"),
        (f"{EXPERTS} --moe-layer-freq [0]*4", "leaves no layer with experts; leave --num-experts out"),
        (
            f"{EXPERTS} --moe-layer-freq 2 --pipeline-schedule elastic",
            "--moe-layer-freq does not go with elastic, which plans for layers that are all alike",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        job_settings(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--tensor-model-parallel-size 2",
            "--num-experts with --tensor-model-parallel-size needs --sequence",
        ),
        ("--num-experts 9 --expert-model-parallel-size 2", "9 cannot be shared out evenly over .* 2"),
        ("--expert-model-parallel-size 4", "4 x --expert-tensor-parallel-size 1 must divide the 2 ranks"),
        (
            "--moe-ffn-hidden-size 63 --expert-tensor-parallel-size 2",
            "63 must be a multiple of --expert-tensor",
        ),
        (
            "--context-parallel-size 2 --moe-aux-loss-coeff 0.1",
            "--moe-aux-loss-coeff is about all tokens of a micro batch, and --context-parallel-size",
        ),
        (
            "--expert-model-parallel-size 2 --pipeline-schedule elastic",
            "does not go with elastic, under which every data-parallel rank has chunks of its own; use 1",
        ),
        ("--pipeline-schedule elastic-helix", "^--num-experts does not go with elastic-helix; leave it out"),
        (
            "--expert-model-parallel-size 2 --pipeline-schedule elastic-helix",
            "does not go with elastic-helix, under which every data-parallel rank has chunks of its own",
        ),
    ],
)
def test_ranks_that_cannot_share_experts_are_refused(monkeypatch, options, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        job_settings(f"{EXPERTS} {options}")


def test_experts_with_biases_are_whole_on_a_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    biased = "--num-experts 8 --tensor-model-parallel-size 2 --sequence-parallel"
    with pytest.raises(ValueError, match="are whole on a rank; add --expert-tensor-parallel-size 1, or"):
        job_settings(biased)
    assert job_settings(f"{biased} --expert-tensor-parallel-size 1").model.add_bias_linear


def test_ranks_that_share_sequences_share_experts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = job_settings(f"{EXPERTS} --context-parallel-size 2 --expert-model-parallel-size 2")
    assert shared.parallel.expert_model_parallel_size == 2


def test_experts_are_planned_as_they_are_shared_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert job_settings(f"{EXPERTS} --expert-model-parallel-size 2").workload.expert_parallel == 2


def test_what_is_left_out_is_as_in_megatron():
    dense, experts = job_settings(), job_settings(f"{EXPERTS} --ffn-hidden-size 96")
    assert (dense.experts.num_experts, dense.experts.moe_ffn_hidden_size) == (None, None)
    assert experts.experts.moe_ffn_hidden_size == 96
    assert experts.workload.model.experts.active == experts.experts.moe_router_topk == 2
    assert build_config(dense).num_moe_experts is None


def test_megatrons_layer_gets_what_is_asked_for():
    config = build_config(
        job_settings(
            f"{EXPERTS} --moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 40 "
            "--moe-router-topk 4 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 "
            "--moe-z-loss-coeff 0.001 --moe-router-score-function sigmoid "
            "--moe-router-topk-scaling-factor 2.5 --moe-router-num-groups 4 "
            "--moe-router-group-topk 2 --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall "
            "--moe-expert-capacity-factor 1.5 --moe-token-drop-policy position --moe-router-pre-softmax"
        )
    )
    # What else a release has is as it is there.
    defaults = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    found = {
        name: value
        for name, value in vars(config).items()
        if name.startswith("moe_") and value != defaults[name]
    }
    assert found == {
        "moe_ffn_hidden_size": 48,
        "moe_shared_expert_intermediate_size": 40,
        "moe_router_topk": 4,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 0.001,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": 1.5,
        "moe_token_drop_policy": "position",
        "moe_router_pre_softmax": True,
    }


CONFIG = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000, "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mixtral", "num_local_experts": 8, "sliding_window": None},
        {"model_type": "qwen3_moe", "num_experts": 16, "moe_intermediate_size": 24, "norm_topk_prob": True},
        {"model_type": "qwen3_moe", "num_local_experts": 16, "moe_intermediate_size": 24},
        {
            "model_type": "qwen3_moe",
            "num_experts": 16,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        {
            "model_type": "gpt_oss",
            "num_local_experts": 8,
            "sliding_window": 9,
            "rope_parameters": {"rope_type": "default"},
        },
    ],
)
def test_what_is_planned_is_what_is_trained(fields):
    """The planner reads config.json, training the options that an import prints: a token's experts count."""
    config = {**CONFIG, **fields}
    planned = from_hugging_face("config.json", config)
    words = command_line(describe_model(ModelConfig(config, "config.json")))
    training = (
        "--seq-length 32 --micro-batch-size 1 --global-batch-size 8 --train-iters 1 --lr 1 --data-path no"
    )
    trained = parse_arguments([*words, *training.split()], DATASET).workload.model
    assert trained.experts == planned.experts
    assert trained.experts.active == 2
    assert trained.forward_flops(32) == planned.forward_flops(32)
    assert trained.layer_kinds == planned.layer_kinds
    assert [trained.expert_parameters(i) for i in range(4)] == [
        planned.expert_parameters(i) for i in range(4)
    ]
    # Of all experts' products, those of two; each of these models has experts in its second layer.
    width, count = trained.experts.ffn_hidden_size, trained.experts.count
    assert trained.expert_parameters(1) == count * 3 * 64 * width
    assert trained.mlp_width == 2 * width


def test_experts_of_every_token_are_counted():
    shared = job_settings(f"{EXPERTS} --moe-shared-expert-intermediate-size 40").workload.model
    without = job_settings(EXPERTS).workload.model
    assert shared.dense_parameters(0) == 2 * 64 * 40
    assert shared.parameters - without.parameters == 4 * 2 * 64 * 40
    assert shared.only_planned == ()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("1", 1), ("[1,1,1,1]", 1), ("2", (1, 0, 1, 0)), ("[0,1,1,0]", (0, 1, 1, 0)),
        ("([0]*3+[1]*1)", (0, 0, 0, 1)), ("([0]+[1])*2", (0, 1, 0, 1)), ("5", (1, 0, 0, 0)),
    ],
)  # fmt: skip
def test_layers_have_experts_as_megatrons_option_says(text, pattern):
    settings = job_settings(f"{EXPERTS} --moe-layer-freq {text}")
    assert settings.experts.moe_layer_freq == settings.options["moe_layer_freq"] == pattern
    model = settings.workload.model
    found = [model.has_experts(layer) for layer in range(4)]
    assert found == [bool(has) for has in ((1,) * 4 if pattern == 1 else pattern)]
    assert build_config(settings).moe_layer_freq == (1 if pattern == 1 else list(pattern))


@pytest.mark.parametrize(
    "text", ["0", "-1", "[2,1]", "[]", "[1]*0", "[1]**2", "x", "[1,1", "[[1]]", "[1]*99999999", "[1],[0]"]
)
def test_other_texts_say_not_which_layers_have_experts(text):
    with pytest.raises(ValueError, match="says not which layers have experts; give a period like 2"):
        parse_expert_frequency(text)


def test_layers_with_and_without_experts_have_costs_of_their_own():
    helix = f"{EXPERTS} --moe-layer-freq [0,1,0,1] --pipeline-schedule helix"
    names = job_settings(helix).schedule.plan.segment_names
    assert sum("experts" in name for name in names) > 0 < sum("dense" in name for name in names)
    alike = job_settings(f"{EXPERTS} --pipeline-schedule helix").schedule.plan.segment_names
    assert not any("experts" in name for name in alike)


def test_auto_chooses_no_schedule_that_parts_what_a_loss_is_about(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    job = (
        f"{EXPERTS} --pipeline-schedule auto --hardware h20 --pipeline-model-parallel-size 4 --swiglu "
        "--global-batch-size 1 --seq-length 131072 --bf16 --untie-embeddings-and-output-weights"
    )
    assert job_settings(job).schedule.execution.cuts_sequences
    assert not job_settings(f"{job} --moe-aux-loss-coeff 0.1").schedule.execution.cuts_sequences
