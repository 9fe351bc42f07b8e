"""Conversion of models on Hugging Face: what is refused, what is in memory, tables of other sizes."""

import argparse
import gc
import json
import shutil
import weakref
from enum import Enum
from itertools import product

import pytest
import torch

pytest.importorskip("safetensors", reason="needs the extra hf")

from safetensors.torch import load_file, save_file

from helixpipe.__main__ import main as helixpipe
from helixpipe.data.prefix import DatasetInfo
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.comparison import CHANGES_NOTHING, MODEL, compare_model
from megatron.pretrain.checkpoint.files import LINEAGE, MANIFEST, tracked
from megatron.pretrain.hf import convert
from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.convert import export_model, import_model
from megatron.pretrain.hf.families import describe_model
from megatron.pretrain.hf.parts import CheckpointReader
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.parser import build_parser

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

GEMMA_2 = {
    "model_type": "gemma2", "hidden_act": None, "head_dim": 4, "query_pre_attn_scalar": 16,
    "sliding_window": 9,
}  # fmt: skip

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_3_MOE = {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "head_dim": 4, "norm_topk_prob": True,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4,
    "sliding_window": 9, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
}  # fmt: skip

DATASET = DatasetInfo(
    prefix="unused", vocab_size=50, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)


class Backend(Enum):
    """An object among Megatron-LM's arguments whose class this program does not know."""

    FLASH = 1


def shapes(config):
    h, ffn, d = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // 4
    table = [config["vocab_size"], h]
    yield from (("model.embed_tokens.weight", table), ("model.norm.weight", [h]))
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", table
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}."
        for name, rows in (("q", 4 * d), ("k", 2 * d), ("v", 2 * d)):
            yield f"{here}self_attn.{name}_proj.weight", [rows, h]
        yield f"{here}self_attn.o_proj.weight", [h, 4 * d]
        yield from ((f"{here}mlp.{name}_proj.weight", [ffn, h]) for name in ("gate", "up"))
        yield f"{here}mlp.down_proj.weight", [h, ffn]
        yield from ((f"{here}{name}_layernorm.weight", [h]) for name in ("input", "post_attention"))


def write_model(folder, dtype=torch.bfloat16, **changes):
    config = {**CONFIG, **changes}
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes(config)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return tensors


def described(**changes):
    return describe_model(ModelConfig({**CONFIG, **changes}, "config.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v3"}, "'deepseek_v3' are not supported; those that are: llama"),
        ({"hidden_act": "relu"}, 'hidden_act "relu" is not supported for llama'),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"new_feature": 3}, "new_feature 3 is not understood for llama"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not supported: it",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "also": 1}}, "also"),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5 is not supported"),
        ({"intermediate_size": None}, "has no intermediate_size"),
        ({**MIXTRAL, "router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not supported for mixtral"),
        ({**MIXTRAL, "num_local_experts": None}, "has no num_local_experts"),
        ({**QWEN_3_MOE, "mlp_only_layers": ["0"]}, r'mlp_only_layers \["0"\] is not supported for qwen3_moe'),
        ({**QWEN_3_MOE, "mlp_only_layers": [0, 1, 2]}, "leaves no layer with experts; make it a qwen3"),
        ({**QWEN_3_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step 0 is not supported"),
        ({**QWEN_3_MOE, "num_experts": None}, "has no num_experts"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["chunked_attention"] * 3,
            },
            "layer_types 'chunked_attention' is not supported",
        ),
        (
            {**GEMMA_2, "attn_logit_softcapping": 50.0},
            "has no final_logit_softcapping; add it, null for none",
        ),
        ({**GEMMA_2, "final_logit_softcapping": None}, "has no attn_logit_softcapping; add it"),
        ({"model_type": "mistral"}, "has no sliding_window; add it, null for none"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0}}, "attention_factor"),
        ({**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}, "save the model in bfloat16 first"),
        ({**GPT_OSS, "rope_scaling": None}, "gpt-oss has no rope_scaling; add it"),
        ({**GPT_OSS, "swiglu_alpha": 1.5}, "swiglu_alpha 1.5 is not supported for gpt_oss"),
        ({**GPT_OSS, "experts_per_token": 3}, "experts_per_token 3 is not supported"),
        ({**GPT_OSS, "sliding_window": None}, "has no sliding_window"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "low_freq_factor of llama3's rotary scaling must be 1",
        ),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        described(**changes)


