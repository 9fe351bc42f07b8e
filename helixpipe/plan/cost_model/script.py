"""Megatron's arguments in a text: a launch script, its arrays of arguments, or bare flags."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

# Of experts: a command that has no other size describes no model.
_EXPERTS = frozenset(
    ("num-experts", "moe-ffn-hidden-size", "moe-router-topk", "moe-shared-expert-intermediate-size")
)
# Flags with a number that decides a shape.
SIZES = _EXPERTS | frozenset(
    (
        "num-layers", "hidden-size", "num-attention-heads", "num-query-groups", "kv-channels",
        "ffn-hidden-size", "vocab-size", "padded-vocab-size",
    )
)  # fmt: skip
# Flags without a value that decide a shape.
SWITCHES = frozenset(
    ("swiglu", "geglu", "quick-geglu", "untie-embeddings-and-output-weights", "group-query-attention")
)
# Flags without a value that decide no shape. Precision that changes costs, such as fp8, is not here.
_NEUTRAL_SWITCHES = frozenset(
    (
        "accumulate-allreduce-grads-in-fp32", "add-qkv-bias", "apply-layernorm-1p",
        "apply-query-key-layer-scaling", "async-save", "attention-softmax-in-fp32", "bf16",
        "calculate-per-token-loss", "ckpt-fully-parallel-load", "ckpt-fully-parallel-save",
        "cross-entropy-loss-fusion", "defer-embedding-wgrad-compute", "deterministic-mode",
        "disable-bias-linear", "disable-gloo-process-groups", "disable-log-loss-scale-to-tensorboard",
        "disable-manual-gc-eval", "dist-ckpt-optim-fully-reshardable", "eod-mask-loss", "finetune", "fp16",
        "fp32", "grad-reduce-in-bf16", "initial-loss-scale", "load-fallback", "log-memory-to-tensorboard",
        "log-num-zeros-in-grad", "log-params-norm", "log-progress", "log-throughput",
        "log-timers-to-tensorboard", "log-validation-ppl-to-tensorboard", "log-world-size-to-tensorboard",
        "manual-gc", "mock-data", "no-bias-dropout-fusion", "no-bias-gelu-fusion", "no-bias-swiglu-fusion",
        "no-check-for-nan-in-loss-and-grad", "no-ckpt-fully-parallel-save",
        "no-create-attention-mask-in-dataloader", "no-gradient-accumulation-fusion", "no-initialization",
        "no-load-optim", "no-load-rng", "no-log-loss-scale-to-tensorboard", "no-manual-gc-eval",
        "no-masked-softmax-fusion", "no-mmap-bin-files", "no-persist-layer-norm", "no-position-embedding",
        "no-recompute-without-attention", "no-rope-fusion", "no-save-optim", "no-save-rng",
        "no-yarn-correction-range-round-to-int", "openai-gelu",
        "overlap-grad-reduce", "overlap-p2p-communication-warmup-flush", "overlap-param-gather",
        "overlap-param-gather-with-optimizer-step", "profile", "qk-layernorm", "recompute-activations",
        "recompute-without-attention", "record-memory-history", "resend-context", "reset-attention-mask",
        "reset-position-ids", "sandwich-norm", "scale-embedding", "sequence-parallel",
        "set-aside-checkpoints", "split-weight-gradients", "standalone", "tp-comm-overlap",
        "use-cpu-initialization", "use-distributed-optimizer", "use-flash-attn", "use-mcore-models",
        "use-persistent-ckpt-worker", "use-rope-scaling", "use-rotary-position-embeddings",
        "yarn-correction-range-round-to-int",
    )
)  # fmt: skip
# Flags with values that decide no shape: of training, its layout, data and output, and of launchers.
_NEUTRAL_VALUES = frozenset(
    (
        "activation-func-clamp-value", "adam-beta1", "adam-beta2", "adam-eps", "allow-changed",
        "attention-backend", "attention-dropout", "attention-range", "attn-logit-softcapping",
        "check-gradients-every", "check-layers-every", "check-weight-hash-across-dp-replicas-interval",
        "ckpt-format", "clip-grad", "context-parallel-size", "cp-comm-type", "cross-entropy-fusion-impl",
        "data-args-path", "data-cache-path", "data-parallel-size", "data-path", "dataloader-type",
        "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "decoupled-lr",
        "decoupled-min-lr", "dist-ckpt-strictness", "distributed-backend", "distributed-timeout-minutes",
        "dry-run", "elastic-costs", "empty-unused-memory-level", "end-weight-decay", "eval-interval",
        "eval-iters", "exit-duration-in-mins", "exit-interval", "failure-dir", "final-logit-softcapping",
        "global-batch-size", "glu-linear-offset", "hang-timeout-s", "hardware", "head-placement",
        "hidden-dropout", "hysteresis", "init-method-std", "keep-checkpoints", "kill-on-bad-exit", "load",
        "local-addr", "local-rank", "log-dir", "log-interval", "loss-chunk-size", "loss-scale",
        "loss-scale-window", "lr", "lr-decay-iters", "lr-decay-samples", "lr-decay-style",
        "lr-warmup-fraction", "lr-warmup-init", "lr-warmup-iters", "lr-warmup-samples", "lr-wsd-decay-iters",
        "lr-wsd-decay-samples", "lr-wsd-decay-style", "make-vocab-size-divisible-by", "manual-gc-interval",
        "master-addr", "master-port", "max-position-embeddings", "max-restarts", "max-seq-length",
        "memory-limit-gib", "memory-snapshot-path", "merge-file", "metrics-jsonl", "micro-batch-size",
        "microbatch-group-size-per-virtual-pipeline-stage", "min-loss-scale", "min-lr", "mlp-chunk-size",
        "nnodes", "no-python", "no-rope-freq", "node-rank", "norm-epsilon", "normalization", "nproc-per-node",
        "num-distributed-optimizer-instances", "num-fold", "num-layers-per-virtual-pipeline-stage",
        "num-slices", "num-workers", "on-save-failure", "optimizer", "override-opt-param-scheduler",
        "per-split-data-args-path", "pipeline-model-parallel-size", "pipeline-schedule", "plan",
        "position-embedding-type", "pretrained-checkpoint", "profile-ranks", "profile-step-end",
        "profile-step-start", "rdzv-backend", "rdzv-conf", "rdzv-endpoint", "rdzv-id",
        "recompute-granularity", "recompute-levels", "recompute-method", "recompute-modules",
        "recompute-num-layers", "redirects", "role", "rope-scaling-factor", "rotary-base",
        "rotary-base-local", "rotary-percent", "rotary-scaling-factor", "rotary-seq-len-interpolation-factor",
        "round-order", "save", "save-interval", "seed", "seq-length", "sgd-momentum", "softmax-scale",
        "softmax-type", "split", "start-method", "start-weight-decay", "tee", "tensor-model-parallel-size",
        "tensorboard-dir", "tensorboard-log-interval", "tensorboard-queue-size", "test-data-path",
        "tiktoken-num-special-tokens", "tiktoken-pattern", "timing-log-level", "tokenizer-model",
        "tokenizer-type", "trace-dir", "train-data-path", "train-iters", "train-samples", "transformer-impl",
        "valid-data-path", "virtual-stages", "vocab-file", "wandb-entity", "wandb-exp-name", "wandb-project",
        "wandb-save-dir", "weight-decay", "weight-decay-incr-style", "wgrad-deferral-limit", "yarn-beta-fast",
        "yarn-beta-slow", "yarn-original-max-position-embeddings",
    )
)  # fmt: skip
# Flags that say which tokens attention sees, and which layers have windows or experts.
PATTERNS = frozenset(("window-size", "window-attn-skip-freq", "moe-layer-freq"))
# Of experts: how tokens are routed, and who shares the experts.
_NEUTRAL_OF_EXPERTS = frozenset(
    (
        "expert-model-parallel-size", "expert-tensor-parallel-size", "moe-aux-loss-coeff",
        "moe-expert-capacity-factor", "moe-grouped-gemm", "moe-router-dtype", "moe-router-group-topk",
        "moe-router-load-balancing-type", "moe-router-num-groups", "moe-router-pre-softmax",
        "moe-router-score-function", "moe-router-topk-scaling-factor", "moe-token-dispatcher-type",
        "moe-token-drop-policy", "moe-z-loss-coeff",
    )
)  # fmt: skip
NEUTRAL = _NEUTRAL_SWITCHES | _NEUTRAL_VALUES | _NEUTRAL_OF_EXPERTS

_ASSIGNMENT = re.compile(r"(?:export\s+|declare\s+(?:-\w+\s+)*|local\s+|readonly\s+)?([A-Za-z_]\w*)\+?=")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)")
_PROGRAM = re.compile(r"(?:.*/)?(\w[\w.-]*)\.py")


def arguments_of_script(source: str, text: str) -> dict[str, Any]:
    """``--num-layers 32 --swiglu`` as {"num_layers": "32", "swiglu": True}.

    Comments are no flags, and neither are those of other programs: a command counts if it starts a program
    called ``pretrain….py``, or has flags that decide shapes.

    Args:
        source: name of the text, for messages.
        text: of a POSIX shell, or bare flags.

    Raises:
        ValueError: a size that is a variable or stands there twice, or arguments in a variable that the text
            does not set.
    """
    variables = {found.group(1) for line in text.splitlines() if (found := _ASSIGNMENT.match(line.strip()))}
    arguments: dict[str, Any] = {}
    for words in _commands(source, text):
        for flag, values in _flags(source, _relevant(words), variables):
            name = flag.replace("-", "_")
            value = _value(source, flag, values)
            if flag in SIZES and arguments.get(name, value) != value:
                raise ValueError(
                    f"model {source}: --{flag} is given twice, {arguments[name]} and {value}; leave one"
                )
            arguments[name] = value
    return arguments


def _commands(source: str, text: str) -> Iterator[list[str]]:
    """The words of each command, with continued lines joined, without comments and quotes."""
    joined = re.sub(r"\\\r?\n", " ", text)
    # Quotes may hold several lines of arguments.
    lexer = shlex.shlex(joined, posix=True, punctuation_chars="();|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, "#"
    words: list[str] = []
    try:
        for word in lexer:
            if word.strip("();|&\n"):
                # A string of arguments in quotes is as many words, NAME="--num-layers 4" too.
                words += word.split() if "--" in word else [word]
            elif words:
                yield words
                words = []
    except ValueError as error:
        raise ValueError(f"model {source}: is no shell script ({error}); give bare arguments") from None
    if words:
        yield words


def _relevant(words: list[str]) -> list[str]:
    """The words of a command that may be arguments of training."""
    programs = [(place, found[1]) for place, word in enumerate(words) if (found := _PROGRAM.fullmatch(word))]
    for place, program in programs:
        if program.startswith("pretrain"):
            return words[place + 1 :]
        if program == "prepare_data":
            # It decides the vocabulary of the data, and nothing else.
            place = words.index("--vocab-size") if "--vocab-size" in words else len(words)
            return words[place : place + 2]
    if "helixpipe" in words:
        command = words[words.index("helixpipe") + 1 :]
        return command[1:] if command[:1] == ["train"] else []
    first = words[0]
    is_ours = first.startswith("--") or _ASSIGNMENT.match(" ".join(words[:2])) is not None
    has_sizes = any(word.startswith("--") and _name(word) in SIZES - _EXPERTS for word in words)
    return words if is_ours or has_sizes else []


def _flags(source: str, words: list[str], variables: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words that follow it."""
    flag: str | None = None
    values: list[str] = []
    for word in words:
        assigned = _ASSIGNMENT.match(word)
        word = word[assigned.end() :] if assigned else word
        if word.startswith("--") and len(word) > 2:
            if flag is not None:
                yield flag, values
            flag, values = _name(word), [word.partition("=")[2]] if "=" in word else []
        elif flag is None or flag in SWITCHES or flag in _NEUTRAL_SWITCHES or values:
            unset = [name for name in _VARIABLE.findall(word) if name not in variables]
            if unset and not assigned:
                raise ValueError(
                    f"model {source}: takes arguments from ${unset[0]}, which the file does not set; write "
                    "them into it"
                )
            values.append(word)
        else:
            values.append(word)
    if flag is not None:
        yield flag, values


def _name(word: str) -> str:
    """Launchers write their flags with underscores, too."""
    return word[2:].partition("=")[0].replace("_", "-")


def _value(source: str, flag: str, values: list[str]) -> str | bool:
    if flag not in SIZES | PATTERNS:
        return True
    if not values or not values[0]:
        raise ValueError(f"model {source}: --{flag} has no value; write the number")
    if "$" in values[0] or "`" in values[0]:
        raise ValueError(f"model {source}: --{flag} is the variable {values[0]}; write the number")
    return values[0]
