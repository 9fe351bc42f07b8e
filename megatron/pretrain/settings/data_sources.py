"""Which datasets ``--data-path`` names, and how much of each is trained on."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helixpipe.data.prefix import DatasetInfo

Weights = tuple[float, ...] | None


@dataclass(frozen=True)
class Blend:
    """Datasets that are mixed sample by sample, as Megatron does.

    Attributes:
        prefixes: of their files.
        weights: the share of samples from each, in any unit; None for all samples of each, once.
    """

    prefixes: tuple[str, ...]
    weights: Weights

    @property
    def is_mixed(self) -> bool:
        """Whether Megatron would blend: one dataset without a weight is taken as it is."""
        return len(self.prefixes) > 1 or self.weights is not None


def choose_blend(args: argparse.Namespace) -> None:
    """Set ``blend``, None for made-up documents, its ``weights``, and ``corpora`` where they are given.

    Args:
        args: parsed; ``dataset`` stands in for the files, if it is there.

    Raises:
        ValueError: as :func:`_blend_of`.
    """
    args.blend = _blend_of(args)
    args.weights = None if args.blend is None else args.blend.weights
    args.corpora = () if args.dataset is None or args.mock_data else (args.dataset,)


def _blend_of(args: argparse.Namespace) -> Blend | None:
    """What ``--data-path``, ``--data-args-path`` and ``--mock-data`` ask for; None for made-up documents.

    Raises:
        ValueError: none of them, several of them, or words that are no blend.
    """
    given = {
        "--data-path": args.data_path is not None,
        "--data-args-path": args.data_args_path is not None,
        "--mock-data": args.mock_data,
    }
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are two sources of data; leave one out")
    if not names:
        raise ValueError("there is no data; give --data-path PREFIX, or --mock-data")
    if args.mock_data:
        return None
    if args.data_args_path is None:
        return parse_blend("--data-path", args.data_path)
    return parse_blend(f"--data-args-path {args.data_args_path}", _words_of(args.data_args_path))


def parse_blend(source: str, words: Sequence[str]) -> Blend:
    """``a``, ``a b c``, or ``0.3 a 0.7 b``: with Megatron's rule, an even number of words are pairs.

    Args:
        source: of the words, for messages.
        words: prefixes, or weights each before its prefix.

    Raises:
        ValueError: no words, a weight that is not above 0, or the same prefix twice.
    """
    if not words:
        raise ValueError(f"{source} names no dataset; give a prefix")
    weights = [_weight(word) for word in words[::2]]
    if len(words) % 2 or any(weight is None for weight in weights):
        found = Blend(tuple(words), None)
    else:
        found = Blend(tuple(words[1::2]), tuple(weight for weight in weights if weight is not None))
    for weight in found.weights or ():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{source}: the weight {weight:g} of a dataset must be above 0; leave it out")
    if len(found.prefixes) != len(set(found.prefixes)):
        twice = next(prefix for prefix in found.prefixes if found.prefixes.count(prefix) > 1)
        raise ValueError(f"{source} has {twice} twice; give it once, with the sum of the weights")
    for prefix in found.prefixes:
        if found.is_mixed and _weight(prefix) is not None and not Path(f"{prefix}.idx").exists():
            raise ValueError(
                f"{source}: {prefix} is where a prefix is expected; give all datasets a weight, each before "
                "its prefix, or none"
            )
    return found


def _weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _words_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--data-args-path {path} cannot be read ({error}); give a file with the words of --data-path"
        ) from None


def summary_of(corpora: Sequence[DatasetInfo]) -> DatasetInfo:
    """What is known of all of them together.

    Raises:
        ValueError: datasets of different vocabularies, or with prompts in some only.
    """
    first = corpora[0]
    for other in corpora[1:]:
        if (other.vocab_size, other.eod) != (first.vocab_size, first.eod):
            raise ValueError(
                f"{other.prefix} has a vocabulary of {other.vocab_size} with end token {other.eod}, and "
                f"{first.prefix} one of {first.vocab_size} with {first.eod}; prepare both with one tokenizer"
            )
    if len(corpora) == 1:
        return first
    return DatasetInfo(
        prefix=first.prefix,
        vocab_size=first.vocab_size,
        eod=first.eod,
        num_documents=sum(info.num_documents for info in corpora),
        num_tokens=sum(info.num_tokens for info in corpora),
        longest_document=None,
        has_prompts=any(info.has_prompts for info in corpora),
        has_tokenizer_file=first.has_tokenizer_file,
    )
