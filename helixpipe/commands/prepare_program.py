"""Turn text files, JSONL files or directories of them into a Megatron dataset.

    helixpipe prepare --input src/ --pattern '*.py' --output-prefix data/src

writes data/src.bin, data/src.idx and data/src.tokenizer.json; with --tokenizer-type, which training is given
again, the first two alone. With --prompt-key, an object of a JSONL file is a prompt and a response, and
training has no loss on the prompt.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import Whole
from helixpipe.commands.tokenizer_arguments import VOCABULARY, add_tokenizer_arguments, tokenizer_settings
from helixpipe.data.prepare.corpus import (
    DEFAULT_VOCAB_SIZE,
    PreparationOptions,
    PreparationSummary,
    prepare_dataset,
)
from helixpipe.data.prepare.formats import Format
from helixpipe.data.prepare.tokenizer_training import SMALLEST_BPE_VOCABULARY
from helixpipe.data.text_tokenizers import END_OF_DOCUMENT, TokenizerSettings

_TEXT_KEY = "text"
_RESPONSE_KEY = "response"
_KINDS = {
    Format.TEXT: "text",
    Format.JSONL: "JSON lines",
    Format.PARQUET: "Parquet",
    Format.DATASET: "saved datasets",
}


class _Stopped(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(argv: Sequence[str] | None = None, program: str = "prepare_data") -> int:
    """Run the command line; its exit code: 0, 1 for a failure, 2 for wrong input, 128 and more for a signal.

    Args:
        argv: the words after the program's name.
        program: its name, with which its lines on stderr begin.
    """
    options = _parse(argv, program)
    try:
        summary = prepare_dataset(options)
    except ValueError as error:
        return _fail(program, f"error: {error}", 2)
    except RuntimeError as error:
        return _fail(program, f"error: {error}", 1)
    except KeyboardInterrupt:
        return _fail(program, "stopped by SIGINT: temporary files are removed", 128 + signal.SIGINT)
    except _Stopped as stop:
        name = signal.Signals(stop.number).name
        return _fail(program, f"stopped by {name}: temporary files are removed", 128 + stop.number)
    _print_warnings(summary, program)
    _print_summary(summary)
    return 0


def stop_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the program as Ctrl-C does: with no temporary files left."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup SIGHUP is ignored, and stays so.
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _stop)


def build_parser(program: str = "prepare_data") -> ScriptParser:
    """The options."""
    parser = ScriptParser(
        prog=program,
        description="Turn text into a Megatron dataset: PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json.",
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="text files (one document each), files of JSON lines (one document per line), both plain or "
        "compressed (gzip, bzip2, xz), or directories, which are walked in sorted order",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="dataset path without suffix")
    add(
        "--pattern", default="*", metavar="GLOB", help="names to take from a directory (default: %(default)s)"
    )
    add(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help="names of files and folders to leave out of a directory, such as '.*' tests",
    )
    add(
        "--format",
        choices=("auto", *(name.value for name in Format)),
        default="auto",
        help="of all files; auto looks into each (default: %(default)s)",
    )
    _add_keys(add)
    _add_tokenizer(add)
    add(
        "--workers",
        type=Whole(most=1024),
        default=_default_workers(),
        metavar="N",
        help="encoding processes (default: %(default)s)",
    )
    add(
        "--min-document-tokens",
        type=Whole(),
        default=1,
        metavar="N",
        help=f"leave out documents of fewer tokens, {END_OF_DOCUMENT} not counted (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a dataset that stands at PREFIX")
    return parser


def _add_keys(add: Callable[..., Any]) -> None:
    add(
        "--json-key",
        metavar="KEY",
        help=f"JSONL key of the text, data.text for one in an object (default: {_TEXT_KEY})",
    )
    add(
        "--prompt-key",
        metavar="KEY",
        help="JSONL key of a prompt, on which there is no loss (only for elastic training)",
    )
    add(
        "--response-key",
        metavar="KEY",
        help=f"with --prompt-key: JSONL key of the response (default: {_RESPONSE_KEY})",
    )


def _add_tokenizer(add: Callable[..., Any]) -> None:
    add(
        "--tokenizer",
        choices=("bpe", "byte"),
        help="train a byte-level BPE on the input, or use bytes as they are (default: bpe)",
    )
    add("--tokenizer-file", metavar="FILE", help="use this tokenizer.json instead")
    add(
        "--vocab-size",
        type=VOCABULARY,
        metavar="N",
        help=f"vocabulary of the BPE, {END_OF_DOCUMENT} included (default: {DEFAULT_VOCAB_SIZE}), or of a "
        "--tokenizer-type that has none in its files: for NullTokenizer without the end token",
    )
    add_tokenizer_arguments(add)


def _parse(argv: Sequence[str] | None, program: str) -> PreparationOptions:
    parser = build_parser(program)
    given = parser.parse_args(argv)
    named = _named_tokenizer(given, parser)
    if given.prompt_key is None and given.response_key is not None:
        parser.error("--response-key goes with --prompt-key")
    if given.prompt_key is not None and given.json_key is not None:
        parser.error("--json-key is for documents without prompts: give --response-key")
    key = given.json_key or _TEXT_KEY
    if given.prompt_key is not None:
        key = given.response_key or _RESPONSE_KEY
    return PreparationOptions(
        inputs=given.input,
        output_prefix=given.output_prefix,
        pattern=given.pattern,
        exclude=given.exclude,
        json_key=key,
        prompt_key=given.prompt_key,
        tokenizer=given.tokenizer or "bpe",
        tokenizer_file=given.tokenizer_file,
        named_tokenizer=named,
        vocab_size=DEFAULT_VOCAB_SIZE if given.vocab_size is None else given.vocab_size,
        workers=given.workers,
        min_document_tokens=given.min_document_tokens,
        format=None if given.format == "auto" else Format(given.format),
        overwrite=given.overwrite,
        progress=True,
    )


def _named_tokenizer(given: argparse.Namespace, parser: ScriptParser) -> TokenizerSettings | None:
    if given.tokenizer_file and (given.tokenizer or given.vocab_size):
        parser.error("--tokenizer-file goes without --tokenizer and --vocab-size")
    if given.tokenizer == "byte" and given.vocab_size:
        parser.error("--vocab-size is for --tokenizer bpe: the byte vocabulary is 257")
    if given.tokenizer_type and (given.tokenizer or given.tokenizer_file):
        parser.error("--tokenizer-type goes without --tokenizer and --tokenizer-file")
    if given.tokenizer_type is None and given.vocab_size and given.vocab_size < SMALLEST_BPE_VOCABULARY:
        parser.error(
            f"argument --vocab-size: must be at least {SMALLEST_BPE_VOCABULARY}, not {given.vocab_size}"
        )
    try:
        return tokenizer_settings(given)
    except ValueError as error:
        parser.error(str(error))


def _default_workers() -> int:
    # The affinity, unlike the count of CPUs, knows what a job scheduler allotted.
    return min(8, len(os.sched_getaffinity(0)))


def _fail(program: str, message: str, code: int) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return code


def _print_warnings(summary: PreparationSummary, program: str) -> None:
    if summary.undecodable_files:
        print(
            f"{program}: warning: bytes that are not UTF-8 were replaced by U+FFFD in "
            f"{len(summary.undecodable_files)} of {summary.input_files} files, "
            f"the first is {summary.undecodable_files[0]}",
            file=sys.stderr,
        )
    lines = summary.formats.get(Format.JSONL, 0)
    if lines and Format.TEXT in summary.formats:
        print(
            f"{program}: warning: {lines} of {summary.input_files} files are JSON lines, of which each line "
            "is a document; of the others each file is one: give --format if they should be read alike",
            file=sys.stderr,
        )
    if summary.stale_files:
        print(
            f"{program}: warning: {len(summary.stale_files)} temporary files of a killed run "
            f"stand next to the dataset, delete them if no other run is writing: "
            f"{' '.join(summary.stale_files)}",
            file=sys.stderr,
        )


def _print_summary(summary: PreparationSummary) -> None:
    skipped = [
        f"{count:,} {name}"
        for count, name in (
            (summary.empty_documents, "empty"),
            (summary.short_documents, "too short"),
        )
        if count
    ]
    left_out = f" (left out: {', '.join(skipped)})" if skipped else ""
    files = "1 file" if summary.input_files == 1 else f"{summary.input_files:,} files"
    kinds = [f"{count:,} {_KINDS[name]}" for name, count in sorted(summary.formats.items())]
    if summary.compressed_files:
        kinds.append(f"{summary.compressed_files:,} compressed")
    rows = (
        ("documents", f"{summary.documents:,}{left_out}"),
        ("tokens", f"{summary.tokens:,}"),
        ("vocabulary", f"{summary.vocab_size:,} (documents end with id {summary.eod})"),
        ("input", f"{summary.input_bytes:,} bytes in {files} ({', '.join(kinds)})"),
        (
            "document length",
            f"median {summary.median_length:,}, p99 {summary.p99_length:,}, "
            f"longest {summary.longest_length:,} tokens",
        ),
        ("time", f"{summary.seconds:.1f} s"),
        *(("file", path) for path in summary.paths),
    )
    for name, value in rows:
        print(f"{name:<16} {value}")


def _stop(number: int, _frame: object) -> NoReturn:
    raise _Stopped(number)
