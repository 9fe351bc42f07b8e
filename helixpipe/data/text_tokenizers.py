"""Text into ids, by the tokenizers that Megatron names, from files alone: nothing is fetched.

A document is the ids of its text between those that the tokenizer puts at a beginning and at an end. Text
that spells a special token is text.
"""

from __future__ import annotations

import base64
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from helixpipe.json_input import parse_json
from helixpipe.refusals import refuse
from helixpipe.reliability.exit_codes import DataError

END_OF_DOCUMENT = "<|endoftext|>"

HUGGING_FACE, GPT2 = "HuggingFaceTokenizer", "GPT2BPETokenizer"
TIKTOKEN, BYTE_LEVEL, NULL = "TikTokenizer", "ByteLevelTokenizer", "NullTokenizer"
# Megatron's names for one format; of Llama 2 documents have a begin token.
LLAMA2 = "Llama2Tokenizer"
SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", LLAMA2)
TOKENIZER_TYPES = (HUGGING_FACE, GPT2, *SENTENCE_PIECE, TIKTOKEN, BYTE_LEVEL, NULL)
TIKTOKEN_PATTERNS = ("v1", "v2")

# Fields of TokenizerSettings that a type needs, and those that it also takes.
_NEEDS: dict[str, tuple[str, ...]] = {
    GPT2: ("vocab_file", "merge_file"),
    BYTE_LEVEL: (),
    NULL: ("vocab_size",),
}
_TAKES: dict[str, tuple[str, ...]] = {
    BYTE_LEVEL: ("vocab_size",),
    TIKTOKEN: ("vocab_size", "tiktoken_pattern", "tiktoken_num_special_tokens"),
}
_FLAGS = {
    "model": "--tokenizer-model",
    "vocab_file": "--vocab-file",
    "merge_file": "--merge-file",
    "vocab_size": "--vocab-size",
    "tiktoken_pattern": "--tiktoken-pattern",
    "tiktoken_num_special_tokens": "--tiktoken-num-special-tokens",
}
# Megatron's defaults.
_BYTE_VOCABULARY, _BYTE_END = 512, 0
_TIKTOKEN_VOCABULARY, _TIKTOKEN_SPECIAL = 2**17, 1000


@dataclass(frozen=True)
class TokenizerSettings:
    """Which tokenizer, and its files; None where nothing was given.

    Attributes:
        type: one of TOKENIZER_TYPES.
        model: file or, of Hugging Face, folder.
        vocab_file, merge_file: of GPT-2.
        vocab_size: ids, of the byte-level tokenizer and of tiktoken; without the end token, of NullTokenizer.
        tiktoken_pattern: ``v1`` or ``v2``, how tiktoken splits words.
        tiktoken_num_special_tokens: ids before those of words.

    Raises:
        ValueError: a file or a size that the type needs is missing, or does not apply to it.
    """

    type: str
    model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.type not in TOKENIZER_TYPES:
            raise ValueError(f"--tokenizer-type {self.type} is not known; use {', '.join(TOKENIZER_TYPES)}")
        needs = _NEEDS.get(self.type, ("model",))
        takes = (*needs, *_TAKES.get(self.type, ()))
        given = {field: getattr(self, field) is not None for field in _FLAGS}
        refuse(
            {_FLAGS[field]: not given[field] for field in needs},
            f"--tokenizer-type {self.type} needs {{}}; add it",
        )
        refuse(
            {flag: given[field] and field not in takes for field, flag in _FLAGS.items()},
            f"{{}} does not apply to --tokenizer-type {self.type}; remove it",
        )


