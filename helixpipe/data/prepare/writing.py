"""Writes documents into Megatron's indexed dataset as their tokens come, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from helixpipe.data.index_file import LOSS_MODE, PROMPT_MODE

# The index has 32 bits for a length.
_MOST_TOKENS = 2**31 - 1


class DocumentWriter:
    """Writes those documents that are long enough, none of them in memory as a whole.

    A document is one sequence, and its prompt another before it.

    Args:
        builder: Megatron's ``IndexedDatasetBuilder``.
        begin, end: ids at a document's beginning and its end.
        min_tokens: documents of fewer tokens, begin and end not counted, are left out.

    Attributes:
        empty: documents left out because they have no text.
        short: documents left out because they are short.
    """

    def __init__(self, builder: Any, end: Sequence[int], min_tokens: int, begin: Sequence[int] = ()) -> None:
        self.empty = 0
        self.short = 0
        self._builder = builder
        self._begin_ids, self._end_ids = (np.array(ids, dtype=builder.dtype) for ids in (begin, end))
        self._min_tokens = min_tokens
        self._begin()

    def _begin(self) -> None:
        # Until it is known whether the document stays.
        self._held: list[np.ndarray] = [self._begin_ids]
        self._prompt_tokens = 0
        self._text_tokens = 0

    def add(self, tokens: np.ndarray, *, is_prompt: bool) -> None:
        """Add the next tokens of a document."""
        self._held.append(tokens)
        if is_prompt:
            self._prompt_tokens += len(tokens)
        else:
            self._text_tokens += len(tokens)
        if self._stays:
            self._flush()

    def end_document(self) -> None:
        """End a document.

        Raises:
            ValueError: it has more tokens than an index can tell.
        """
        if self._stays:
            self._held.append(self._end_ids)
            self._flush()
            self._enter()
        elif self._text_tokens:
            self.short += 1
        else:
            self.empty += 1
        self._begin()

    @property
    def _stays(self) -> bool:
        return self._text_tokens > 0 and self._prompt_tokens + self._text_tokens >= self._min_tokens

    def _flush(self) -> None:
        for tokens in self._held:
            self._builder.data_file.write(tokens.tobytes())
        self._held.clear()

    def _enter(self) -> None:
        """Enter a written document into the index."""
        before, after = len(self._begin_ids), len(self._end_ids)
        if self._prompt_tokens:
            sequences = [
                (before + self._prompt_tokens, PROMPT_MODE), (self._text_tokens + after, LOSS_MODE),
            ]  # fmt: skip
        else:
            sequences = [(before + self._text_tokens + after, LOSS_MODE)]
        for length, mode in sequences:
            if length > _MOST_TOKENS:
                raise ValueError(
                    f"a document of {length} tokens is longer than the {_MOST_TOKENS} that an index can "
                    "tell: cut it"
                )
            self._builder.sequence_lengths.append(length)
            if self._builder.multimodal:
                self._builder.sequence_modes.append(mode)
        self._builder.end_document()
