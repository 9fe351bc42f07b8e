"""Turns text into Megatron's indexed dataset: PREFIX.bin, PREFIX.idx and, but for a tokenizer that training
is to name again, PREFIX.tokenizer.json.

The result depends on the input and the options alone, never on the number of worker processes.
The files are written under temporary names and renamed at the end, .idx last: a run that
is stopped at any moment leaves either the whole dataset or none.
"""

import contextlib
import glob
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from helixpipe.data.prefix import (
    DatasetPaths,
    dataset_paths,
    load_tokenizer,
    without_suffix,
)
from helixpipe.data.prepare.encoding import Encoders, TokenizerSource, text_tokenizer
from helixpipe.data.prepare.formats import Format
from helixpipe.data.prepare.pieces import PIECE_CHARACTERS, Piece, piece_limit, words_to_train_on
from helixpipe.data.prepare.sources import Reading, Source, find_sources, read_pieces, require_jsonl
from helixpipe.data.prepare.staging import Staging, refuse_existing
from helixpipe.data.prepare.tokenizer_training import byte_tokenizer
from helixpipe.data.prepare.training_process import train_bpe_apart
from helixpipe.data.prepare.writing import DocumentWriter
from helixpipe.data.text_tokenizers import TextTokenizer, TokenizerSettings

DEFAULT_VOCAB_SIZE = 4096


_CHUNK_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class PreparationOptions:
    """What to prepare.

    Attributes:
        inputs: Text files, files of JSON lines, both plain or compressed, and directories of them.
        output_prefix: Path of the dataset's files without their suffixes.
        pattern: Files of a directory are taken if their name matches this glob.
        exclude: Files and folders of a directory are left out if their name matches one of these.
        json_key: Key of the text in a JSONL object; with a prompt key, of the response.
        prompt_key: Key of the prompt, on which there is no loss; None for documents without.
        tokenizer: Tokenizer to make, "bpe" or "byte".
        tokenizer_file: Existing tokenizer to use; `tokenizer` and `vocab_size` do not apply then.
        named_tokenizer: Tokenizer by Megatron's name; none of the other three applies then, and it is not
            written beside the dataset.
        vocab_size: Entries of the vocabulary to train, with the end-of-document token.
        workers: Encoding processes.
        min_document_tokens: Documents of fewer tokens, end of document not counted, are left out.
        format: Format of all files; None to look into each.
        overwrite: Replace a dataset that stands at the prefix.
        progress: Show a progress bar if standard error is a terminal.
    """

    inputs: Sequence[str]
    output_prefix: str
    pattern: str = "*"
    exclude: Sequence[str] = ()
    json_key: str = "text"
    prompt_key: str | None = None
    tokenizer: str = "bpe"
    tokenizer_file: str | None = None
    named_tokenizer: TokenizerSettings | None = None
    vocab_size: int = DEFAULT_VOCAB_SIZE
    workers: int = 1
    min_document_tokens: int = 1
    format: Format | None = None
    overwrite: bool = False
    progress: bool = False


@dataclass(frozen=True)
class PreparationSummary:
    """What was written; document lengths are in tokens, end of document included.

    Attributes:
        paths: of the files.
        formats: input files of each format.
        compressed_files: those that are compressed.
        undecodable_files: those in which something was replaced by U+FFFD.
        stale_files: temporary files of earlier runs that were killed.
    """

    paths: tuple[str, ...]
    input_files: int
    input_bytes: int
    formats: dict[Format, int]
    compressed_files: int
    documents: int
    tokens: int
    vocab_size: int
    eod: int
    median_length: int
    p99_length: int
    longest_length: int
    empty_documents: int
    short_documents: int
    undecodable_files: tuple[str, ...]
    stale_files: tuple[str, ...]
    seconds: float


def prepare_dataset(options: PreparationOptions) -> PreparationSummary:
    """Write a dataset.

    Raises:
        ValueError: The options or the input are wrong, a dataset stands at the prefix, or the
            output cannot be written.
        RuntimeError: A process that trains or encodes died.
    """
    started = time.monotonic()
    _check_options(options)
    paths = dataset_paths(options.output_prefix)
    sources = find_sources(options.inputs, options.pattern, options.exclude, paths, options.format)
    if options.prompt_key is not None:
        require_jsonl(sources)
    stale = tuple(found for path in paths for found in sorted(glob.glob(f"{glob.escape(path)}.tmp-*")))
    undecodable: set[str] = set()
    source, tokenizer = _find_tokenizer(options, sources, paths, undecodable)
    has_file = isinstance(source, str)

    with Staging(paths, options.overwrite, has_tokenizer=has_file) as staging:
        try:
            if isinstance(source, str):
                with open(staging.temporary.tokenizer, "w", encoding="utf-8") as stream:
                    stream.write(source)
            written = _write_tokens(options, sources, undecodable, source, tokenizer, staging.temporary)
            lengths, empty, short = written
            if not len(lengths):
                raise ValueError(
                    f"no document is left to write ({empty} empty, {short} shorter than "
                    f"{options.min_document_tokens} tokens): give more input"
                )
            staging.publish()
        except OSError as error:
            raise ValueError(
                f"cannot write {options.output_prefix} ({error.strerror}): give an "
                "--output-prefix in a folder with room that may be written to"
            ) from error

    median, p99 = np.quantile(lengths, (0.5, 0.99), method="inverted_cdf")
    return PreparationSummary(
        paths=tuple(paths) if has_file else tuple(paths[:2]),
        input_files=len(sources),
        input_bytes=sum(source.size for source in sources),
        formats=dict(Counter(source.format for source in sources)),
        compressed_files=sum(bool(source.compression) for source in sources),
        documents=len(lengths),
        tokens=int(lengths.sum()),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.end[-1],
        median_length=int(median),
        p99_length=int(p99),
        longest_length=int(lengths.max()),
        empty_documents=empty,
        short_documents=short,
        undecodable_files=tuple(sorted(undecodable)),
        stale_files=stale,
        seconds=time.monotonic() - started,
    )


