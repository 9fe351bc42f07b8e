"""Tiny random models of every family on Hugging Face, and what each rank computes with them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from models import (
    VOCABULARY,
    Case,
    batches,
    everywhere,
    gather_gradients,
    initialize,
    relative_error,
    run_iteration,
)
from ranks import run_on_ranks
from safetensors.torch import load_file
from stages import batch_of, run_segments

from helixpipe.data.prefix import DatasetInfo
from helixpipe.megatron_adapter.schedule import make_forward_backward
from helixpipe.runtime.trace import HostClock
from megatron.pretrain.checkpoint.checkpoint import load_weights
from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.convert import export_model, import_model
from megatron.pretrain.hf.families import describe_model
from megatron.pretrain.hf.families.family import Model
from megatron.pretrain.model import build_training_state, unwrap
from megatron.pretrain.settings.arguments import parse_arguments

DATASET = DatasetInfo(
    prefix="made up",
    vocab_size=VOCABULARY,
    eod=0,
    num_documents=100,
    num_tokens=10_000,
    longest_document=500,
)
_SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large enough that every gradient is far from rounding noise.
    "initializer_range": 0.2,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip

# Fields of config.json by the name of the family and of what is special.
TINY: dict[str, dict[str, Any]] = {
    "llama-2": {"model_type": "llama", **_SIZES},
    "llama-3.1": {"model_type": "llama", **_SIZES, "rope_parameters": {**_LLAMA3, "factor": 8.0}},
    "llama-3.2": {
        "model_type": "llama", **_SIZES, "tie_word_embeddings": True, "head_dim": 16,
        "rope_parameters": {**_LLAMA3, "factor": 32.0},
    },
    "llama-linear": {
        "model_type": "llama", **_SIZES,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama-yarn": {
        "model_type": "llama", **_SIZES, "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "qwen-2.5": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True},
    "qwen-2.5-window": {
        "model_type": "qwen2", **_SIZES, "use_sliding_window": True, "sliding_window": 7,
        "max_window_layers": 2,
    },
    "qwen-3": {"model_type": "qwen3", **_SIZES, "head_dim": 16},
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 7},
    "mixtral": {"model_type": "mixtral", **_SIZES, "num_local_experts": 4},
    "qwen-3-moe": {
        "model_type": "qwen3_moe", **_SIZES, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 40, "norm_topk_prob": True,
    },
    "qwen-3-moe-plain": {
        "model_type": "qwen3_moe", **_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "moe_intermediate_size": 24, "norm_topk_prob": False,
    },
    "qwen-3-moe-sparse": {
        "model_type": "qwen3_moe", **_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "moe_intermediate_size": 40, "norm_topk_prob": True, "decoder_sparse_step": 2,
    },
    # Without a token of padding, for which transformers' embeddings have no gradient.
    "gemma": {"model_type": "gemma", **_SIZES, "head_dim": 16, "pad_token_id": None},
    "gemma-2": {
        "model_type": "gemma2", **_SIZES, "head_dim": 16, "pad_token_id": None, "sliding_window": 7,
        "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma-3": {
        "model_type": "gemma3_text", **_SIZES, "head_dim": 16, "pad_token_id": None,
        "sliding_window": 7, "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    },
    # Gates are clamped where it shows; rounded or not, YaRN's bounds differ.
    "gpt-oss": {
        "model_type": "gpt_oss", **_SIZES, "intermediate_size": 40, "head_dim": 16, "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": 7, "swiglu_limit": 0.5, "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "gpt-2": {
        "model_type": "gpt2", "vocab_size": 100, "n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64,
        "initializer_range": 0.2,
    },
}  # fmt: skip

# Embedding and head apart, as schedules with both ends on one rank need them.
TINY["gemma-2-untied"] = {**TINY["gemma-2"], "tie_word_embeddings": False}
TINY["gemma-3-untied"] = {**TINY["gemma-3"], "tie_word_embeddings": False}


def make_tiny(name: str, folder: Path) -> Any:
    """Save a random model of a family as transformers does; the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(TINY[name])
    torch.manual_seed(3)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for key, parameter in model.named_parameters():
        # Constants would hide errors in biases and norms.
        if parameter.dim() == 1 or key.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


