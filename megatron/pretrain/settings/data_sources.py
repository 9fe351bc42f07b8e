"""Which datasets ``--data-path`` names, and how much of each is trained on."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helixpipe.data.prefix import DatasetInfo
from helixpipe.json_input import parse_object

Weights = tuple[float, ...] | None

DEFAULT_SPLIT = "969,30,1"


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


@dataclass(frozen=True)
class Corpora:
    """The datasets of a blend, as their headers describe them."""

    infos: tuple[DatasetInfo, ...]
    weights: Weights


def choose_blend(args: argparse.Namespace) -> None:
    """Set what data the job has, of its options, and what is known of them where ``dataset`` is given.

    Args:
        args: parsed. Gets ``blend``, which ``--split`` divides, or ``part_blends`` for training and
            validation; both are None for made-up documents. Gets ``corpora``, ``weights`` and ``parts`` as
            :class:`~megatron.pretrain.settings.job.DataSettings` has them; empty until files are looked at.

    Raises:
        ValueError: no source of data, several, or words that are no blend.
    """
    args.blend, args.part_blends = None, None
    source = _source_of(args)
    if source == "--data-path":
        args.blend = parse_blend(source, args.data_path)
    elif source == "--data-args-path":
        args.blend = parse_blend(f"{source} {args.data_args_path}", _words_of(args.data_args_path))
    elif source != "--mock-data":
        args.part_blends = _part_blends(args, source)
    stand_in = () if args.dataset is None or args.mock_data else (args.dataset,)
    args.weights = None if args.blend is None else args.blend.weights
    args.corpora, args.parts = stand_in, ()
    if stand_in and args.part_blends is not None:
        args.parts = tuple(blend and Corpora(stand_in, None) for blend in args.part_blends)


def _source_of(args: argparse.Namespace) -> str:
    """The option that names the data; ``--train-data-path`` for any of its kind."""
    given = {
        "--data-path": args.data_path is not None,
        "--data-args-path": args.data_args_path is not None,
        "--train-data-path": args.train_data_path is not None or args.valid_data_path is not None,
        "--per-split-data-args-path": args.per_split_data_args_path is not None,
        "--mock-data": args.mock_data,
    }
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are two sources of data; leave one out")
    if not names:
        raise ValueError("there is no data; give --data-path PREFIX, or --mock-data")
    return names[0]


def _part_blends(args: argparse.Namespace, source: str) -> tuple[Blend | None, Blend | None]:
    """Of training and validation, each from datasets of its own."""
    if source == "--train-data-path":
        words = {"train": args.train_data_path, "valid": args.valid_data_path}
        named = {"train": "--train-data-path", "valid": "--valid-data-path"}
    else:
        words = _parts_in(args.per_split_data_args_path)
        named = {part: f"{source} {args.per_split_data_args_path}: {part}" for part in words}
    if args.split != DEFAULT_SPLIT:
        raise ValueError(f"--split {args.split} divides datasets, and {source} names those of each part")
    if not words.get("train"):
        raise ValueError(f"{source} names no data to train on; add them")
    if args.eval_iters and not words.get("valid"):
        raise ValueError(
            f"--eval-iters {args.eval_iters} needs data for validation; add --valid-data-path, or use "
            "--eval-iters 0"
        )
    train, valid = (
        parse_blend(named[part], words[part]) if words.get(part) else None for part in ("train", "valid")
    )
    return train, valid


def _parts_in(path: Path) -> dict[str, list[str]]:
    """The words of each part in a file of JSON; nothing is tested here, so ``test`` is not looked at."""
    try:
        found = parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"--per-split-data-args-path {path} cannot be read ({error.strerror})") from None
    known = ("train", "valid", "test")
    for part, words in found.items():
        is_list = words is None or (isinstance(words, list) and all(isinstance(word, str) for word in words))
        if part not in known or not is_list:
            raise ValueError(
                f"--per-split-data-args-path {path}: {part!r:.40} is not understood; give the words of "
                f"--data-path as lists of texts under {', '.join(known)}"
            )
    return found


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
