"""Model files: what is understood is read, what decides nothing passed over, the rest refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan.cost_model import MODELS, read_model
from helixpipe.plan.cost_model.hugging_face import FAMILIES, NO_SIZE, UNDERSTOOD
from helixpipe.plan.cost_model.script import NEUTRAL, PATTERNS, SIZES, SWITCHES
from megatron.pretrain.settings.parser import build_parser

LLAMA = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "hidden_act": "silu", "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
QWEN = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "max_window_layers": 36, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
}  # fmt: skip
GPT2 = {
    "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "activation_function": "gelu_new",
    "n_ctx": 1024, "resid_pdrop": 0.1,
}  # fmt: skip
SCRIPT = (
    "pretrain_gpt.py --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --ffn-hidden-size 14336 --swiglu --untie-embeddings-and-output-weights "
    "--vocab-size 128256"
)
ARRAYS = """#!/bin/bash
#SBATCH --nodes 4 --exclusive
# was: --swiglu --num-layers 12
GPUS=8
DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS  # --num-layers 7
    --nnodes "$SLURM_NNODES"
)
MODEL_ARGS=(--num-layers 32 --hidden-size 4096
    --num-attention-heads 32 --group-query-attention --num-query-groups 8)
MORE="--ffn-hidden-size 14336 --swiglu \\
  --untie-embeddings-and-output-weights --bf16"
mkdir --parents out; echo "--num-experts 8"
srun torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py "${MODEL_ARGS[@]}" $MORE --vocab-size=128256 \\
    --data-path $DATA --lr 1e-4 "$@"
# next: --num-layers 24
"""


@pytest.fixture
def read(tmp_path):
    def read(content, name="model", **options):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_model(str(path), **options)

    return read


@pytest.fixture
def refused(read):
    def refused(content, **options):
        with pytest.raises(ValueError, match=r"^model ") as caught:
            read(content, **options)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return refused


def sizes(model):
    """Without what Megatron's arguments leave open."""
    return replace(model, name="", other_parameters=0)


def test_one_model_in_every_form(read):
    """Llama 3 8B has 8.03 billion weights."""
    expected = sizes(read(LLAMA))
    assert expected.parameters / 1e9 == pytest.approx(8.03, abs=0.005)
    as_json = {
        "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "group_query_attention": True,
        "num_query_groups": 8, "ffn_hidden_size": 14336, "swiglu": True, "vocab_size": 128256,
        "untie_embeddings_and_output_weights": True, "num_experts": None, "fp8": False,
    }  # fmt: skip
    command = SCRIPT.replace("pretrain_gpt.py", "python -m helixpipe train --nproc-per-node 8 --dry-run h20")
    for content in (SCRIPT, ARRAYS, command, as_json, {**LLAMA, "model_type": "llama", "mlp_bias": False}):
        assert sizes(read(content)) == expected
    without = SCRIPT.replace("--vocab-size 128256", "")
    assert sizes(read(without, vocab_size=128256)) == expected


def test_experts_in_a_script(read):
    """A token passes as many as Megatron's default says, and they are as wide as the MLP would be."""
    experts = read(f"{SCRIPT} --num-experts 8").experts
    assert (experts.count, experts.active, experts.ffn_hidden_size) == (8, 2, 14336)
    experts = read(f"{SCRIPT} --num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 768").experts
    assert (experts.count, experts.active, experts.ffn_hidden_size) == (16, 4, 768)


def test_published_configs(read):
    assert sizes(read(QWEN)) == sizes(MODELS["qwen3-8b"])
    gpt2 = read(GPT2)
    assert (gpt2.gated, gpt2.tied, gpt2.ffn_hidden_size, gpt2.head_dim) == (False, True, 3072, 64)
    assert sizes(read({**GPT2, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})) == sizes(gpt2)


