"""``convert``: a model on Hugging Face to a checkpoint, and back."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helixpipe.commands.parser import flag_of
from helixpipe.commands.ranges import GIBIBYTES, Whole
from helixpipe.refusals import refuse

_ONLY_FOR = {"padded_vocab_size": "import", "reference": "export", "shard_gib": "export"}


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the command's parser."""
    parser = add("convert", help="a model on Hugging Face to a checkpoint, and back")
    add_arguments(parser)
    parser.set_defaults(run=convert)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, which tools/convert_hf.py has, too."""
    add = parser.add_argument
    ways = ("import", "export")
    add(
        "direction",
        choices=ways,
        metavar="{" + ",".join(ways) + "}",
        help="from Hugging Face to a checkpoint, or back",
    )
    add("--input", type=Path, required=True, metavar="DIR", help="import: the model; export: the checkpoints")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to be made")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights written (default: as they are)")
    add(
        "--padded-vocab-size",
        type=Whole(),
        metavar="N",
        help="import: rows of the embedding (default: its own)",
    )
    add(
        "--reference",
        type=Path,
        metavar="DIR",
        help="export: whose config.json and tokenizer it gets (default: the imported model's)",
    )
    add("--shard-gib", type=GIBIBYTES, help="export: largest size of a file (default 1)")


def convert(args: argparse.Namespace) -> None:
    """Convert, and print what to do with the result."""
    given = {
        flag_of(name): direction for name, direction in _ONLY_FOR.items() if getattr(args, name) is not None
    }
    refuse(
        {flag: direction != args.direction for flag, direction in given.items()},
        f"{{}} does not apply to {args.direction}; remove it",
    )
    # megatron.core warns at import about every optional package that is not installed.
    warnings.filterwarnings("ignore", module="megatron.core")
    from megatron.pretrain.hf.convert import DTYPES, export_model, import_model, printed

    dtype = None if args.dtype is None else DTYPES[args.dtype]
    if args.direction == "import":
        words = import_model(args.input, args.output, dtype=dtype, padded_rows=args.padded_vocab_size)
        print(printed(["--pretrained-checkpoint", str(args.output), *words]))
        return
    shard_bytes = int((args.shard_gib or 1.0) * 2**30)
    checkpoint = export_model(
        args.input, args.output, reference=args.reference, dtype=dtype, shard_bytes=shard_bytes
    )
    print(f"exported {checkpoint} to {args.output}")