def test_what_was_refused_is_all_that_was_wrong():
    assert described().arguments["num_layers"] == 3
    assert (
        described(rope_scaling={"type": "linear", "factor": 2.0}).arguments[
            "rotary_seq_len_interpolation_factor"
        ]
        == 2.0
    )


def test_a_checkpoint_holds_megatrons_layout(tmp_path):
    theirs = write_model(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "ours")
    reader = CheckpointReader(tracked(tmp_path / "ours"))
    name = "decoder.layers.self_attention.linear_qkv.weight"
    assert tuple(reader.describe(name).size) == (3, 32, 16)
    q, k, v = (theirs[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    # Two groups, each of two queries, a key and a value of four channels.
    expected = torch.cat([q[:8], k[:4], v[:4], q[8:], k[4:], v[4:]])
    assert torch.equal(reader.read(name, (1,)), expected)
    gate, up = (theirs[f"model.layers.2.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(reader.read("decoder.layers.mlp.linear_fc1.weight", (2,)), torch.cat([gate, up]))


def test_layers_with_and_without_experts_have_rules_of_their_own():
    model = described(**QWEN_3_MOE, mlp_only_layers=[1])
    places = [(rule, place) for rule in model.rules for place in product(*map(range, rule.sizes(3).values()))]
    theirs = [name for rule, place in places for name in rule.names(*place)]
    assert len(theirs) == len(set(theirs))
    gates = {name for name in theirs if name.endswith(("mlp.gate.weight", "mlp.gate_proj.weight"))}
    assert gates == {
        f"model.layers.{layer}.mlp.gate{end}.weight" for layer, end in enumerate(("", "_proj", ""))
    }
    ours = {rule.ours: rule.sizes(3) for rule in model.rules}
    assert ours["decoder.layers.2.mlp.experts.experts.linear_fc2.weight"] == {"experts": 4}
    assert ours["decoder.layers.2.pre_mlp_layernorm.weight"] == {}
    assert ours["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"] == {}
    assert model.arguments["moe_layer_freq"] == "[1,0,1]"
    # Layers that are all alike are stacked.
    assert described(**QWEN_3_MOE).rules[-1].ours == "decoder.final_layernorm.weight"
    assert "decoder.layers.pre_mlp_layernorm.weight" in {r.ours for r in described(**QWEN_3_MOE).rules}


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_experts_have_either_of_two_names(name):
    fields = {key: value for key, value in QWEN_3_MOE.items() if key != "num_experts"} | {name: 4}
    arguments = described(**fields).arguments
    assert (arguments["num_experts"], arguments["moe_ffn_hidden_size"]) == (4, 8)
    assert "moe_router_pre_softmax" not in arguments
    assert described(**fields | {"norm_topk_prob": False}).arguments["moe_router_pre_softmax"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "has a tensor extra, which its config.json does not"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(16).int()}), "has the type I32"),
    ],
    ids=["missing", "left", "type"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(spoil, message, tmp_path):
    tensors = write_model(tmp_path / "hf")
    spoil(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "hf", tmp_path / "ours")


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    tensors = write_model(tmp_path / "hf", tie_word_embeddings=True)
    for name, value in (("same", 0.0), ("other", 1.0)):
        head = tensors["model.embed_tokens.weight"] + value
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "hf" / "model.safetensors")
        if name == "same":
            import_model(tmp_path / "hf", tmp_path / name)
            continue
        with pytest.raises(ValueError, match=r"tied to .*, but holds other"):
            import_model(tmp_path / "hf", tmp_path / name)


def test_rows_of_zeros_are_added_and_left_out_again(tmp_path):
    theirs = write_model(tmp_path / "hf")
    words = import_model(tmp_path / "hf", tmp_path / "ours", padded_rows=64)
    assert words[words.index("--padded-vocab-size") + 1] == "64"
    table = CheckpointReader(tracked(tmp_path / "ours")).read("output_layer.weight", ())
    assert table.shape == (64, 16)
    assert not table[50:].any()
    export_model(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(ValueError, match="--padded-vocab-size 49 is less than the model's 50"):
        import_model(tmp_path / "hf", tmp_path / "other", padded_rows=49)


def test_a_few_tensors_are_in_memory_at_a_time(tmp_path, monkeypatch):
    theirs = write_model(tmp_path / "hf", num_hidden_layers=20)
    live, peak = [0], [0]

    def counted(function):
        def call(self, *arguments):
            tensor = function(self, *arguments)
            size = tensor.nbytes
            live[0] += size
            peak[0] = max(peak[0], live[0])
            weakref.finalize(tensor, lambda: live.__setitem__(0, live[0] - size))
            return tensor

        return call

    for owner in (convert.TensorFolder, convert.CheckpointReader):
        monkeypatch.setattr(owner, "read", counted(owner.read))
    whole = sum(tensor.nbytes for tensor in theirs.values())
    largest = max(tensor.nbytes for tensor in theirs.values())
    import_model(tmp_path / "hf", tmp_path / "ours")
    gc.collect()
    assert peak[0] <= 3 * largest < whole / 10  # QKV is made of three
    live[0] = peak[0] = 0
    export_model(tmp_path / "ours", tmp_path / "back", shard_bytes=4096)
    assert peak[0] <= 4096 + 3 * largest < whole / 5
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 5
    back = {name: t for file in files for name, t in load_file(tmp_path / "back" / file).items()}
    assert back.keys() == theirs.keys() == index["weight_map"].keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    # Several files are read, too.
    import_model(tmp_path / "back", tmp_path / "again")


def test_a_configuration_of_another_model_is_refused(tmp_path):
    write_model(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "ours")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 500000.0}))
    with pytest.raises(ValueError, match="trained with --rotary-base 10000 and not the 500000 of"):
        export_model(tmp_path / "ours", tmp_path / "back", reference=other)
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_of_training_is_exported_with_megatrons_arguments_in_it(tmp_path):
    """Training writes them for Megatron-LM; plain loading refuses their class."""
    write_model(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "ours")
    common_file = tracked(tmp_path / "ours") / "common.pt"
    common = torch.load(common_file)
    torch.save({**common, "args": argparse.Namespace(num_layers=3)}, common_file)
    export_model(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_checkpoint_of_megatrons_program_is_exported(tmp_path):
    """It has neither our settings nor our sums."""
    write_model(tmp_path / "hf")
    words = import_model(tmp_path / "hf", tmp_path / "theirs")
    options = vars(build_parser().parse_args([*words, *convert._TRAINING])) | {"padded_vocab_size": 50}
    folder = tracked(tmp_path / "theirs")
    (folder / MANIFEST).unlink()
    (folder / LINEAGE).unlink()

    def save(**changes):
        torch.save({"iteration": 0, "args": argparse.Namespace(**options | changes)}, folder / "common.pt")

    save(rotary_base=5, attention_backend=Backend.FLASH)
    shutil.rmtree(tmp_path / "theirs" / convert.REFERENCE)
    with pytest.raises(
        ValueError, match=r"theirs was not imported; give the folder of its model .* --reference"
    ):
        export_model(tmp_path / "theirs", tmp_path / "back")
    with pytest.raises(ValueError, match="trained with --rotary-base 5 and not the 10000 of"):
        export_model(tmp_path / "theirs", tmp_path / "back", reference=tmp_path / "hf")
    save(attention_backend=Backend.FLASH)
    export_model(tmp_path / "theirs", tmp_path / "back", reference=tmp_path / "hf")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    (shard,) = folder.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[content.index(before["model.norm.weight"].view(torch.uint8).numpy().tobytes())] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"final_layernorm.weight has another checksum"):
        export_model(tmp_path / "theirs", tmp_path / "again", reference=tmp_path / "hf")