def test_windows_of_layers(read):
    """As the architectures read them: Mistral all layers, Qwen those from max_window_layers on."""
    assert read(QWEN).windows == ()
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 4096}
    assert read(mistral).windows == (4096,) * LLAMA["num_hidden_layers"]
    assert read({**mistral, "sliding_window": None}).windows == ()
    qwen = {**QWEN, "use_sliding_window": True, "sliding_window": 8192, "max_window_layers": 30}
    assert read(qwen).windows == (0,) * 30 + (8192,) * 6
    kinds = ["sliding_attention", "full_attention"] * 18
    mixed = read({**QWEN, "use_sliding_window": True, "sliding_window": 512, "layer_types": kinds})
    assert mixed.windows == (512, 0) * 18
    assert mixed.layer_kinds == ("window512", "full") * 18


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # Sizes as their authors published them; each was read as another, dense model.
        (
            {**LLAMA, "num_local_experts": 8, "num_experts_per_tok": 2},
            "'num_local_experts' is not understood",
        ),
        ({**LLAMA, "hidden_act": "gelu_pytorch_tanh"}, "'model_type' is missing"),
        ({**LLAMA, "model_type": "gemma"}, "the architecture 'gemma' is not understood; known: llama"),
        ({**LLAMA, "model_type": "gemma3"}, "give its text_config"),
        ({**LLAMA, "model_type": ["llama"]}, "the architecture ['llama']"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": "4k"}, "sliding_window must be a whole number"),
        ({**QWEN, "layer_types": ["chunked_attention"] * 36}, "'layer_types' beside full_attention and"),
        ({**QWEN, "layer_types": ["sliding_attention"] * 36}, "sliding_window is missing"),
        (
            {**QWEN, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4096},
            "2 'layer_types' for 36 layers",
        ),
        ({**QWEN, "architectures": ["Qwen3ForSequenceClassification"]}, "of qwen3 only Qwen3ForCausalLM is"),
        ({**QWEN, "hidden_act": "relu2"}, "the activation 'relu2' of qwen3"),
        ({**QWEN, "tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or false"),
        ({k: v for k, v in QWEN.items() if k != "head_dim"}, "head_dim is missing"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "add --vocab-size N"),
        ({k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}, "'model_type' is missing"),
        (
            {k: v for k, v in LLAMA.items() if k != "intermediate_size"},
            "intermediate_size or n_inner is missing",
        ),
        ({**LLAMA, "num_attention_heads": 31}, "cannot be shared by 31 heads"),
        ({**LLAMA, "vocab_size": True}, "vocab_size must be a whole number above 0"),
        ({**LLAMA, "text_config": {}}, "'text_config' is not understood"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "'quantization_config' is not understood"),
        ({"hidden_size": 64}, "'model_type' is missing"),
        ([], "expected a JSON object of sizes"),
    ],
)
def test_configs_that_are_refused(refused, config, message):
    assert message in refused(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{SCRIPT} --num-experts 4 --moe-layer-freq 0,1", "'0,1' says not which layers have experts"),
        (f"{SCRIPT} --fp8-format hybrid", "--fp8-format is not understood"),
        (f"{SCRIPT} --multi-latent-attention", "--multi-latent-attention is not understood"),
        (f"{SCRIPT} --pipeline-model-parallel-layout Et|tL", "--pipeline-model-parallel-layout"),
        (SCRIPT.replace("--num-layers 32", "--num-layers $LAYERS"), "--num-layers is the variable $LAYERS"),
        (SCRIPT.replace("--num-layers 32", "--num-layers ${L:-8}"), "--num-layers is the variable ${L:-8}"),
        (SCRIPT.replace("--num-layers 32", "--num-layers=`nproc`"), "--num-layers is the variable `nproc`"),
        (SCRIPT.replace("--num-layers 32", "--num-layers"), "--num-layers has no value"),
        (f"{SCRIPT} $EXTRA", "takes arguments from $EXTRA, which the file does not set"),
        (f"pretrain_gpt.py ${{MODEL_ARGS[@]}} {SCRIPT.partition(' ')[2]}", "from $MODEL_ARGS"),
        (f"{SCRIPT} --num-layers 24", "--num-layers is given twice, 32 and 24"),
        (f"A='--num-layers 24'\n{SCRIPT}", "--num-layers is given twice"),
        (SCRIPT.replace("--vocab-size 128256", "--tokenizer-model t.model"), "add --vocab-size N"),
        (SCRIPT.replace("--ffn-hidden-size 14336", ""), "--swiglu without --ffn-hidden-size"),
        (SCRIPT.replace("--group-query-attention", ""), "--num-query-groups needs --group-query-attention"),
        (SCRIPT.replace("4096", "big"), "hidden_size must be a whole number above 0, found 'big'"),
        (f"{SCRIPT} 'open", "is no shell script (No closing quotation)"),
        ("--num-layers 4 --vocab-size 9", "hidden_size is missing"),
        ("./train --hidden-size 8 --moe-latent-size 2", "--moe-latent-size is not understood"),
        ("", "add --vocab-size N"),
        ("[" * 100000, "add --vocab-size N"),
        (f"# {SCRIPT}", "add --vocab-size N"),
    ],
)
def test_scripts_that_are_refused(refused, text, message):
    assert message in refused(text)


def test_a_vocabulary_is_given_once(refused, read):
    assert "leave --vocab-size out" in refused(LLAMA, vocab_size=5)
    with pytest.raises(ValueError, match="--vocab-size is part of the model llama-7b"):
        read_model("llama-7b", 32000)


def test_values_of_other_flags_may_be_variables(read):
    assert sizes(read(f'{SCRIPT} --seq-length $S --data-path "$A" --save ${{B}} --bf16 "$@"')) == sizes(
        read(SCRIPT)
    )


KEYS = st.from_regex(r"[a-z][a-z_]{2,20}", fullmatch=True)


@settings(deadline=None, max_examples=60, database=None)
@given(key=KEYS, value=st.sampled_from([0, 1, 8, True, False, "x", [1], {"a": 1}]))
def test_whatever_is_not_known_is_refused_by_name(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp("models") / "model"
    if key not in (*UNDERSTOOD, *NO_SIZE):
        path.write_text(json.dumps({**LLAMA, key: value}))
        with pytest.raises(ValueError, match=f"'{key}' is not understood"):
            read_model(str(path))
    flag = key.replace("_", "-")
    if flag not in SIZES | SWITCHES | NEUTRAL | PATTERNS:
        path.write_text(f"{SCRIPT} --{flag}")
        with pytest.raises(ValueError, match=f"--{flag} is not understood"):
            read_model(str(path))


def test_training_has_no_option_that_model_files_do_not_know():
    """A new option of pretrain_gpt.py is put into one of the tables of script.py, on purpose."""
    flags = {flag[2:] for a in build_parser()._actions for flag in a.option_strings if flag.startswith("--")}
    assert sorted(flags - {"help"} - SIZES - SWITCHES - NEUTRAL - PATTERNS) == []
    assert not (SIZES | SWITCHES) & NEUTRAL
    assert not set(UNDERSTOOD) & set(NO_SIZE)
    assert all(family.architecture.endswith(("ForCausalLM", "LMHeadModel")) for family in FAMILIES.values())


@pytest.mark.parametrize("name", ["quickstart", "elastic"])
def test_the_examples_are_model_files(name):
    model = read_model(str(Path(__file__).parents[2] / "examples" / f"{name}.sh"))
    assert (model.num_layers, model.vocab_size, model.gated, model.tied) == (4, 1024, True, False)
