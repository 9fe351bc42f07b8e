"""What a checkpoint of Megatron-LM says of its model is compared with this job's, setting by setting."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from job_settings import job_settings
from test_settings_comparison import OPTIONS, another_value

from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.comparison import MODEL
from megatron.pretrain.checkpoint.megatron_lm import NOT_READ, architecture, compare_theirs
from megatron.pretrain.settings.megatron_flags import REFUSED
from megatron.pretrain.settings.parser import build_parser

ROPE = (
    "--position-embedding-type rope --use-rope-scaling --window-size 9,0 --disable-bias-linear --swiglu "
    "--group-query-attention --num-query-groups 2"
)
YARN = "--position-embedding-type yarn --rotary-scaling-factor 4 --yarn-original-max-position-embeddings 8"
OF_EXPERTS = {name for name in MODEL if name.startswith("moe_")}
OF_YARN = {name for name in MODEL if name.startswith("yarn_")} | {"rotary_scaling_factor"}

DERIVED = {"kv_channels", "yarn_beta_fast", "yarn_beta_slow"}


@pytest.fixture
def options(monkeypatch):
    """Of a job, as either program has them."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    return lambda more=ROPE: dict(job_settings(more).options)


def compared(theirs, here, *allowed):
    common = {"args": argparse.Namespace(**theirs)}
    return compare_theirs(Path("FOLDER"), common, here, allowed, with_optimizer=False)


@pytest.mark.parametrize("name", sorted(MODEL - OF_EXPERTS))
def test_every_setting_of_the_model_is_compared(options, name):
    here = options(YARN if name in OF_YARN else ROPE)
    assert compared(here, here) == []
    other = another_value(OPTIONS[name], here[name])
    # What is left out is at its default, or follows from others.
    silent = {key: value for key, value in here.items() if key != name}
    is_usual = here[name] == build_parser().get_default(name) or name in DERIVED
    for theirs, mine in ((here | {name: other}, here), (silent, here | ({name: other} if is_usual else {}))):
        with pytest.raises(DataError, match=f"^FOLDER .* {OPTIONS[name].option_strings[0]} ") as refused:
            compared(theirs, mine)
        assert "\n" not in str(refused.value)


def test_a_change_on_purpose_is_told(options):
    here = options()
    (change,) = compared(here | {"rotary_base": 77}, here, "rotary-base")
    assert change.text == "--rotary-base 10000 (was 77)"


@pytest.mark.parametrize(
    "theirs",
    [
        {"norm_epsilon": None, "layernorm_epsilon": 1e-5},
        {"window_size": [9, 0]},
        {"add_bias_linear": False, "moe_router_topk": 1, "rotary_scaling_factor": 1.0},
        {"kv_channels": None, "yarn_beta_fast": 7.0},
    ],
    ids=str,
)
def test_what_comes_to_the_same_is_the_same(options, theirs):
    here = options()
    assert compared(here | theirs, here) == []


def test_betas_of_yarn_are_those_of_the_paper(options):
    here = options(YARN)
    assert compared(here | {"yarn_beta_fast": None, "yarn_beta_slow": None}, here) == []
    with pytest.raises(DataError, match="--yarn-correction-range-round-to-int False, this job has True"):
        compared(here | {"yarn_correction_range_round_to_int": False}, here)
    assert compared(options() | {"yarn_correction_range_round_to_int": False}, options()) == []


def test_experts_are_compared_where_there_are_some(options):
    """Of theirs none are read."""
    here = options("--num-experts 4 --disable-bias-linear")
    for name in OF_EXPERTS:
        other = architecture(here | {name: another_value(OPTIONS[name], here[name])})
        assert {key for key, value in architecture(here).items() if value != other[key]} == {name}


@pytest.mark.parametrize("name", NOT_READ)
def test_forms_that_are_not_read_are_refused(options, name):
    here = options()
    with pytest.raises(DataError, match=r"is of a model with .*, which is not read from checkpoints of"):
        compared(here | {name: 2}, here)


# Flags of Megatron's that form a model and are not in the table of those above, by why not.
NEEDS_NO_WORD = {
    "they do nothing without another one that is": """
        mtp-detach-heads mtp-hybrid-override-pattern mtp-standalone mtp-use-repeated-layer cache-mla-latents
        kv-lora-rank mla-down-proj-fusion mscale mscale-all-dim q-lora-rank qk-head-dim qk-pos-emb-head-dim
        v-head-dim rope-type disable-dsa-indexer-rotate-activation disable-dsa-indexer-scoring-relu
        dsa-indexer-head-dim dsa-indexer-k-norm-epsilon dsa-indexer-k-norm-fp32 dsa-indexer-loss-coeff
        dsa-indexer-n-heads dsa-indexer-rope-interleaved dsa-indexer-skip-topk-offset dsa-indexer-topk
        dsa-indexer-topk-freq dsa-indexer-use-sparse-loss dsa-kernel-backend linear-conv-kernel-dim
        linear-key-head-dim linear-num-key-heads linear-num-value-heads linear-value-head-dim
        no-dsa-indexer-rotate-activation no-dsa-indexer-scoring-relu disable-mamba-mem-eff-path
        mamba-head-dim mamba-inference-conv-states-dtype mamba-inference-ssm-states-dtype mamba-num-groups
        mamba-num-heads mamba-state-dim mamba-training-ssm-states-dtype use-fused-weighted-squared-relu
        mup-base-head-dim mup-base-hidden-size mup-embedding-mult mup-output-mult mup-width-mult
        relative-attention-max-distance relative-attention-num-buckets
    """,
    "the kind of positions is compared": "no-position-embedding",
    "how the same function is computed": """
        kitchen-attention-backend use-kitchen-attention log-max-attention-logit flash-attention-version
        disable-bf16-reduced-precision-matmul fused-residual-rmsnorm onnx-safe use-te-activation-func
        tensor-parallel-num-weight-shards
    """,
    "how weights began, and how they change": """
        qk-clip data-parallel-random-init embedding-init-method-std init-method-xavier-uniform
        no-initialization
    """,
    "what other programs than pretrain_gpt.py read": """
        decoder-num-layers encoder-num-layers decoder-seq-length encoder-seq-length yaml-cfg
    """,
}


def test_no_form_of_a_model_is_forgotten():
    topics = ("multi-token", "latent attention", "this attention", "layers of several", "mup ", "a form of")
    formed = {
        flag for reason, flags in REFUSED.items() if reason.startswith(topics) for flag in flags.split()
    }
    refused = {name.replace("_", "-") for name in NOT_READ}
    explained = {flag for flags in NEEDS_NO_WORD.values() for flag in flags.split()}
    assert formed - refused == explained
    assert not refused & explained