def _check_options(options: PreparationOptions) -> None:
    prefix = options.output_prefix
    meant = without_suffix(prefix)
    if meant is not None:
        raise ValueError(
            f"{prefix}: a prefix has no suffix, the three files get their own: give --output-prefix {meant}"
        )
    if not os.path.basename(prefix) or os.path.isdir(prefix):
        raise ValueError(
            f"{prefix}: names a folder: give a name for the dataset too, "
            f"such as --output-prefix {os.path.join(prefix, 'corpus')}"
        )
    if options.tokenizer not in ("bpe", "byte"):
        raise ValueError(f"unknown tokenizer {options.tokenizer!r}: give bpe or byte")
    if options.prompt_key is not None and options.prompt_key == options.json_key:
        raise ValueError(
            f"--prompt-key and --response-key are both {options.prompt_key!r}: name two keys of an object"
        )
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}: give 1 or more")
    if options.min_document_tokens < 1:
        raise ValueError(f"--min-document-tokens is {options.min_document_tokens}: give 1 or more")
    if not options.overwrite:
        refuse_existing(dataset_paths(prefix))


def _make_folder(paths: DatasetPaths) -> None:
    folder = os.path.dirname(paths.idx) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        # Found out now, and not after an hour of training the tokenizer.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file stands in its place" if in_the_way else error.strerror
        raise ValueError(
            f"cannot write to the folder {folder} ({reason}): give an --output-prefix in another folder"
        ) from error


def _find_tokenizer(
    options: PreparationOptions, sources: list[Source], paths: DatasetPaths, undecodable: set[str]
) -> tuple[TokenizerSource, TextTokenizer]:
    """The tokenizer that is given, or one that is made, once it is known that the output can be written."""
    source: TokenizerSource | None = options.named_tokenizer
    if options.tokenizer_file:
        source = _read_tokenizer(options.tokenizer_file)
    given = None if source is None else text_tokenizer(source)
    _make_folder(paths)
    if source is None:
        source = _make_tokenizer(options, sources, undecodable)
    return source, given or text_tokenizer(source)


def _read_tokenizer(path: str) -> str:
    load_tokenizer(path)
    # Kept as it is: saving a loaded tokenizer again may lose what this release does not know.
    with open(path, encoding="utf-8", newline="") as stream:
        return stream.read()


def _make_tokenizer(options: PreparationOptions, sources: list[Source], undecodable: set[str]) -> str:
    if options.tokenizer == "byte":
        return byte_tokenizer().to_str(pretty=True)
    reading = Reading(options.json_key, options.prompt_key, PIECE_CHARACTERS)
    with _progress_bar(options, sources, "training tokenizer") as bar:

        def texts() -> Iterator[str]:
            for piece in read_pieces(sources, reading, undecodable):
                yield from words_to_train_on(piece.text)
                bar.update(piece.input_bytes)

        return train_bpe_apart(texts(), options.vocab_size)


def _progress_bar(options: PreparationOptions, sources: list[Source], label: str) -> tqdm:
    return tqdm(
        total=sum(source.size for source in sources),
        desc=label,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None if options.progress else True,
    )


def _write_tokens(
    options: PreparationOptions,
    sources: list[Source],
    undecodable: set[str],
    source: TokenizerSource,
    tokenizer: TextTokenizer,
    temporary: DatasetPaths,
) -> tuple[np.ndarray, int, int]:
    """Write .bin and .idx; return document lengths and the counts of empty and short documents."""
    builder_class, dtype_class = _import_megatron()
    dtype = dtype_class.optimal_dtype(tokenizer.vocab_size)
    limit = None if tokenizer.json is None else piece_limit(tokenizer.json)
    reading = Reading(options.json_key, options.prompt_key, limit)
    encoders = Encoders(options.workers, source, dtype)
    builder = builder_class(temporary.bin, dtype=dtype, multimodal=options.prompt_key is not None)
    writer = DocumentWriter(builder, tokenizer.end, options.min_document_tokens, tokenizer.begin)
    try:
        with encoders, _progress_bar(options, sources, "encoding") as bar:
            for chunk, encoded in encoders.encode(_split_chunks(read_pieces(sources, reading, undecodable))):
                start = 0
                for piece, length in zip(chunk, encoded.lengths, strict=True):
                    writer.add(encoded.tokens[start : start + length], is_prompt=piece.is_prompt)
                    start += length
                    if piece.is_last:
                        writer.end_document()
                    bar.update(piece.input_bytes)
        builder.finalize(temporary.idx)
    finally:
        # finalize() closes it too; on a full disk closing fails again while flushing.
        with contextlib.suppress(OSError):
            builder.data_file.close()
    ends = np.cumsum([0, *builder.sequence_lengths])
    return np.diff(ends[builder.document_indices]), writer.empty, writer.short


def _import_megatron() -> tuple[Any, Any]:
    # Imported here because it takes seconds, which neither wrong options nor the encoding
    # processes should pay for. Its warnings are about optimizers, of no concern to data.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    return IndexedDatasetBuilder, DType


def _split_chunks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    chunk: list[Piece] = []
    characters = 0
    for piece in pieces:
        chunk.append(piece)
        characters += len(piece.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
