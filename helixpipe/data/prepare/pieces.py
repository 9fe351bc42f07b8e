"""Documents in pieces of bounded size, cut where no tokenizer that splits at spaces sees the difference.

The library needs a hundred times the memory of a text to encode it, and to train on it time that grows with
the square of the longest word: neither must depend on what a corpus holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from helixpipe.json_input import parse_object

# Of a piece: what is encoded at a time.
PIECE_CHARACTERS = 1 << 18
# Of a word to train on. Longer ones, like those of base64, are cut: they are no words of a language.
LONGEST_WORD = 256

# Before a space between two characters that are none: whatever precedes is a word's end.
_PLACE = re.compile(r"(?<=\S) (?=\S)")
_WINDOW = 4096
_LONG_WORD = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD + 1},}}|(?<!\s)\s{{{LONGEST_WORD + 1},}}")
# Patterns of Llama 3 and of Qwen 2, which a space always begins a new match of, too.
_KNOWN_PATTERNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: of the part.
        input_bytes: of the input, read since the piece before.
        is_prompt: it belongs to the prompt, which comes first.
        is_last: the document ends with it.
    """

    text: str
    input_bytes: int
    is_prompt: bool = False
    is_last: bool = True


def cut(blocks: Iterable[str], limit: int | None) -> Iterator[str]:
    """A text in one or more pieces of at most ``limit`` characters, which do not depend on ``blocks``.

    A piece ends before the last space within the limit that stands between two words. Only where there is
    none, in a run of that length without such a space, is it cut anywhere.

    Args:
        blocks: the text's parts, as they were read.
        limit: characters of a piece, 2 or more; None for the whole text in one.
    """
    if limit is None:
        yield "".join(blocks)
        return
    text = ""
    for block in blocks:
        text += block
        start = 0
        # One more character tells whether a place is one.
        while len(text) - start > limit + 1:
            end = _last_place(text, start, start + limit)
            yield text[start:end]
            start = end
        text = text[start:]
    while len(text) > limit:
        end = _last_place(text, 0, limit)
        yield text[:end]
        text = text[end:]
    yield text


def words_to_train_on(text: str) -> Iterator[str]:
    """A text with its longest runs, of white space or of anything else, in parts of ``LONGEST_WORD``."""
    start = 0
    for found in _LONG_WORD.finditer(text):
        yield text[start : found.start()]
        for place in range(found.start(), found.end(), LONGEST_WORD):
            yield text[place : min(place + LONGEST_WORD, found.end())]
        start = found.end()
    yield text[start:]


def piece_limit(tokenizer_json: str) -> int | None:
    """How long pieces may be that a tokenizer encodes like the whole; None for one that may tell them apart.

    Byte-level BPE does not, if each of its words begins at a space: as trained here, and as of GPT-2, Llama 3
    and Qwen 2.
    """
    found = parse_object(tokenizer_json, "the tokenizer")
    normalizer = found.get("normalizer")
    # NFC joins nothing across a space.
    is_plain = normalizer is None or normalizer == {"type": "NFC"}
    tokens_are_plain = all(_is_plain(token) for token in found.get("added_tokens") or ())
    is_known = is_plain and tokens_are_plain and _splits_at_spaces(found.get("pre_tokenizer") or {})
    return PIECE_CHARACTERS if is_known and (found.get("model") or {}).get("type") == "BPE" else None


def _last_place(text: str, start: int, end: int) -> int:
    """The last place to cut from ``start + 1`` to ``end``; ``end`` if there is none."""
    high = end + 1
    while high > start + 1:
        low = max(start + 1, high - _WINDOW)
        # What follows a place must be seen, too.
        places = [found.start() for found in _PLACE.finditer(text, low, high + 1)]
        if places:
            return places[-1]
        high = low
    return end


def _is_plain(token: dict[str, Any]) -> bool:
    """An added token that takes no white space around it and holds none."""
    takes_more = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    return not takes_more and not re.search(r"\s", str(token.get("content", "")))


def _splits_at_spaces(pre_tokenizer: dict[str, Any]) -> bool:
    parts = pre_tokenizer.get("pretokenizers", [])
    if pre_tokenizer.get("type") == "Sequence" and len(parts) == 2:
        split, pre_tokenizer = parts
        pattern = (split.get("pattern") or {}).get("Regex")
        is_known = split.get("type") == "Split" and pattern in _KNOWN_PATTERNS
        return (
            is_known
            and split.get("behavior") == "Isolated"
            and not split.get("invert")
            and _is_byte_level(pre_tokenizer, uses_regex=False)
        )
    return _is_byte_level(pre_tokenizer, uses_regex=True)


def _is_byte_level(part: dict[str, Any], *, uses_regex: bool) -> bool:
    return (
        part.get("type") == "ByteLevel"
        and not part.get("add_prefix_space", True)
        and part.get("use_regex", True) is uses_regex
    )
