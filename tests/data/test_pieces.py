"""Documents in pieces: the same tokens as in one, in bounded memory and time."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from helixpipe.data.prefix import dataset_paths
from helixpipe.data.prepare import corpus, pieces
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.data.prepare.pieces import LONGEST_WORD, cut, piece_limit, words_to_train_on
from helixpipe.data.prepare.tokenizer_training import byte_tokenizer, train_bpe
from helixpipe.data.prepare.training_process import train_bpe_apart
from helixpipe.data.text_tokenizers import END_OF_DOCUMENT

SCRIPT = Path(__file__).parents[2] / "tools" / "prepare_data.py"
# Spaces of all kinds, contractions, digits, marks that combine, scripts without spaces.
ALPHABET = "ab'Z1 29 .,;\n\r\t \u00a0\u2003\u0085é\u0301日本ß_-/\\\"{}🙂\u200d"
TEXT = st.text(alphabet=ALPHABET, max_size=120)
CORPUS = "It's the cats' hats, don't we'll 1234 5 6;  a b\n\n c\td é日本 they've I'm " * 20


def llama3(pattern):
    """As its published tokenizer.json splits text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[END_OF_DOCUMENT],
    )  # fmt: skip
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


TOKENIZERS = [train_bpe([CORPUS], 400), byte_tokenizer(), *map(llama3, pieces._KNOWN_PATTERNS)]


@settings(deadline=None, max_examples=150, database=None)
@given(text=TEXT, limit=st.integers(2, 30), tokenizer=st.sampled_from(range(len(TOKENIZERS))))
@example(text="a b", limit=2, tokenizer=0)
@example(text="ab  cd", limit=3, tokenizer=0)
@example(text="x" * 50 + " y", limit=10, tokenizer=0)
def test_pieces_are_the_text_and_have_its_tokens(text, limit, tokenizer):
    parts = list(cut([text], limit))
    assert "".join(parts) == text
    assert all(len(part) <= limit for part in parts)
    # A piece is forced where a limit of characters has no place; such texts are told apart here.
    encoder = TOKENIZERS[tokenizer]
    if all(
        right.startswith(" ") and right[1:2].strip() and left[-1:].strip()
        for left, right in itertools.pairwise(parts)
    ):
        whole = encoder.encode(text, add_special_tokens=False).ids
        assert [i for part in parts for i in encoder.encode(part, add_special_tokens=False).ids] == whole
    assert encoder.decode([i for part in parts for i in encoder.encode(part).ids]).count("a") == text.count(
        "a"
    )


@settings(deadline=None, max_examples=150, database=None)
@given(text=TEXT, limit=st.integers(2, 30), sizes=st.lists(st.integers(0, 40), max_size=8))
def test_pieces_do_not_depend_on_how_the_text_was_read(text, limit, sizes):
    places = [0, *itertools.accumulate(sizes), max(len(text), sum(sizes))]
    blocks = [text[first:last] for first, last in itertools.pairwise(places)]
    assert "".join(blocks) == text
    assert list(cut(blocks, limit)) == list(cut([text], limit))
    assert list(cut(blocks, None)) == [text]


def test_a_piece_ends_between_words_wherever_it_can():
    text = "word " * 1000
    parts = list(cut([text], 100))
    assert all(95 <= len(part) <= 100 for part in parts[:-1])
    assert all(part.startswith(" word") for part in parts[1:])
    run = "x" * 1000
    assert [len(part) for part in cut([f"a {run}"], 100)] == [1, 100, *[100] * 9, 1]


@pytest.mark.parametrize(
    "text", ["", "a b c", " ", "x" * 300 + " y " + " " * 600 + "z", "\n" * 257, "é" * 256]
)
def test_words_to_train_on_are_bounded(text):
    parts = list(words_to_train_on(text))
    assert "".join(parts) == text
    for part in parts:
        assert max(map(len, part.split()), default=0) <= LONGEST_WORD
        assert (
            max(
                (len(list(group)) for space, group in itertools.groupby(part, str.isspace) if space),
                default=0,
            )
            <= LONGEST_WORD
        )
    if "\n" not in text and len(text) < LONGEST_WORD + 1:
        assert parts == [text]


def saved(tokenizer, **changes):
    return json.dumps(json.loads(tokenizer.to_str()) | changes)


