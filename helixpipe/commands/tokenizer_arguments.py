"""The options that name a tokenizer, with Megatron's names; the same for preparing data and for training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from helixpipe.commands.ranges import Whole
from helixpipe.data.text_tokenizers import GPT2, TIKTOKEN_PATTERNS, TOKENIZER_TYPES, TokenizerSettings
from helixpipe.refusals import refuse

VOCABULARY = Whole(most=2**24)

# Options that describe a tokenizer, by the field of TokenizerSettings that each sets.
_OPTIONS = {
    "model": "tokenizer_model",
    "vocab_file": "vocab_file",
    "merge_file": "merge_file",
    "tiktoken_pattern": "tiktoken_pattern",
    "tiktoken_num_special_tokens": "tiktoken_num_special_tokens",
}


def add_tokenizer_arguments(add: Callable[..., Any]) -> None:
    """Add the options, all but ``--vocab-size``, which a program may need for more."""
    add(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        help="of the tokenizer with which data are made, as Megatron names it",
    )
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="file of the tokenizer; HuggingFaceTokenizer: also a folder with tokenizer.json and "
        "tokenizer_config.json",
    )
    add("--vocab-file", metavar="FILE", help="GPT2BPETokenizer: vocab.json")
    add("--merge-file", metavar="FILE", help="GPT2BPETokenizer: merges.txt")
    add(
        "--tiktoken-pattern", choices=TIKTOKEN_PATTERNS, help="TikTokenizer: how words are split (default v2)"
    )
    add(
        "--tiktoken-num-special-tokens",
        type=Whole(least=7, most=2**24),
        metavar="N",
        help="TikTokenizer: ids before those of words (default 1000)",
    )


def tokenizer_settings(args: argparse.Namespace) -> TokenizerSettings | None:
    """The tokenizer that the options name; None if they name none.

    Raises:
        ValueError: options without ``--tokenizer-type``, or that do not fit it.
    """
    if args.tokenizer_type is None and None not in (args.vocab_file, args.merge_file):
        # As in Megatron's pretrain_gpt.py.
        args.tokenizer_type = GPT2
    if args.tokenizer_type is None:
        given = {f"--{name.replace('_', '-')}": getattr(args, name) is not None for name in _OPTIONS.values()}
        refuse(given, "{} needs --tokenizer-type; add it")
        return None
    fields = {field: getattr(args, name) for field, name in _OPTIONS.items()}
    return TokenizerSettings(args.tokenizer_type, vocab_size=args.vocab_size, **fields)