class TextTokenizer(Protocol):
    """What turns texts into ids.

    Attributes:
        vocab_size: rows that an embedding needs: the largest id and one more.
        begin: ids before a document's.
        end: ids after a document's; the last is the end of document.
        json: for the ``tokenizers`` library; None if it is another's.
    """

    vocab_size: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    json: str | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without those of a document's beginning and end.

        Raises:
            ValueError: a text that the tokenizer cannot encode.
        """


def open_tokenizer(settings: TokenizerSettings) -> TextTokenizer:
    """Load a tokenizer.

    Raises:
        DataError: a file that is missing, or is not what the type needs.
        ValueError: its library is not installed, or sizes that do not fit it.
    """
    if settings.type == HUGGING_FACE:
        return _open_hugging_face(settings.model or "")
    if settings.type == GPT2:
        return _open_gpt2(settings.vocab_file or "", settings.merge_file or "")
    if settings.type in SENTENCE_PIECE:
        return _SentencePiece(settings.model or "", settings.type)
    if settings.type == TIKTOKEN:
        return _Tiktoken(settings)
    if settings.type == BYTE_LEVEL:
        return _Bytes(_BYTE_VOCABULARY if settings.vocab_size is None else settings.vocab_size)
    return _Numbers(settings.vocab_size or 0)


class LibraryTokenizer:
    """A tokenizer of the ``tokenizers`` library.

    Args:
        json: as the library saves it.
        end: the token that ends a document.
        source: for messages.
        begins: documents begin as the tokenizer's own template has it.

    Raises:
        DataError: the library cannot read it, or it has no such token.
    """

    def __init__(self, json: str, end: str, source: str, *, begins: bool = False) -> None:
        tokenizer = parse_tokenizer(json, source)
        # A tokenizer file may carry these settings; a document is written whole.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        eod = tokenizer.token_to_id(end)
        if eod is None:
            raise DataError(f"{source}: has no {end} token, which ends documents: add it as a special token")
        self.vocab_size = vocabulary_size(tokenizer)
        self.begin, self.end = _template(tokenizer) if begins else ((), ())
        if self.end[-1:] != (eod,):
            self.end = (*self.end, eod)
        # The token itself marks ends of documents alone.
        tokenizer.encode_special_tokens = True
        self.json: str | None = json
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer cannot encode a document: {reason}") from error
        return [encoding.ids for encoding in encodings]


def parse_tokenizer(content: str | bytes, source: str) -> Tokenizer:
    """A tokenizer from its JSON.

    Raises:
        DataError: it is not what the `tokenizers` library saves.
    """
    try:
        return Tokenizer.from_str(content if isinstance(content, str) else content.decode("utf-8"))
    except Exception as error:  # the library raises plain Exception for any bad content
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source}: is not a tokenizer of the `tokenizers` library ({reason}): "
            "give a tokenizer.json that it saved"
        ) from error


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The number of rows an embedding needs; ids need not be contiguous."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _template(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer puts before and after a text."""
    found = tokenizer.encode("a")
    is_added = found.special_tokens_mask
    first = is_added.index(0) if 0 in is_added else len(is_added)
    last = len(is_added) - is_added[::-1].index(0) if 0 in is_added else len(is_added)
    return tuple(found.ids[:first]), tuple(found.ids[last:])


def _open_hugging_face(model: str) -> TextTokenizer:
    folder, file = (model, os.path.join(model, "tokenizer.json")) if os.path.isdir(model) else ("", model)
    folder = folder or os.path.dirname(model)
    if not os.path.exists(model):
        raise DataError(
            f"{model}: no such file or folder: --tokenizer-model takes a tokenizer.json, or the folder of a "
            "model; names of the Hub are not fetched"
        )
    if not os.path.isfile(file):
        return _Transformers(model)
    return LibraryTokenizer(_read(file), _end_token(folder), file, begins=True)


