"""Tokenizers that need nothing but the corpus: byte-level BPE trained on it, or the bytes themselves."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from helixpipe.data.text_tokenizers import END_OF_DOCUMENT

SMALLEST_BPE_VOCABULARY = 257


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Raises:
        ValueError: `vocab_size` does not hold all bytes and the end-of-document token.
    """
    if vocab_size < SMALLEST_BPE_VOCABULARY:
        raise ValueError(
            f"vocabulary of {vocab_size} is too small: --vocab-size must be at least "
            f"{SMALLEST_BPE_VOCABULARY}, all bytes and {END_OF_DOCUMENT}"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids are the byte values, and 256 for the end of document."""
    # The byte-level alphabet writes a printable Latin-1 character as itself and moves the other
    # bytes, in order, to U+0100 and on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(0x100 + rank): byte for rank, byte in enumerate(moved)}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
