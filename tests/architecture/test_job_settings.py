"""A job's settings are frozen, made in one place, and every option ends in one of them or in the plan."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
from job_settings import job_settings
from sources import ROOT, parsed, relative, sources

from megatron.pretrain.settings.parser import build_parser

# What turns a command line into settings.
PARSER_ROOM = "megatron/pretrain/settings/"
OPTIONS = {action.dest for action in build_parser()._actions if action.dest != "help"}
# Read where settings are made, and nowhere else: they choose the plan, or another field says what they say.
SAID_BY_OTHERS = {
    # schedule
    "pipeline_schedule", "plan", "hardware", "num_fold", "num_slices", "attention_range",
    "head_placement", "resend_context", "round_order", "split_weight_gradients",
    "num_layers_per_virtual_pipeline_stage",
    "microbatch_group_size_per_virtual_pipeline_stage",
    # memory.memory_saving
    "recompute_without_attention", "recompute_levels", "mlp_chunk_size", "loss_chunk_size",
    # profiling, ending, housekeeping
    "profile", "profile_step_start", "profile_step_end", "profile_ranks",
    "exit_interval", "exit_duration_in_mins",
    "manual_gc", "manual_gc_interval", "manual_gc_eval", "empty_unused_memory_level",
    # watching
    "log_throughput", "tensorboard_dir", "tensorboard_queue_size", "tensorboard_log_interval",
    "log_timers_to_tensorboard", "log_validation_ppl_to_tensorboard", "log_memory_to_tensorboard",
    "log_world_size_to_tensorboard", "log_loss_scale_to_tensorboard", "wandb_project", "wandb_exp_name",
    "wandb_entity", "wandb_save_dir", "record_memory_history", "memory_snapshot_path",
    # precision
    "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis",
    "accumulate_allreduce_grads_in_fp32", "grad_reduce_in_bf16", "deterministic_mode",
    # training.train_iters, learning_rate
    "train_samples", "lr_decay_style", "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_style",
    "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_warmup_fraction", "lr_warmup_iters",
    "lr_warmup_samples", "lr_warmup_init", "start_weight_decay", "end_weight_decay",
    "weight_decay_incr_style",
    # model.num_query_groups, model.padded_vocab_size, data.corpora, data.weights, data.parts, data.dataset
    "data_path", "data_args_path", "train_data_path", "valid_data_path", "per_split_data_args_path",
    "group_query_attention", "make_vocab_size_divisible_by", "tokenizer_type", "tokenizer_model",
    "vocab_file", "merge_file", "tiktoken_pattern", "tiktoken_num_special_tokens", "vocab_size",
}  # fmt: skip

MADE_ELSEWHERE = (
    "schedule", "precision", "learning_rate", "elastic_job", "ending", "housekeeping", "profiling",
    "workload", "needless_flags", "other_defaults", "watching", "options",
)  # fmt: skip


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    return job_settings()


def topics(settings):
    """The parts of the settings whose fields are options or derived from some."""
    parts = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {name: part for name, part in parts.items() if name not in MADE_ELSEWHERE}


def trees(inside):
    """Of the training program, the parser room or all else."""
    return {
        relative(path): parsed(path)
        for path in sources("megatron/pretrain", "pretrain_gpt.py")
        if relative(path).startswith(PARSER_ROOM) == inside
    }


def names_in(tree):
    """Names, attributes and words of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def takes_the_namespace(tree):
    """Whether a function of the module takes or returns argparse's namespace."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    annotations = [
        part.annotation for node in functions for part in ast.walk(node.args) if hasattr(part, "annotation")
    ]
    shown = [ast.unparse(node) for node in (*annotations, *(node.returns for node in functions)) if node]
    return any("Namespace" in text for text in shown)


def writes_options(tree):
    """Whether a module assigns to an attribute of what was parsed."""
    targets = [
        target
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return any(
        isinstance(target, ast.Attribute) and ast.unparse(target.value).split(".")[-1] in ("args", "settings")
        for target in targets
    )


def test_only_the_parser_room_knows_the_namespace():
    assert [path for path, tree in trees(inside=False).items() if takes_the_namespace(tree)] == []
    assert any(takes_the_namespace(tree) for tree in trees(inside=True).values())


def test_nothing_is_written_later(settings):
    for part in (settings, *topics(settings).values(), settings.schedule, settings.learning_rate):
        assert is_dataclass(part)
        with pytest.raises(FrozenInstanceError):
            setattr(part, fields(part)[0].name, None)
    with pytest.raises(TypeError):
        settings.options["seed"] = 1
    # Freezing can be got round only by this.
    assert [path for path, tree in trees(inside=False).items() if "__setattr__" in names_in(tree)] == []
    assert [path for path, tree in trees(inside=False).items() if writes_options(tree)] == []


def test_every_option_is_in_one_topic(settings):
    found = Counter(field.name for part in topics(settings).values() for field in fields(part))
    assert [name for name, count in found.items() if count > 1] == []
    assert OPTIONS - found.keys() == SAID_BY_OTHERS
    assert settings.options.keys() == OPTIONS


def test_every_option_is_used(settings):
    """An option that is parsed and ignored would be one with a field that nobody reads."""
    nodes = [node for tree in trees(inside=False).values() for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {field.name for part in topics(settings).values() for field in fields(part)} - read == set()
    makers = [tree for path, tree in trees(inside=True).items() if not path.endswith("/parser.py")]
    makers.append(parsed(ROOT / "helixpipe/commands/tokenizer_arguments.py"))
    made = {name for tree in makers for name in names_in(tree)}
    assert SAID_BY_OTHERS - made == set()