def _end_token(folder: str) -> str:
    """The end token that a model's folder names, or the separator, as Megatron takes it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            found = parse_json(_read(path), path)
        except ValueError as error:
            raise DataError(f"{error}: copy the model's folder again") from error
        for key in ("eos_token", "sep_token"):
            token = found.get(key) if isinstance(found, dict) else None
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                return content
    raise DataError(
        f"{folder or '.'}: neither tokenizer_config.json nor special_tokens_map.json has an eos_token, which "
        "ends documents: add it"
    )


def _open_gpt2(vocab_file: str, merge_file: str) -> LibraryTokenizer:
    for path in (vocab_file, merge_file):
        _read(path)
    try:
        tokenizer = Tokenizer(models.BPE.from_file(vocab_file, merge_file))
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())
        raise DataError(
            f"{vocab_file}, {merge_file}: are not vocabulary and merges of one BPE ({reason}): give "
            "vocab.json and merges.txt of one model"
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_DOCUMENT) is not None:
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return LibraryTokenizer(tokenizer.to_str(), END_OF_DOCUMENT, vocab_file)


class _Transformers:
    """A tokenizer that only ``transformers`` knows how to build."""

    json: str | None = None

    def __init__(self, model: str) -> None:
        transformers = _library("transformers", HUGGING_FACE)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        except Exception as error:  # the library raises whatever its parts raise
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"{model}: transformers cannot load its tokenizer ({reason}): check it"
            ) from error
        eod = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if eod is None:
            raise DataError(f"{model}: its tokenizer has no eos_token, which ends documents: add it")
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        first, last = tokenizer.build_inputs_with_special_tokens([-1]), (eod,)
        at = first.index(-1)
        self.begin = tuple(first[:at])
        after = tuple(first[at + 1 :])
        self.end = after if after[-1:] == last else (*after, *last)
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        found: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return found


class _SentencePiece:
    json: str | None = None

    def __init__(self, model: str, kind: str) -> None:
        library = _library("sentencepiece", kind)
        _require(model)
        try:
            self._tokenizer = library.SentencePieceProcessor(model_file=model)
        except RuntimeError as error:
            raise DataError(
                f"{model}: is not a model of SentencePiece: give a .model file that it trained"
            ) from error
        eod, bos = self._tokenizer.eos_id(), self._tokenizer.bos_id()
        if eod < 0:
            raise DataError(f"{model}: has no end token: train it with one")
        if kind == LLAMA2 and bos < 0:
            raise DataError(f"{model}: has no begin token, as {LLAMA2} has: use {SENTENCE_PIECE[1]}")
        self.vocab_size = int(self._tokenizer.get_piece_size())
        self.begin: tuple[int, ...] = (bos,) if kind == LLAMA2 else ()
        self.end: tuple[int, ...] = (eod,)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        found: list[list[int]] = self._tokenizer.encode(list(texts))
        return found


class _Tiktoken:
    """Megatron's form of tiktoken: a JSON list of tokens, behind special ones."""

    json: str | None = None

    def __init__(self, settings: TokenizerSettings) -> None:
        _library("tiktoken", TIKTOKEN)
        model = settings.model or ""
        vocab_size = settings.vocab_size or _TIKTOKEN_VOCABULARY
        special = settings.tiktoken_num_special_tokens or _TIKTOKEN_SPECIAL
        _check_tiktoken(model, vocab_size, special)
        # Imported here because it takes seconds.
        library = importlib.import_module("megatron.core.tokenizers.text.libraries.tiktoken_tokenizer")
        found = library.TikTokenTokenizer(
            model,
            num_special_tokens=special,
            pattern=settings.tiktoken_pattern or "v2",
            vocab_size=vocab_size,
        )
        self.vocab_size = vocab_size
        self.begin: tuple[int, ...] = ()
        self.end: tuple[int, ...] = (int(found.eos_id),)
        self._tokenizer = found.tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        found: list[list[int]] = self._tokenizer.encode_ordinary_batch(list(texts), num_threads=1)
        return found


def _check_tiktoken(model: str, vocab_size: int, special: int) -> None:
    """Megatron checks its form of tiktoken by assertions."""
    try:
        entries = parse_json(_read(model), model)
        words = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        ranks = [entry["rank"] for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{model}: is not Megatron's JSON list of tokens with rank, token_bytes and token_str: convert it"
        ) from error
    if ranks != list(range(len(ranks))) or words[:256] != [bytes([i]) for i in range(256)]:
        raise DataError(f"{model}: is not ordered by rank, all bytes first: convert it again")
    if not special < vocab_size <= len(words) + special:
        raise DataError(
            f"{model}: has {len(words)} tokens, which with {special} special ones before them make no "
            f"vocabulary of {vocab_size}: give --vocab-size and --tiktoken-num-special-tokens that fit it"
        )


class _Bytes:
    """UTF-8, with the zero byte as the end of document."""

    json: str | None = None
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = (_BYTE_END,)

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 256:
            raise ValueError(f"--vocab-size {vocab_size} does not hold all bytes; give 256 or more")
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        for text in texts:
            if "\0" in text:
                raise ValueError(
                    f"a text holds the character U+0000, which ends a document for {BYTE_LEVEL}; remove it"
                )
        return [list(text.encode()) for text in texts]


class _Numbers:
    """Ids written out, with white space between them."""

    json: str | None = None
    begin: tuple[int, ...] = ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size + 1
        self.end: tuple[int, ...] = (vocab_size,)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`TextTokenizer`."""
        return [[self._id(word) for word in text.split()] for text in texts]

    def _id(self, word: str) -> int:
        if not (word.isascii() and word.isdigit() and len(word) < 16 and int(word) < self.vocab_size - 1):
            raise ValueError(
                f"{word[:64]!r} is not an id from 0 to {self.vocab_size - 2}, of which texts for {NULL} "
                "consist; give a larger --vocab-size or other text"
            )
        return int(word)


def _library(name: str, kind: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"--tokenizer-type {kind} needs the package {name}, which is not installed: pip install "
            '"helixpipe[hf]"'
        ) from error


def _require(path: str) -> None:
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file: check --tokenizer-model")


def _read(path: str) -> str:
    try:
        # Kept as it is: newlines, too.
        with open(path, encoding="utf-8", newline="") as stream:
            return stream.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 ({error.reason}): give the file that it was copied from"
        ) from error
