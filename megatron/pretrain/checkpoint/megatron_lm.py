"""Checkpoints of Megatron-LM's training program: what theirs says of its job, and what ours says to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helixpipe.commands.parser import flag_of
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.common_state import arguments_in
from megatron.pretrain.checkpoint.safe_pickle import COMMON_FILE, MegatronArguments

# The one form of the distributed optimizer's state that any other layout can read.
RESHARDABLE = "fully_reshardable"
# Of its checkpoints since megatron-core existed.
_VERSION = 3.0

# What weights and their meaning depend on, by names that both programs have.
_ARCHITECTURE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "swiglu", "position_embedding_type", "untie_embeddings_and_output_weights",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "padded_vocab_size", "softmax_type", "quick_geglu",
    "glu_linear_offset", "activation_func_clamp_value",
)  # fmt: skip
_OF_POSITIONS = {
    "learned_absolute": ("max_position_embeddings",),
    "rope": (
        "rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor", "use_rope_scaling",
        "rope_scaling_factor",
    ),
}  # fmt: skip
# Of models that this program does not build: they would be other functions of the same weights.
_UNKNOWN_HERE = (
    "num_experts", "multi_latent_attention", "mtp_num_layers", "use_mup", "window_size",
    "fp32_residual_connection", "apply_residual_connection_post_layernorm", "apply_layernorm_1p",
    "squared_relu", "openai_gelu", "rotary_interleaved", "qk_l2_norm", "softmax_scale",
    "is_hybrid_model", "hybrid_layer_pattern", "heterogeneous_layers_config_path",
    "add_position_offset", "no_rope_freq", "position_embedding_scale",
)  # fmt: skip


def check_theirs(
    folder: Path, common: Mapping[str, Any], here: Mapping[str, Any], *, with_optimizer: bool
) -> None:
    """Refuse a checkpoint of Megatron-LM that does not fit this job.

    Args:
        folder: of the checkpoint.
        common: what it says of its job, see :func:`read_common`.
        here: options of this job, with the padded size of the vocabulary.
        with_optimizer: its optimizer's state is to be loaded, too.

    Raises:
        DataError: one line with everything that differs.
    """
    theirs = arguments_in(common)
    if not theirs:
        raise DataError(f"{folder} does not say what it was trained with (args); use another checkpoint")
    unknown = [name for name in _UNKNOWN_HERE if theirs.get(name)]
    if unknown:
        raise DataError(
            f"{folder} is of a model with {flag_of(unknown[0])} {theirs[unknown[0]]}, which is not built "
            "here; use another checkpoint"
        )
    saved, wanted = _architecture(theirs), _architecture(here)
    names = (*_ARCHITECTURE, "norm_epsilon", *_OF_POSITIONS.get(str(here["position_embedding_type"]), ()))
    texts = [
        f"{flag_of(name)} {saved[name]}, this job has {wanted.get(name)}"
        for name in names
        if name in saved and saved[name] != wanted.get(name)
    ]
    if texts:
        raise DataError(f"{folder} was trained with {'; '.join(texts)}; give the same")
    if with_optimizer:
        _check_optimizer(folder, common, theirs, here)


def _architecture(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of either program by what they come to."""
    found = dict(arguments)
    if not arguments.get("group_query_attention", True):
        found["num_query_groups"] = arguments.get("num_attention_heads")
    # Their program sets it, too.
    found["add_qkv_bias"] = bool(arguments.get("add_qkv_bias") or arguments.get("add_bias_linear"))
    # Since 0.19 some have another name, and this one is there, and None.
    if found.get("norm_epsilon") is None:
        found["norm_epsilon"] = arguments.get("layernorm_epsilon", 1e-5)
    if not found.get("use_rope_scaling"):
        found.pop("rope_scaling_factor", None)
    if found.get("kv_channels") is None:
        found.pop("kv_channels", None)
    return found


def _check_optimizer(
    folder: Path, common: Mapping[str, Any], theirs: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    remedy = "or load the weights alone with --no-load-optim"
    if theirs.get("no_save_optim") or "optimizer" not in common:
        raise DataError(f"{folder} holds no optimizer states; load the weights alone with --no-load-optim")
    for name in ("use_distributed_optimizer", "bf16", "fp16", "optimizer"):
        if name in theirs and theirs[name] != here[name]:
            raise DataError(
                f"{folder} was trained with {flag_of(name)} {theirs[name]}, this job has {here[name]}; give "
                f"the same, {remedy}"
            )
    form = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    if here["use_distributed_optimizer"] and form != RESHARDABLE:
        raise DataError(
            f"{folder} holds optimizer states in the form {form}, which other layouts cannot read; save with "
            f"--dist-ckpt-optim-fully-reshardable there, {remedy}"
        )


def samples_of(common: Mapping[str, Any]) -> int:
    """Samples that the job which saved a checkpoint of Megatron-LM had trained on, over all replicas."""
    return int(arguments_in(common).get("consumed_train_samples") or 0)


def is_readable(folder: Path, core_version: str) -> bool:
    """Whether this megatron-core can read the form: since 0.19 nothing is written beside the shards."""
    numbers = tuple(int(part) for part in core_version.split(".")[:2])
    return (folder / COMMON_FILE).exists() or numbers >= (0, 19)


def ours_for_theirs(
    options: Mapping[str, Any], *, consumed_samples: int, evaluated_samples: int, **layout: int
) -> dict[str, Any]:
    """What Megatron-LM looks for in a checkpoint beside weights and states, for ours.

    Args:
        options: plain values by name, with the padded size of the vocabulary.
        consumed_samples, evaluated_samples: over all replicas.
        layout: parallel sizes and the number of ranks, by Megatron's names.
    """
    args = MegatronArguments(
        **options,
        **layout,
        add_position_embedding=options["position_embedding_type"] == "learned_absolute",
        consumed_train_samples=consumed_samples,
        consumed_valid_samples=evaluated_samples,
        skipped_train_samples=0,
        # Random states follow from seed and iteration here.
        no_save_rng=True,
        no_save_optim=False,
    )
    return {"args": args, "checkpoint_version": _VERSION}