def test_only_tokenizers_that_split_at_spaces_get_pieces():
    for tokenizer in TOKENIZERS:
        assert piece_limit(tokenizer.to_str()) == pieces.PIECE_CHARACTERS
    bpe = TOKENIZERS[0]
    nfc = Tokenizer.from_str(bpe.to_str())
    nfc.normalizer = normalizers.NFC()
    assert piece_limit(nfc.to_str()) == pieces.PIECE_CHARACTERS
    for change in (normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Lowercase()):
        nfc.normalizer = change
        assert piece_limit(nfc.to_str()) is None
    for splitter in (
        pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Metaspace(),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ):  # fmt: skip
        other = Tokenizer.from_str(bpe.to_str())
        other.pre_tokenizer = splitter
        assert piece_limit(other.to_str()) is None
    assert piece_limit(llama3(r"\p{L}+|\s+").to_str()) is None
    assert piece_limit(saved(bpe, pre_tokenizer=None)) is None
    for token in (AddedToken("a b"), AddedToken("<x>", rstrip=True), AddedToken("<x>", lstrip=True)):
        other = Tokenizer.from_str(bpe.to_str())
        other.add_tokens([token])
        assert piece_limit(other.to_str()) is None
    words = Tokenizer(models.WordLevel({"a": 0, END_OF_DOCUMENT: 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert piece_limit(words.to_str()) is None
    sentencepiece = Tokenizer(models.Unigram([("a", 0.0)], unk_id=0))
    sentencepiece.decoder = decoders.Metaspace()
    assert piece_limit(sentencepiece.to_str()) is None


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_dataset_does_not_depend_on_pieces(tmp_path, monkeypatch, suffix):
    """Documents longer than a piece, prompts too, against documents that were encoded whole."""
    chance = random.Random(5)
    texts = ["".join(chance.choices("abc de'f 12.\n", k=size)) for size in (3000, 0, 1, 700, 40)]
    prompt = ["--prompt"] if suffix == "jsonl" else []
    source = tmp_path / f"in.{suffix}"
    if suffix == "txt":
        source.write_text(texts[0])
    else:
        rows = [{"prompt": before, "text": text} for before, text in zip(reversed(texts), texts, strict=True)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for limit in (pieces.PIECE_CHARACTERS, 97):
        monkeypatch.setattr(pieces, "PIECE_CHARACTERS", limit)
        monkeypatch.setattr(corpus, "PIECE_CHARACTERS", limit)
        options = PreparationOptions(
            [str(source)], str(tmp_path / f"set{limit}"), vocab_size=300, min_document_tokens=20,
            prompt_key="prompt" if prompt else None, workers=1,
        )  # fmt: skip
        summary = prepare_dataset(options)
        paths = dataset_paths(tmp_path / f"set{limit}")
        found.append(
            [Path(path).read_bytes() for path in paths] + [summary.empty_documents, summary.short_documents]
        )
    assert found[0] == found[1]


def test_training_apart_gives_the_same_tokenizer():
    texts = list(words_to_train_on(CORPUS))
    assert train_bpe_apart(texts, 300) == train_bpe(texts, 300).to_str(pretty=True)
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe_apart(texts, 256)
    assert multiprocessing.active_children() == []


def test_an_error_while_texts_are_read_ends_the_process():
    def broken():
        yield "text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_bpe_apart(broken(), 300)
    assert multiprocessing.active_children() == []


def test_death_of_the_training_process_is_an_error():
    def killing():
        for _ in range(3):
            yield "text " * 100_000
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        yield "text " * 100_000

    with pytest.raises(RuntimeError, match="died with exit code -9"):
        train_bpe_apart(killing(), 300)


def children_of(process):
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_until(condition, what):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture(scope="module")
def slow_corpus(tmp_path_factory):
    """A quarter of an hour of training."""
    source = tmp_path_factory.mktemp("slow") / "in.txt"
    chance = random.Random(3)
    source.write_text(
        "".join(chance.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", k=30_000_000))
    )
    return source


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_training_ends_with_a_signal(slow_corpus, tmp_path, number):
    """Also that of the parent by SIGKILL, after which nobody tells the child."""
    command = [sys.executable, SCRIPT, "--input", slow_corpus, "--output-prefix", tmp_path / "set"]
    process = subprocess.Popen(
        [*command, "--vocab-size", "30000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        # The second child is that of the resource tracker, or the first.
        wait_until(lambda: children_of(process.pid), "no process was started")
        time.sleep(2)
        started = children_of(process.pid)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert output == ""
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert errors == f"prepare_data: stopped by {number.name}: temporary files are removed\n"
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in started), "a process is left")