def test_flipped_bits_are_noticed_by_an_export(tmp_path):
    write_model(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "ours")
    (path,) = tracked(tmp_path / "ours").glob("*.distcp")
    data = path.read_bytes()
    tensor = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    place = data.index(tensor.view(torch.uint8).numpy().tobytes())
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(ValueError, match=r"linear_fc2.weight has another sum"):
        export_model(tmp_path / "ours", tmp_path / "back")


def test_the_command_prints_options_that_training_takes(tmp_path, capsys):
    write_model(tmp_path / "hf")
    folders = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ours")]
    assert helixpipe(["convert", "import", *folders, "--dtype", "float32"]) == 0
    words = capsys.readouterr().out.replace("\\\n", " ").split()
    training = (
        "--seq-length 8 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1 --data-path x"
    )
    args = build_parser().parse_args([*words, *training.split()])
    assert str(args.pretrained_checkpoint) == str(tmp_path / "ours")
    assert (args.num_query_groups, args.norm_epsilon, args.swiglu) == (2, 1e-6, True)
    folders = ["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "back")]
    assert helixpipe(["convert", "export", *folders]) == 0
    assert load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"].dtype is torch.float32
    assert helixpipe(["convert", "export", *folders]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert helixpipe(["convert", "export", *folders, "--padded-vocab-size", "9"]) == 2
    assert "--padded-vocab-size does not apply to export; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "--rotary-base 500000",
            "with --rotary-base 10000, this job has 500000; .* --allow-changed rotary-base",
        ),
        ("--rotary-base 500000 --allow-changed rotary-base", ""),
        ("--num-layers 4", "with --num-layers 3, this job has 4; give the same, or use another checkpoint"),
        ("--lr-decay-iters 9 --seq-length 16 --adam-beta1 0.5", ""),
    ],
    ids=str,
)
def test_weights_are_compared_with_the_model_of_the_job(changes, message, tmp_path):
    write_model(tmp_path / "hf")
    words = import_model(tmp_path / "hf", tmp_path / "ours")
    training = "--seq-length 8 --micro-batch-size 1 --global-batch-size 1 --train-iters 10 --lr 1"
    options = [
        *words,
        *training.split(),
        "--pretrained-checkpoint",
        str(tmp_path / "ours"),
        "--data-path",
        "x",
    ]
    settings = parse_arguments([*options, *changes.split()], dataset=DATASET)
    common = torch.load(tracked(tmp_path / "ours") / "common.pt", weights_only=True)
    if message:
        with pytest.raises(DataError, match=message):
            compare_model(common["settings"], settings, "FOLDER")
    else:
        found = compare_model(common["settings"], settings, "FOLDER")
        assert [change.text for change in found] == ["--rotary-base 500000 (was 10000)"] * (
            "allow" in changes
        )


def test_every_option_of_the_model_is_compared():
    """An option that is added to the model, and that its outputs depend on, must be in the list."""
    groups = [g for g in build_parser()._action_groups if g.title in ("model", "mixture of experts")]
    assert len(groups) == 2
    names = {action.dest for group in groups for action in group._group_actions} - CHANGES_NOTHING
    of_training = {
        "seq_length",
        "max_position_embeddings",
        "attention_dropout",
        "hidden_dropout",
        "init_method_std",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_dtype",
    }
    assert names - of_training == MODEL
