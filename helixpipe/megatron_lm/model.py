"""The model that a Megatron-LM script builds, in segments instead of a stage."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from helixpipe.contact_points import replace
from helixpipe.layers.optional_packages import TRANSFORMER_ENGINE as ENGINE_PACKAGE
from helixpipe.layers.optional_packages import why_not_usable
from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.layers.spec import LOCAL, TRANSFORMER_ENGINE, Implementation
from helixpipe.megatron_adapter.model_chunks import build_model_chunks
from helixpipe.megatron_adapter.pipeline_group import check_groups
from helixpipe.megatron_adapter.plan_source import PlanOnDemand
from helixpipe.megatron_lm.chunks import build_chunk
from helixpipe.megatron_lm.known_options import check_config
from helixpipe.megatron_lm.options import Options
from helixpipe.plan.cost_model.levels import parse_levels

# What a segmented model takes of GPTModel's arguments. The ends of a stage mean nothing to it.
_TAKEN = (
    "vocab_size", "max_sequence_length", "share_embeddings_and_output_weights", "position_embedding_type",
    "rotary_percent", "rotary_base", "seq_len_interpolation_factor", "rope_scaling", "rope_scaling_factor",
)  # fmt: skip
_LOOKED_AT = ("self", "config", "transformer_layer_spec", "pre_process", "post_process", "pg_collection")


def build_segments_for(options: Options) -> Callable[[], None]:
    """Let every ``GPTModel(…)`` of the process give this rank's share; a function that undoes it.

    The class itself stays, so it does not matter who has imported it, and a class derived from it is built
    as ever.
    """
    signature = inspect.signature(GPTModel.__init__)

    def new(cls: type, *args: Any, **arguments: Any) -> Any:
        if cls is not GPTModel:
            return object.__new__(cls)
        bound = signature.bind(None, *args, **arguments)
        bound.apply_defaults()
        if options.chunks_per_rank > 1:
            given = {name: value for name, value in bound.arguments.items() if name != "self"}
            return _built(build_chunk(options, given))
        return _built(build_segments(options, bound.arguments, signature))

    return replace("megatron.core.models.gpt:GPTModel", "__new__", staticmethod(new))


def _built(model: torch.nn.Module) -> torch.nn.Module:
    """The model, safe from Python's calling ``__init__`` for what ``__new__`` gives, if it is a GPTModel."""
    if isinstance(model, GPTModel):
        kind = type(model)
        model.__class__ = type(kind.__name__, (kind,), {"__init__": lambda self, *args, **arguments: None})
    return model


def build_segments(
    options: Options, arguments: dict[str, Any], signature: inspect.Signature
) -> torch.nn.Module:
    """This rank's share of the model that ``GPTModel(**arguments)`` would be a stage of.

    Raises:
        ValueError: anything that a segmented model does not know.
    """
    config: TransformerConfig = arguments["config"]
    check_config(config, options.schedule)
    for name, value in arguments.items():
        if name not in (*_TAKEN, *_LOOKED_AT) and value != signature.parameters[name].default:
            raise ValueError(
                f"--pipeline-schedule {options.schedule} does not know {name}={value!r} of GPTModel; leave "
                "out the option that sets it, or use 1f1b"
            )
    check_groups(arguments["pg_collection"], None, options.schedule)
    levels = parse_levels(options.recompute_levels, config.num_layers)
    num_ranks = parallel_state.get_pipeline_model_parallel_world_size()
    plan = PlanOnDemand(options.schedule, options.plan).plan_for(
        num_layers=config.num_layers,
        num_ranks=num_ranks,
        # Where weights are does not depend on it.
        num_microbatches=num_ranks * int(options.plan.get("num_fold", 2)),
    )
    assert options.entry.execution is not None
    (model,) = build_model_chunks(
        options.entry.execution,
        plan,
        config,
        _implementation(config, arguments["transformer_layer_spec"], options.schedule),
        MemorySaving(levels, options.mlp_chunk_size, options.loss_chunk_size),
        **{name: arguments[name] for name in _TAKEN},
    )
    # Forward steps ask for it.
    model.vp_stage = None  # type: ignore[assignment]
    return model


def _implementation(config: TransformerConfig, spec: Any, schedule: str) -> Implementation:
    """Whose modules the script asks for; ``ValueError`` for layers that are not Megatron's own."""
    if config.attention_backend not in (AttnBackend.auto, AttnBackend.flash, AttnBackend.local):
        raise ValueError(
            f"--attention-backend {config.attention_backend.name} is not what {schedule} runs, which chooses "
            "a flash attention by itself; use auto or flash"
        )
    asked = describe(spec)
    local = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if asked == describe(local):
        return LOCAL
    if not why_not_usable(ENGINE_PACKAGE):
        engine = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if asked == describe(engine):
            return TRANSFORMER_ENGINE
    raise ValueError(
        f"--pipeline-schedule {schedule} runs Megatron's own GPT layers only, and this model's layer spec is "
        "another; leave --spec and like options out, or use 1f1b"
    )


def describe(spec: Any) -> Any:
    """A layer spec as values that compare: classes by name, partial functions by what they hold."""
    if isinstance(spec, functools.partial):
        return ("partial", describe(spec.func), describe(spec.args), describe(spec.keywords))
    if isinstance(spec, ModuleSpec) or (dataclasses.is_dataclass(spec) and not isinstance(spec, type)):
        names = [field.name for field in dataclasses.fields(spec)]
        return (type(spec).__qualname__, tuple((name, describe(getattr(spec, name))) for name in names))
    if isinstance(spec, dict):
        return tuple(sorted((str(name), describe(value)) for name, value in spec.items()))
    if isinstance(spec, (list, tuple)):
        return tuple(describe(value) for value in spec)
    if callable(spec):
        return f"{spec.__module__}.{spec.__qualname__}"
    return repr(spec)
