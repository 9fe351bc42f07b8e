"""Checkpoints of Megatron-LM's training program: what theirs says of its job, and what ours says to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from helixpipe.commands.parser import flag_of
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.common_state import arguments_in
from megatron.pretrain.checkpoint.comparison import MODEL, Change, compare_settings
from megatron.pretrain.checkpoint.safe_pickle import COMMON_FILE, MegatronArguments
from megatron.pretrain.settings.parser import build_parser
from megatron.pretrain.settings.positions import BETAS_OF_YARN

# The one form of the distributed optimizer's state that any other layout can read.
RESHARDABLE = "fully_reshardable"
# Of its checkpoints since megatron-core existed.
_VERSION = 3.0

# Forms of a model that are not read from there, by the arguments that ask for them.
NOT_READ = (
    "num_experts", "multi_latent_attention", "mtp_num_layers", "use_mup", "experimental_attention_variant",
    "linear_attention_freq", "attention_output_gate", "qk_l2_norm", "rotary_interleaved",
    "fp32_residual_connection", "apply_residual_connection_post_layernorm", "squared_relu",
    "is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern", "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json", "spec", "use_legacy_models", "add_position_offset",
    "position_embedding_scale",
)  # fmt: skip
# What only some models use, by which of their settings says so.
_OF_ROTARY = (
    "rotary_base", "rotary_base_local", "rotary_percent", "rotary_seq_len_interpolation_factor",
    "use_rope_scaling", "rope_scaling_factor", "no_rope_freq",
)  # fmt: skip
_OF_YARN = (
    "rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
)  # fmt: skip


def compare_theirs(
    folder: Path,
    common: Mapping[str, Any],
    here: Mapping[str, Any],
    allow_changed: Collection[str] = (),
    *,
    with_optimizer: bool,
) -> list[Change]:
    """What this job changes on purpose of a checkpoint of Megatron-LM.

    Args:
        folder: of the checkpoint.
        common: what it says of its job, see :func:`read_common`.
        here: options of this job, with the padded size of the vocabulary.
        allow_changed: options, without dashes, that may differ.
        with_optimizer: its optimizer's state is to be loaded, too.

    Raises:
        DataError: one line with everything that differs otherwise.
    """
    theirs = arguments_of(folder, common)
    saved, wanted = architecture(theirs), architecture(here)
    if here["position_embedding_type"] == "learned_absolute" and "max_position_embeddings" in theirs:
        for settings, options in ((saved, theirs), (wanted, here)):
            settings["max_position_embeddings"] = options["max_position_embeddings"]
    changes = compare_settings(saved, wanted, allow_changed, str(folder))
    if with_optimizer:
        _check_optimizer(folder, common, theirs, here)
    return changes


def arguments_of(folder: Path, common: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the job of Megatron-LM that saved a checkpoint.

    Args:
        folder: of the checkpoint.
        common: what it says of its job, see :func:`read_common`.

    Raises:
        DataError: there are none, or they ask for a form of model that is not read from there.
    """
    theirs = arguments_in(common)
    if not theirs:
        raise DataError(f"{folder} does not say what it was trained with (args); use another checkpoint")
    other = [name for name in NOT_READ if theirs.get(name)]
    if other:
        raise DataError(
            f"{folder} is of a model with {flag_of(other[0])} {theirs[other[0]]}, which is not read from "
            "checkpoints of Megatron-LM; use another checkpoint"
        )
    return theirs


def architecture(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the outputs of a model with given weights depend on, from arguments of either program.

    Args:
        arguments: by name. What they leave out is at its default; so is in the result what the model does
            not use.
    """
    default = build_parser().get_default
    # Its name since 0.19; the other one may be there, and None.
    said = {"norm_epsilon": arguments.get("layernorm_epsilon", default("norm_epsilon"))}
    said |= {name: value for name, value in arguments.items() if value is not None}
    found = {name: _plain(said.get(name, default(name))) for name in sorted(MODEL)}
    if not said.get("group_query_attention", True):
        found["num_query_groups"] = found["num_attention_heads"]
    # Their program sets it, too.
    found["add_qkv_bias"] = bool(found["add_qkv_bias"] or found["add_bias_linear"])
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    if found["kv_channels"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        found["kv_channels"] = hidden // heads
    if found["position_embedding_type"] == "yarn":
        found |= {name: found[name] or usual for name, usual in BETAS_OF_YARN.items()}
    return found | {name: default(name) for name in _unused(found)}


def _unused(found: Mapping[str, Any]) -> set[str]:
    """Settings without a meaning beside the others."""
    positions = found["position_embedding_type"]
    return {
        *(() if positions in ("rope", "yarn") else _OF_ROTARY),
        *(() if positions == "yarn" else _OF_YARN),
        *(() if found["use_rope_scaling"] else ("rope_scaling_factor",)),
        *(() if found["window_size"] else ("window_attn_skip_freq",)),
        *(() if found["num_experts"] else (name for name in MODEL if name.startswith("moe_"))),
    }


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