class Imported(NamedTuple):
    """A tiny model that was imported.

    Attributes:
        name: in :data:`TINY`.
        hf: transformers' model.
        folder, checkpoint: where it was saved, and imported to.
        words: the options printed.
    """

    name: str
    hf: Any
    folder: Path
    checkpoint: Path
    words: list[str]


def import_tiny(name: str, folder: Path) -> Imported:
    """Make a family's tiny model below ``folder``, and import it."""
    hf = make_tiny(name, folder / "hf")
    words = import_model(folder / "hf", folder / "checkpoint")
    return Imported(name, hf, folder / "hf", folder / "checkpoint", words)


def tiny_model(name: str, folder: Path) -> Model:
    """What the saved config.json describes."""
    return describe_model(ModelConfig(json.loads((folder / "config.json").read_text()), name))


def train_options(words: list[str], checkpoint: Path, case: Case, schedule: str, *extra: str) -> list[str]:
    """The command line of one iteration over the case's batches."""
    if schedule == "helix" and "learnable" in words and "--attention-range" not in extra:
        extra = ("--attention-range", "block", *extra)  # which lends sinks
    training = (
        f"--seq-length {case.seq_length} --micro-batch-size {case.micro_batch_size} "
        f"--global-batch-size {case.num_microbatches * case.dp} --train-iters 1 --lr 1e-3 --data-path none "
        f"--pipeline-model-parallel-size {case.pp} --tensor-model-parallel-size {case.tp} "
        f"--pretrained-checkpoint {checkpoint} --transformer-impl local --pipeline-schedule {schedule}"
    ).split()
    return [*words, *training, *extra]


def loaded_state(options: list[str]) -> tuple[Any, Any]:
    """The parsed options, and the model that they name with its weights."""
    settings = parse_arguments(options, dataset=DATASET)
    with torch.enable_grad():
        state = build_training_state(settings)
    load_weights(settings, settings.checkpoint.pretrained_checkpoint, state)
    return settings, state


