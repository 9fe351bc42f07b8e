"""The options of ``pretrain_gpt.py``, with Megatron's names where Megatron has them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from helixpipe.commands.parser import Parser
from helixpipe.commands.ranges import GIBIBYTES, LAYERS, RANKS, SEED, Real, Whole
from helixpipe.commands.tokenizer_arguments import VOCABULARY, add_tokenizer_arguments
from helixpipe.layers.attention.choice import AUTO as AUTO_BACKEND
from helixpipe.layers.attention.choice import BACKENDS, FAMILIES, UNFUSED
from helixpipe.plan.schedules.request import ATTENTION_RANGES, HEAD_PLACEMENTS, ROUND_ORDERS
from megatron.pretrain.settings.data_sources import DEFAULT_SPLIT
from megatron.pretrain.settings.elastic_job import ELASTIC_AUTO, add_elastic_arguments
from megatron.pretrain.settings.ending import add_ending_arguments
from megatron.pretrain.settings.experts import add_expert_arguments
from megatron.pretrain.settings.housekeeping import add_housekeeping_arguments
from megatron.pretrain.settings.layers import add_layer_arguments
from megatron.pretrain.settings.learning_rate import add_learning_rate_arguments
from megatron.pretrain.settings.positions import add_position_arguments
from megatron.pretrain.settings.precision import add_precision_arguments
from megatron.pretrain.settings.profiling import add_profiling_arguments
from megatron.pretrain.settings.recomputation import add_memory_arguments
from megatron.pretrain.settings.schedule import AUTO, DEFAULT_SCHEDULE, executable_schedules
from megatron.pretrain.settings.stages import add_stage_arguments
from megatron.pretrain.settings.watching import add_watching_arguments

_IN_MEGATRONS = "in a command line with a flag that only Megatron has"


def build_parser() -> argparse.ArgumentParser:
    """The parser alone."""
    parser = Parser(prog="pretrain_gpt.py", description="Pre-train a GPT under a pipeline schedule.")
    _add_schedule_arguments(parser)
    add_stage_arguments(parser)
    _add_parallel_arguments(parser)
    _add_model_arguments(parser)
    add_expert_arguments(parser)
    add_memory_arguments(parser)
    add_elastic_arguments(parser)
    add_learning_rate_arguments(parser)
    _add_training_arguments(parser)
    add_precision_arguments(parser)
    _add_data_arguments(parser)
    _add_output_arguments(parser)
    add_ending_arguments(parser)
    add_housekeeping_arguments(parser)
    add_watching_arguments(parser)
    add_profiling_arguments(parser)
    return parser


def _add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("schedule").add_argument
    add(
        "--pipeline-schedule",
        metavar="{" + ",".join((AUTO, *executable_schedules(), ELASTIC_AUTO)) + "}",
        help=f"default {DEFAULT_SCHEDULE}; auto: the fastest that fits, as python -m helixpipe advise "
        "predicts; elastic-auto: the faster one of elastic and elastic-helix, by the first batches",
    )
    add(
        "--plan",
        type=Path,
        metavar="FILE",
        help="execute this plan instead, as python -m helixpipe plan writes it or edited",
    )
    add(
        "--hardware",
        help="for auto, interlocked rounds and slices: h20, h100, h200, a800, a file of rates or a profile "
        "(default: this GPU)",
    )
    add(
        "--memory-limit-gib",
        type=GIBIBYTES,
        help="of one GPU: elastic and auto stay below it, the others warn close to it (default: all that the "
        "GPU has; auto: the hardware's less 4 GiB)",
    )
    add("--num-fold", type=Whole(), help="helix, sliced-helix: micro batches or slices per slot (default 2)")
    add("--num-slices", type=Whole(), help="seq1f1b: slices per sequence, of equal time (default 4)")
    add(
        "--attention-range",
        metavar="{" + ",".join((*ATTENTION_RANGES, AUTO)) + "}",
        help="helix, sliced-helix, elastic-helix: pieces that the attention rank runs: attention alone, "
        "norm1 to attention, norm1 to the projection (default core; auto, not for elastic-helix: the range "
        "with the shortest predicted iteration on --hardware; on hardware that is not known, with the "
        "smallest messages)",
    )
    add(
        "--head-placement",
        metavar="{" + ",".join(HEAD_PLACEMENTS) + "}",
        help="helix, sliced-helix: ranks that run the head and the loss (default first, with the weights; "
        "spread: all)",
    )
    add(
        "--round-order",
        metavar="{" + ",".join(ROUND_ORDERS) + "}",
        help="helix: rounds one after the other, or the forwards of one among the backwards of the one "
        "before, in the best order that --hardware predicts (default filo)",
    )
    add(
        "--split-weight-gradients",
        action="store_true",
        default=None,
        help="helix, interlocked: compute weight gradients apart, where ranks would wait",
    )
    add(
        "--resend-context",
        action="store_true",
        default=None,
        help="sliced-helix: drop keys and values of earlier slices after the forward pass, and lend them "
        "again for the backward pass",
    )


def _add_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("parallelism").add_argument
    add("--tensor-model-parallel-size", type=RANKS, default=1)
    add("--pipeline-model-parallel-size", type=RANKS, default=1)
    add(
        "--context-parallel-size",
        type=RANKS,
        default=1,
        help="ranks that share every sequence; for 1f1b, interleaved, helix and other schedules that do not "
        "cut sequences",
    )
    add("--sequence-parallel", action="store_true")
    add("--use-distributed-optimizer", action="store_true")
    add("--overlap-grad-reduce", action="store_true")
    add("--overlap-param-gather", action="store_true")
    add("--recompute-granularity", choices=("selective", "full"), help="not for helix")
    add("--recompute-method", choices=("uniform", "block"))
    add("--recompute-num-layers", type=LAYERS)
    add(
        "--recompute-modules",
        nargs="+",
        choices=("core_attn", "mlp", "moe"),
        default=["core_attn"],
        help="for --recompute-granularity selective (default: core_attn)",
    )
    add("--distributed-timeout-minutes", type=Whole(most=366 * 24 * 60), default=10)
    add(
        "--hang-timeout-s",
        type=Real(least=0.0, most=1e7),
        metavar="S",
        help="longest wait or operation before the job ends as hung; 0: no limit (default: 3 x the median of "
        "the phase, at least 5 s in a step and 60 s elsewhere; --distributed-timeout-minutes the first time)",
    )


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--transformer-impl", choices=("local", "transformer_engine"), help="default: what is installed")
    add(
        "--attention-backend",
        default=AUTO_BACKEND,
        choices=(AUTO_BACKEND, *FAMILIES, *UNFUSED, *BACKENDS),
        help="default auto: the fastest that works on this GPU; see docs/attention.md",
    )
    add("--num-layers", type=LAYERS, required=True)
    add("--hidden-size", type=Whole(), required=True)
    add("--ffn-hidden-size", type=Whole())
    add("--num-attention-heads", type=Whole(), required=True)
    add("--kv-channels", type=Whole())
    add("--group-query-attention", action="store_true")
    add("--num-query-groups", type=Whole(), default=1)
    add("--seq-length", type=Whole(), required=True)
    add("--max-position-embeddings", type=Whole(), help="default: the sequence length")
    add_position_arguments(add)
    add_layer_arguments(add)
    add("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    add("--add-qkv-bias", action="store_true")
    add("--untie-embeddings-and-output-weights", action="store_true")
    add("--make-vocab-size-divisible-by", type=Whole(), default=128)
    add(
        "--padded-vocab-size",
        type=Whole(),
        help="rows of the embedding (default: the vocabulary's, rounded up)",
    )
    add(
        "--attention-dropout",
        type=Real(least=0.0, below=1.0),
        default=0.0,
        help="above 0: with --attention-backend unfused, or Transformer Engine's own attention (default 0; "
        f"0.1 {_IN_MEGATRONS})",
    )
    add(
        "--hidden-dropout",
        type=Real(least=0.0, below=1.0),
        default=0.0,
        help=f"of what is added to the residual (default 0; 0.1 {_IN_MEGATRONS})",
    )
    add("--init-method-std", type=Real(above=0.0), default=0.02)


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--micro-batch-size", type=Whole(), required=True)
    add("--global-batch-size", type=Whole(), required=True)
    add("--optimizer", choices=("adam", "sgd"), default="adam")
    add("--clip-grad", type=Real(least=0.0), default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--adam-beta1", type=Real(least=0.0, below=1.0), default=0.9)
    add("--adam-beta2", type=Real(least=0.0, below=1.0), default=0.999)
    add("--adam-eps", type=Real(above=0.0), default=1e-8)
    add("--sgd-momentum", type=Real(least=0.0, below=1.0), default=0.9)
    add("--calculate-per-token-loss", action="store_true")
    add("--cross-entropy-loss-fusion", action="store_true", help="one kernel for the loss, on GPUs")
    add("--cross-entropy-fusion-impl", choices=("native", "te"), default="native", help="whose kernel")
    add(
        "--no-gradient-accumulation-fusion",
        action="store_false",
        dest="gradient_accumulation_fusion",
        help="add weight gradients apart from the product that makes them",
    )
    add("--seed", type=SEED, default=1234)
    add(
        "--check-gradients-every",
        type=Whole(),
        metavar="N",
        help="compare gradients and weights of data-parallel ranks every so many iterations",
    )
    add(
        "--check-layers-every",
        type=Whole(),
        metavar="N",
        help="every so many iterations, compute the output of one layer per rank twice and compare the bits",
    )
    add("--eval-interval", type=Whole(), default=1000)
    add(
        "--eval-iters",
        type=Whole(least=0),
        default=0,
        help=f"validation batches of an evaluation (default 0; 100 {_IN_MEGATRONS})",
    )


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--data-path",
        nargs="+",
        metavar="PREFIX",
        help="as helixpipe prepare wrote it, or Megatron's own tool; then with --tokenizer-type. Several "
        "are blended: all samples of each, or by weights, each before its prefix",
    )
    add("--data-args-path", type=Path, metavar="FILE", help="a text file with the words of --data-path")
    add("--train-data-path", nargs="+", metavar="PREFIX", help="as --data-path, for training alone")
    add("--valid-data-path", nargs="+", metavar="PREFIX", help="as --data-path, for validation alone")
    add(
        "--per-split-data-args-path",
        type=Path,
        metavar="FILE",
        help="JSON with the words of --data-path in lists, under train and valid",
    )
    add(
        "--mock-data",
        action="store_true",
        help="Megatron's made-up documents in the place of files, in three equal parts whatever --split is; "
        "with --tokenizer-type",
    )
    add_tokenizer_arguments(add)
    add(
        "--vocab-size",
        type=VOCABULARY,
        metavar="N",
        help="of a --tokenizer-type that has none in its files: for NullTokenizer without the end token",
    )
    add("--split", type=_split, default=DEFAULT_SPLIT, help="documents for training, validation, test")
    add("--data-cache-path", type=Path, help="default: the folder cache beside the data")
    add("--num-workers", type=Whole(least=0, most=1024), default=0, help="processes that read ahead")
    add(
        "--no-mmap-bin-files",
        action="store_false",
        dest="mmap_bin_files",
        help="read tokens from the file instead of mapping it into memory, for file systems that map slowly",
    )
    add("--eod-mask-loss", action="store_true", help="no loss at ends of documents")
    add(
        "--reset-position-ids",
        action="store_true",
        help="learned positions begin anew in every document (elastic: always)",
    )
    add(
        "--reset-attention-mask",
        action="store_true",
        help="tokens attend within their document, as if it stood alone (elastic: always)",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--log-interval", type=Whole(), default=1)
    add("--metrics-jsonl", type=Path, metavar="PATH", help="one JSON object per iteration")
    add("--trace-dir", type=Path, metavar="DIR", help="the measured timeline of every iteration")
    add(
        "--failure-dir",
        type=Path,
        metavar="DIR",
        help="stacks after a hang (default: DIR/failures of --save)",
    )
    add("--save", type=Path, metavar="DIR")
    add("--save-interval", type=Whole(), help="also save every so many iterations, not only at the end")
    add("--keep-checkpoints", type=Whole(), metavar="N", help="of --save: only the last N (default: all)")
    add(
        "--set-aside-checkpoints",
        action="store_true",
        help="start anew in a --save that holds checkpoints of another job: they are kept under other names",
    )
    add("--async-save", action="store_true", help="write checkpoints while training goes on")
    add(
        "--on-save-failure",
        choices=("stop", "continue"),
        default="stop",
        help="a full disk: stop (default), or train on with the checkpoints before it; the last save must "
        "succeed",
    )
    add("--load", type=Path, metavar="DIR", help="go on from the latest checkpoint there")
    add(
        "--pretrained-checkpoint",
        type=Path,
        metavar="DIR",
        help="start from the weights there, as tools/convert_hf.py writes them, unless --load holds "
        "a checkpoint",
    )
    add("--load-fallback", action="store_true", help="from an older one if the latest is damaged")
    add("--finetune", action="store_true", help="take the weights of --load, and begin with iteration 0")
    add("--no-load-optim", action="store_true", help="leave the optimizer's states in --load where they are")
    add(
        "--allow-changed",
        nargs="+",
        default=[],
        metavar="OPTION",
        help="options, without dashes, that may differ from those of the checkpoint, like lr or data-path",
    )


def _split(text: str) -> str:
    """Weights as Megatron reads them, by their digits and points: 1e3 would be two of them."""
    parts = text.split(",")
    is_plain = all(re.fullmatch(r" *([0-9]+\.?[0-9]*|\.[0-9]+) *", part, re.ASCII) for part in parts)
    if len(parts) != 3 or not is_plain or not float(parts[0]) > 0 or len(text) > 64:
        raise argparse.ArgumentTypeError(
            f"{text[:64]!r} must be three weights for train, valid, test, like 969,30,1"
        )
    return text
