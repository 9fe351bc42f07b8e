"""Tokenizers by Megatron's names, from files: ids, begins and ends of documents, and what is refused."""

import base64
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from helixpipe.data.prefix import dataset_paths, describe_prefix
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.data.text_tokenizers import SENTENCE_PIECE, TokenizerSettings, open_tokenizer
from megatron.pretrain.settings.arguments import parse_arguments

TEXTS = ["one two  three\n", "déjà vu, 12 + 30 = 42", "the end token is spelled </s> here", "\U0001f40d" * 3]
JOB = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 "
    "--global-batch-size 1 --train-iters 1 --lr 0.1 --split 1,0,0"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder: a byte-level BPE whose template begins texts with <s>, like that of Llama 3."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": {"__type": "AddedToken", "content": "</s>"},
            }
        )
    )
    tokenizer.model.save(str(folder))
    return folder


def prepare(tmp_path, texts, settings):
    """Write a dataset and read it back with Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = tmp_path / "set"
    summary = prepare_dataset(
        PreparationOptions([str(source)], str(prefix), named_tokenizer=settings, overwrite=True)
    )
    dataset = IndexedDataset(str(prefix))
    return summary, [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("name", ["", "tokenizer.json"], ids=["folder", "file"])
def test_hugging_face_documents_begin_and_end_as_its_files_say(tmp_path, folder, name):
    settings = TokenizerSettings("HuggingFaceTokenizer", model=str(folder / name))
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = True
    summary, documents = prepare(tmp_path, TEXTS, settings)
    assert documents == [[*own.encode(text).ids, 1] for text in TEXTS]
    assert [document[0] for document in documents] == [0] * len(TEXTS)
    assert all(document.count(1) == 1 for document in documents), "a spelled end token is text"
    assert summary.eod == 1
    assert not (tmp_path / "set.tokenizer.json").exists()


def test_hugging_face_ids_are_those_of_megatron(folder):
    pytest.importorskip("transformers")
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

    theirs = HuggingFaceTokenizer(str(folder), include_special_tokens=True, use_fast=True)
    ours = open_tokenizer(TokenizerSettings("HuggingFaceTokenizer", model=str(folder)))
    plain = [text for text in TEXTS if "</s>" not in text]
    found = [[*ours.begin, *ids] for ids in ours.encode(plain)]
    assert found == [theirs.text_to_ids(text) for text in plain]
    assert ours.vocab_size == theirs.vocab_size
    assert ours.end == (theirs.eod,)


def test_gpt2_ids_are_those_of_its_vocabulary_and_merges(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.model.save(str(tmp_path))
    settings = TokenizerSettings(
        "GPT2BPETokenizer",
        vocab_file=str(tmp_path / "vocab.json"),
        merge_file=str(tmp_path / "merges.txt"),
    )
    _, documents = prepare(tmp_path, TEXTS, settings)
    end = tokenizer.token_to_id("<|endoftext|>")
    assert documents == [[*tokenizer.encode(text).ids, end] for text in TEXTS]


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
def test_sentence_piece_ids_are_the_librarys(tmp_path, kind):
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "texts").write_text("\n".join(TEXTS * 5))
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "sp"), vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    own = library.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    summary, documents = prepare(tmp_path, TEXTS, TokenizerSettings(kind, model=str(tmp_path / "sp.model")))
    begin = [own.bos_id()] if kind == "Llama2Tokenizer" else []
    assert documents == [[*begin, *own.encode(text), own.eos_id()] for text in TEXTS]
    assert summary.vocab_size == 300


def tiktoken_vocabulary(path, count):
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t"]
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": str(token)}
        for i, token in enumerate(tokens[:count])
    ]
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.mark.slow
def test_tiktoken_ids_are_those_of_megatron(tmp_path):
    pytest.importorskip("tiktoken")
    from megatron.core.tokenizers.text.libraries import TikTokenTokenizer

    model = tiktoken_vocabulary(tmp_path / "vocab.json", 259)
    theirs = TikTokenTokenizer(model, num_special_tokens=10, pattern="v1", vocab_size=269)
    settings = TokenizerSettings(
        "TikTokenizer",
        model=model,
        vocab_size=269,
        tiktoken_pattern="v1",
        tiktoken_num_special_tokens=10,
    )
    plain = [text for text in TEXTS if "</s>" not in text]
    _, documents = prepare(tmp_path, plain, settings)
    assert documents == [[*theirs.text_to_ids(text), theirs.eos_id] for text in plain]


def test_a_vocabulary_of_tiktoken_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("helixpipe.data.text_tokenizers._library", lambda *_: None)
    model = tiktoken_vocabulary(tmp_path / "vocab.json", 259)

    def refused(message, **sizes):
        with pytest.raises(ValueError, match=message):
            open_tokenizer(TokenizerSettings("TikTokenizer", model=model, **sizes))

    refused("has 259 tokens, which with 1000 special ones .* make no vocabulary of 131072")
    refused("make no vocabulary of 270: give --vocab-size", vocab_size=270, tiktoken_num_special_tokens=10)
    entries = json.loads((tmp_path / "vocab.json").read_text())
    for change, message in (
        ({"rank": 5}, "not ordered by rank"),
        ({"token_bytes": "AA=="}, "all bytes first"),
        ({"token_bytes": "%"}, "is not Megatron's JSON list"),
        ({"rank": None}, "not ordered"),
    ):
        changed = [*entries[:7], {**entries[7], **change}, *entries[8:]]
        (tmp_path / "vocab.json").write_text(json.dumps(changed))
        refused(message)
    (tmp_path / "vocab.json").write_text("7")
    refused("is not Megatron's JSON list")


def test_bytes_and_numbers(tmp_path):
    _, documents = prepare(tmp_path, TEXTS, TokenizerSettings("ByteLevelTokenizer"))
    assert documents == [[*text.encode(), 0] for text in TEXTS]
    # Ids above those of 16 bits.
    _, documents = prepare(
        tmp_path, ["1 70000 99999", "65536"], TokenizerSettings("NullTokenizer", vocab_size=100_000)
    )
    assert documents == [[1, 70000, 99999, 100_000], [65536, 100_000]]
    assert (tmp_path / "set.bin").stat().st_size == 6 * 4


def test_a_prompt_has_the_begin_and_no_end(tmp_path, folder):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (tmp_path / "in.jsonl").write_text('{"q": "one", "a": "two"}\n{"q": "", "a": "three"}\n')
    settings = TokenizerSettings("HuggingFaceTokenizer", model=str(folder))
    prepare_dataset(
        PreparationOptions(
            [str(tmp_path / "in.jsonl")],
            str(tmp_path / "set"),
            json_key="a",
            prompt_key="q",
            named_tokenizer=settings,
        )
    )
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    one, two, three = (own.encode(text, add_special_tokens=False).ids for text in ("one", "two", "three"))
    dataset = IndexedDataset(str(tmp_path / "set"), multimodal=True)
    found = [(ids.tolist(), int(mode)) for ids, mode in (dataset[i] for i in range(len(dataset)))]
    assert found == [([0, *one], 1), ([*two, 1], 0), ([0, *three, 1], 0)]


def test_data_of_megatrons_own_tool_are_read_as_they_are(tmp_path, monkeypatch):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = tmp_path / "corpus_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(70_001))
    for start in (0, 100, 69_990):
        builder.add_document(np.array([*range(start, start + 10), 70_000]), [11])
    builder.finalize(f"{prefix}.idx")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = ["--data-path", str(prefix)]
    with pytest.raises(ValueError, match="name their tokenizer with --tokenizer-type"):
        parse_arguments([*JOB, *given])
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]
    settings = parse_arguments([*JOB, *given, *null, "70000"])
    info = settings.data.dataset
    assert (info.vocab_size, info.eod, info.num_tokens) == (70_001, 70_000, 33)
    assert settings.model.padded_vocab_size == 70_016
    with pytest.raises(ValueError, match="outside the vocabulary of 500 that the tokenizer has"):
        parse_arguments([*JOB, *given, *null, "499"])
    assert describe_prefix(prefix, TokenizerSettings("NullTokenizer", vocab_size=70_000)) == info
    assert not (tmp_path / dataset_paths(prefix).tokenizer).exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "BertWordPieceLowerCase"}, "is not known"),
        ({"type": "HuggingFaceTokenizer"}, "HuggingFaceTokenizer needs --tokenizer-model; add it"),
        ({"type": "GPT2BPETokenizer", "vocab_file": "v"}, "needs --merge-file"),
        ({"type": "NullTokenizer"}, "needs --vocab-size"),
        ({"type": "NullTokenizer", "vocab_size": 9, "model": "m"}, "--tokenizer-model does not apply"),
        ({"type": "HuggingFaceTokenizer", "model": "m", "vocab_size": 9}, "--vocab-size does not apply"),
        ({"type": "ByteLevelTokenizer", "tiktoken_pattern": "v1"}, "--tiktoken-pattern does not apply"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenizerSettings(**fields)


def test_files_that_do_not_fit_are_refused(tmp_path, folder):
    def refused(message, kind="HuggingFaceTokenizer", **fields):
        with pytest.raises(ValueError, match=message) as error:
            open_tokenizer(TokenizerSettings(kind, **fields))
        assert "\n" not in str(error.value)

    refused("names of the Hub are not fetched", model="meta-llama/Llama-3.1-8B")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    refused("has an eos_token", model=str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    refused("invalid JSON", model=str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    refused("has no <end> token", model=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("is not a tokenizer", model=str(tmp_path))
    refused("no such file|cannot be read", "GPT2BPETokenizer", vocab_file="none", merge_file="none")
    vocab, merges = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    refused(
        "has no <|endoftext|>".replace("|", r"\|"), "GPT2BPETokenizer", vocab_file=vocab, merge_file=merges
    )
    refused("hold all bytes", "ByteLevelTokenizer", vocab_size=255)
    with pytest.raises(ValueError, match=r"U\+0000"):
        open_tokenizer(TokenizerSettings("ByteLevelTokenizer")).encode(["a\0b"])
    for word in ("9", "-1", "x", "1.0", "٣"):
        with pytest.raises(ValueError, match="is not an id from 0 to 8"):
            open_tokenizer(TokenizerSettings("NullTokenizer", vocab_size=9)).encode([f"1 {word}"])


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(
        ValueError, match=r'sentencepiece, which is not installed: pip install "helixpipe\[hf\]"'
    ):
        open_tokenizer(TokenizerSettings("Llama2Tokenizer", model=str(tmp_path)))