def logits_of_both(
    case: Case, options: list[str], helix_options: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of Megatron's model and of the segments in a row, on one rank."""
    initialize(case)
    tokens, positions, _ = batch_of(case).values()
    with torch.no_grad():
        whole = unwrap(loaded_state(options)[1].model[0])(tokens, positions, None)
        segmented = unwrap(loaded_state(helix_options)[1].model[0])
        return whole, run_segments(segmented, tokens=tokens, position_ids=positions)[0]


def losses_and_gradients(case: Case, options: list[str]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """One iteration on this rank, under Megatron's own function for 1f1b, and by the plan for the others."""
    initialize(case)
    settings, state = loaded_state(options)
    planned = make_forward_backward(settings.schedule.execution, settings.schedule.plan, HostClock())
    is_own = settings.schedule.name != "1f1b"
    function = planned if is_own else get_forward_backward_func()
    own = run_iteration(case, state.model, function)
    return everywhere(own, settings.schedule.plan if is_own else None), gather_gradients(state.model)


def expected_of(hf: Any, model: Model, case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of transformers' model, and its gradients under our names."""
    from transformers.core_model_loading import revert_weight_conversion

    losses = []
    hf.zero_grad()
    for tokens, labels, mask, _ in batches(case):
        logits = hf(tokens).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = (each * mask).sum() / mask.sum()
        (loss / case.num_microbatches).backward()
        losses.append(float(loss.detach()))
    # Experts are apart in files.
    given = revert_weight_conversion(hf, {name: parameter.grad for name, parameter in hf.named_parameters()})
    gradients = {}
    for rule in model.rules:
        for place in product(*map(range, rule.sizes(model.arguments["num_layers"]).values())):
            numbers = place if rule.layer is None else (rule.layer, *place)
            layer, expert = (*numbers, 0, 0)[:2]
            name = rule.ours
            if rule.layer is None:
                name = name.replace("decoder.layers.", f"decoder.layers.{layer}.")
            name = name.replace("mlp.experts.experts.", f"mlp.experts.local_experts.{expert}.")
            name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
            name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
            found = rule.join(tuple(given[theirs] for theirs in rule.names(*place)))
            if ".experts.experts." in rule.ours and rule.num_experts is None:
                # All experts of a layer are one tensor.
                gradients |= {
                    name.replace("local_experts.0", f"local_experts.{number}"): one
                    for number, one in enumerate(found)
                }
            else:
                gradients[name] = found
    return losses, gradients


def logits_error(made: Imported) -> float:
    """Largest difference of our logits from transformers', over the largest of these; both of our models."""
    case = Case(pp=1)
    options = [train_options(made.words, made.checkpoint, case, schedule) for schedule in ("1f1b", "helix")]
    with torch.no_grad():
        expected = made.hf(batch_of(case)["tokens"]).logits
    (both,) = run_on_ranks(1, logits_of_both, case, *options)
    assert all(found.shape == expected.shape for found in both)
    return float(max((found - expected).abs().max() for found in both) / expected.abs().max())


class Errors(NamedTuple):
    """Largest relative errors under helix, of the losses and of any tensor's gradient."""

    losses: float
    gradients: float


def errors_under_helix(made: Imported, p: int, ep: int = 1) -> dict[str, Errors]:
    """Against Megatron's own model under its own 1F1B on as many ranks, and against transformers.

    Args:
        made: the model.
        p: pipeline ranks.
        ep: ranks of a stage that share experts out, with the same data.
    """
    case = Case(pp=p, dp=ep, ep=ep, same_data=True)
    shared = ("--expert-model-parallel-size", str(ep)) if ep > 1 else ()
    theirs = expected_of(made.hf, tiny_model(made.name, made.folder), case)
    of_ours = [
        run_on_ranks(
            p * ep,
            losses_and_gradients,
            case,
            train_options(made.words, made.checkpoint, case, schedule, *shared),
        )[0]
        for schedule in ("1f1b", "helix")
    ]
    megatrons, (losses, gradients) = of_ours
    found = {}
    for name, (expected_losses, expected) in (("megatron", megatrons), ("transformers", theirs)):
        assert gradients.keys() == expected.keys()
        assert all(gradient.norm() > 0 for gradient in expected.values())
        found[name] = Errors(
            max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True)),
            max(relative_error(gradients[key], gradient) for key, gradient in expected.items()),
        )
    return found


def gradients_error(made: Imported, case: Case, schedule: str, *options: str) -> float:
    """Largest relative error of gradients under another layout, of what each rank has whole."""
    _, expected = expected_of(made.hf, tiny_model(made.name, made.folder), case)
    words = train_options(made.words, made.checkpoint, case, schedule, *options)
    _, found = run_on_ranks(case.world_size, losses_and_gradients, case, words)[0]
    assert found.keys() == expected.keys()
    whole = [name for name, gradient in expected.items() if found[name].shape == gradient.shape]
    assert all(name in whole for name in expected if ".experts." in name or ".router." in name)
    return max(relative_error(found[name], expected[name]) for name in whole)


def losses_error(made: Imported, case: Case, schedule: str, *options: str) -> float:
    """Largest relative error of losses under another layout or schedule, against transformers."""
    expected, _ = expected_of(made.hf, tiny_model(made.name, made.folder), case)
    words = train_options(made.words, made.checkpoint, case, schedule, *options)
    losses, _ = run_on_ranks(case.world_size, losses_and_gradients, case, words)[0]
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def changed_by_round_trip(made: Imported, folder: Path) -> list[str]:
    """Names of tensors and files that are not, to the bit, what was imported, once exported to ``folder``."""
    export_model(made.checkpoint, folder)
    before, after = (load_file(path / "model.safetensors") for path in (made.folder, folder))
    changed = sorted(before.keys() ^ after.keys())
    changed += [
        name
        for name in before.keys() & after.keys()
        if before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name])
    ]
    files = [path.name for path in made.folder.glob("*.json")]
    return changed + [n for n in files if (folder / n).read_bytes() != (made.folder / n).read_bytes()]
