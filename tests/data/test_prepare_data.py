"""tools/prepare_data.py, the library behind it, and the checks of what it writes."""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from helixpipe.data import index_file, prefix
from helixpipe.data.prefix import (
    check_token_ids,
    dataset_paths,
    inspect_prefix,
    load_tokenizer,
)
from helixpipe.data.prepare import corpus, sources, staging, tokenizer_training
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.data.text_tokenizers import END_OF_DOCUMENT

SCRIPT = Path(__file__).parents[2] / "tools" / "prepare_data.py"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
HEADER = 34
TEXTS = [
    "plain words\n",
    "naïve café, 日本語, 🙂\u200d↔️",
    "tabs\tand\r\nboth\rline\nends\n\n",
    "  leading and trailing space  ",
    f"a literal {END_OF_DOCUMENT} is text",
    "\ufffd was in the original",
    "\x00\x01 control",
    "x",
    "long " * 300,
    "end",
]


def _load_script():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_cli = _load_script().main


def prepare(inputs, output, **options):
    return prepare_dataset(PreparationOptions([str(path) for path in inputs], str(output), **options))


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"n": 1, key: text}) + "\n" for text in texts))
    return path


def read_documents(output):
    """Decode every document with megatron-core's reader; check that each ends as it should."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = load_tokenizer(dataset_paths(output).tokenizer)
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    dataset = IndexedDataset(str(output))
    documents = [dataset[number] for number in range(len(dataset))]
    for document in documents:
        assert document[-1] == end
        assert end not in document[:-1]
    return [tokenizer.decode(list(document[:-1])) for document in documents]


def contents(output):
    return [Path(path).read_bytes() for path in dataset_paths(output)]


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small dataset that tests copy or leave as it is."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_jsonl(folder / "in.jsonl", TEXTS)
    prepare([source], folder / "set", tokenizer="byte")
    return folder / "set"


@pytest.fixture
def copy(whole, tmp_path):
    for path in dataset_paths(whole):
        shutil.copy(path, tmp_path)
    return tmp_path / "set"


# Writing


def test_keys_of_objects_within_objects(tmp_path):
    rows = [{"a": {"b": {"text": TEXTS[0]}}}, {"a.b.text": TEXTS[1], "a": {"b": {"text": "not this"}}}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([source], tmp_path / "set", tokenizer="byte", json_key="a.b.text")
    assert read_documents(tmp_path / "set") == TEXTS[:2]
    for key in ("a.b", "a.c.text", "a.b.text.x", "a..text"):
        with pytest.raises(ValueError, match=r"has no key|is not a string") as error:
            prepare([source], tmp_path / "other", tokenizer="byte", json_key=key)
        assert_one_line(error, "in.jsonl:1", key, "--json-key")


@pytest.mark.parametrize("tokenizer", ["bpe", "byte"])
def test_jsonl_round_trip(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS, key="body")
    summary = prepare([source], tmp_path / "set", tokenizer=tokenizer, vocab_size=300, json_key="body")
    assert read_documents(tmp_path / "set") == TEXTS
    assert summary.documents == len(TEXTS)
    assert summary.undecodable_files == ()


def test_text_files_round_trip_in_sorted_order(tmp_path):
    root = tmp_path / "in"
    (root / "b").mkdir(parents=True)
    (root / "skip").mkdir()
    names = ["a.txt", "b/2.txt", "b/10.txt", "c.txt", "c.md", "skip/d.txt"]
    for name, text in zip(names, TEXTS, strict=False):
        (root / name).write_bytes(text.encode())
    prepare([root, root / "c.md"], tmp_path / "set", pattern="*.txt", exclude=["sk*"], vocab_size=260)
    in_order = ["a.txt", "b/10.txt", "b/2.txt", "c.txt", "c.md"]
    assert read_documents(tmp_path / "set") == [TEXTS[names.index(name)] for name in in_order]


def test_byte_tokenizer_ids_are_byte_values(whole):
    tokens = np.fromfile(dataset_paths(whole).bin, dtype=np.uint16)
    expected = []
    for text in TEXTS:
        expected += [*text.encode(), 256]
    assert tokens.tolist() == expected
    info = inspect_prefix(whole)
    assert (info.vocab_size, info.eod) == (257, 256)


def test_standard_library_is_the_same_for_any_number_of_workers(tmp_path):
    roots = [STDLIB / "asyncio", STDLIB / "json", STDLIB / "email"]
    options = {"pattern": "*.py", "vocab_size": 512}
    one = prepare(roots, tmp_path / "one", workers=1, **options)
    two = prepare(roots, tmp_path / "two", workers=2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert dataclasses.replace(one, paths=two.paths, seconds=two.seconds) == two

    files = sorted(file for root in roots for file in root.rglob("*.py"))
    texts = {file.read_bytes().decode() for file in files} - {""}
    assert set(read_documents(tmp_path / "one")) == texts
    assert one.vocab_size == 512
    assert one.tokens < one.input_bytes / 2
    assert one.empty_documents == sum(file.stat().st_size == 0 for file in files)
    info = inspect_prefix(tmp_path / "one")
    assert (info.num_tokens, info.num_documents) == (one.tokens, one.documents)
    assert (info.longest_document, info.eod) == (one.longest_length, one.eod)
    check_token_ids(tmp_path / "one", info)


def test_order_is_kept_behind_a_slow_first_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHUNK_CHARACTERS", 100)
    texts = ["slow " * 100_000] + [f"{number:0100d}" for number in range(200)]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    prepare([source], tmp_path / "set", tokenizer="byte", workers=2)
    assert read_documents(tmp_path / "set") == texts


def test_empty_and_short_documents_are_left_out_and_counted(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["", "abc", "ab", "", "abcd"])
    with source.open("a") as stream:
        stream.write("\n  \n")
    summary = prepare([source], tmp_path / "set", tokenizer="byte", min_document_tokens=3)
    assert read_documents(tmp_path / "set") == ["abc", "abcd"]
    assert (summary.empty_documents, summary.short_documents) == (2, 1)
    assert (summary.median_length, summary.p99_length, summary.longest_length) == (4, 5, 5)


def test_no_document_left_is_an_error(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["", "ab"])
    with pytest.raises(ValueError, match="no document is left") as error:
        prepare([source], tmp_path / "set", tokenizer="byte", min_document_tokens=3)
    assert_one_line(error, "1 empty, 1 shorter")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_undecodable_input_is_replaced_and_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes("caf\xe9 \ufffd".encode("latin-1", "replace"))
    (tmp_path / "b.txt").write_text("fine \ufffd", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "half \\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
    inputs = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl")]
    arguments = ["--output-prefix", str(tmp_path / "set"), "--tokenizer", "byte"]
    assert run_cli(["--input", *inputs, *arguments]) == 0
    assert read_documents(tmp_path / "set") == ["caf\ufffd ?", "fine \ufffd", "half \ufffd", "🙂"]
    warning, mixture = capsys.readouterr().err.splitlines()
    assert "warning" in warning
    assert "1 of 3 files are JSON lines" in mixture
    assert "2 of 3 files" in warning
    assert inputs[0] in warning


def test_tokenizer_file_is_kept_byte_for_byte(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    given_file = tmp_path / "given.json"
    tokenizer = tokenizer_training.byte_tokenizer()
    # Settings for inference must not shorten or pad documents.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=5000)
    given_file.write_text(tokenizer.to_str() + "\r\n")
    prepare([source], tmp_path / "set", tokenizer_file=str(given_file))
    assert Path(dataset_paths(tmp_path / "set").tokenizer).read_bytes() == given_file.read_bytes()
    assert read_documents(tmp_path / "set") == TEXTS


def test_wide_vocabulary_takes_four_bytes(tmp_path):
    vocabulary = {f"w{number}": number for number in range(70_000)}
    vocabulary[END_OF_DOCUMENT] = 70_001
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.save(str(tmp_path / "words.json"))
    source = write_jsonl(tmp_path / "in.jsonl", ["w69999", "w1"])
    prepare([source], tmp_path / "set", tokenizer_file=str(tmp_path / "words.json"))
    info = inspect_prefix(tmp_path / "set")
    # Ids have a gap, so the size is not the count of entries.
    assert (info.vocab_size, info.num_tokens) == (70_002, 4)
    tokens = np.fromfile(dataset_paths(tmp_path / "set").bin, dtype=np.int32)
    assert tokens.tolist() == [69_999, 70_001, 1, 70_001]
    check_token_ids(tmp_path / "set", info)


def test_own_output_is_not_input_of_the_next_run(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    prepare([tmp_path], tmp_path / "set", tokenizer="byte")
    first = contents(tmp_path / "set")
    (tmp_path / "set.bin.tmp-0000").write_text("of a killed run")
    summary = prepare([tmp_path], tmp_path / "set", tokenizer="byte", overwrite=True)
    assert contents(tmp_path / "set") == first
    assert summary.stale_files == (str(tmp_path / "set.bin.tmp-0000"),)


def test_own_output_is_no_input(copy, tmp_path):
    """Compared as files: under another name it is the same one."""
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("set.tokenizer.json", "link/set.idx"):
        with pytest.raises(ValueError, match="is a file of the dataset to be written: give another --input"):
            prepare([tmp_path / name], tmp_path / "set", tokenizer="byte", overwrite=True)


# Refusing and overwriting


def test_existing_dataset_is_refused_until_overwrite(copy, tmp_path, capsys):
    before = contents(copy)
    source = write_jsonl(tmp_path / "in.jsonl", ["new"])
    arguments = ["--input", str(source), "--output-prefix", str(copy), "--tokenizer", "byte"]
    assert run_cli(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(copy) == before
    assert run_cli([*arguments, "--overwrite"]) == 0
    assert read_documents(copy) == ["new"]


def test_failed_overwrite_keeps_the_old_dataset(copy, tmp_path):
    before = contents(copy)
    source = write_jsonl(tmp_path / "in.jsonl", ["good"] * 10)
    with source.open("a") as stream:
        stream.write("{broken")
    with pytest.raises(ValueError, match=r"in\.jsonl:11: invalid JSON"):
        prepare([source], copy, tokenizer="byte", overwrite=True)
    assert contents(copy) == before
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("failing", range(3))
def test_failed_rename_leaves_no_index(copy, tmp_path, monkeypatch, failing):
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) > failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    source = write_jsonl(tmp_path / "in.jsonl", ["new"])
    with pytest.raises(ValueError, match="No space left") as error:
        prepare([source], copy, tokenizer="byte", overwrite=True)
    assert_one_line(error, "cannot write", copy)
    assert not os.path.exists(dataset_paths(copy).idx)
    assert not list(tmp_path.glob("*.tmp-*"))
    assert dataset_paths(copy).idx not in calls[:2]


def test_dataset_that_appears_meanwhile_is_refused(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", ["new"])
    paths = dataset_paths(tmp_path / "set")
    sync = staging._sync

    def sync_and_collide(path):
        sync(path)
        Path(paths.idx).write_text("of another run")

    monkeypatch.setattr(staging, "_sync", sync_and_collide)
    with pytest.raises(ValueError, match="exists already"):
        prepare([source], tmp_path / "set", tokenizer="byte")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "set.idx"]


def test_signal_during_publication_waits_for_its_end(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", ["new"])

    def replace(source, target):
        os.kill(os.getpid(), signal.SIGINT)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    # A shell starts background jobs with SIGINT ignored, and tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare([source], tmp_path / "set", tokenizer="byte")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_documents(tmp_path / "set") == ["new"]


# Interruption


@pytest.mark.slow
def test_signals_leave_no_dataset(tmp_path):
    source = tmp_path / "in.jsonl"
    line = json.dumps({"text": "words of some length " * 500}) + "\n"
    source.write_text(line * 4000)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    runs = []
    # All at once, for most of their time goes to imports.
    for number in numbers:
        folder = tmp_path / number.name
        folder.mkdir()
        command = [sys.executable, SCRIPT, "--input", source, "--output-prefix", folder / "set"]
        process = subprocess.Popen(
            [*command, "--tokenizer", "byte", "--workers", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs.append((number, folder, process))
    for number, folder, process in runs:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in folder.glob("set.bin.tmp-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert not output
        if number == signal.SIGKILL:
            assert process.returncode == -number
            assert not (folder / "set.idx").exists()
        else:
            assert process.returncode == 128 + number
            assert errors.startswith(f"prepare_data: stopped by {number.name}")
            assert errors.count("\n") == 1
            assert os.listdir(folder) == []


def test_death_of_an_encoding_process_is_an_error(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    monkeypatch.setattr(corpus, "_CHUNK_CHARACTERS", 1)
    read = corpus.read_pieces

    def read_and_kill(*arguments):
        yield from read(*arguments)
        for process in active_children():
            os.kill(process.pid, signal.SIGKILL)
        yield from read(*arguments)

    monkeypatch.setattr(corpus, "read_pieces", read_and_kill)
    with pytest.raises(RuntimeError, match="died with exit code -9") as error:
        prepare([source], tmp_path / "set", tokenizer="byte", workers=2)
    assert_one_line(error)
    assert os.listdir(tmp_path) == ["in.jsonl"]
    assert active_children() == []


# Errors of the command line


@pytest.mark.slow
def test_command_runs_from_any_folder(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 50)
    command = [sys.executable, SCRIPT, "--input", "a.txt", "--output-prefix", "new/folder/set"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [*command, "--vocab-size", "257"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0
    assert result.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["documents"] == "1"
    assert lines["tokens"] == "251"
    assert lines["input"] == "250 bytes in 1 file (1 text)"
    assert lines["file"] == "new/folder/set.tokenizer.json"
    assert inspect_prefix(tmp_path / "new" / "folder" / "set").num_tokens == 251


def _bad_line(line):
    def make(folder):
        (folder / "in.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
        return ["--input", str(folder / "in.jsonl")]

    return make


BAD_INPUT = {
    "missing": (lambda folder: ["--input", str(folder / "no")], "no: no such file"),
    "no match": (lambda folder: ["--input", str(folder), "--pattern", "*.no"], "no file matches"),
    "all excluded": (lambda folder: ["--input", str(folder), "--exclude", "*"], "--exclude"),
    "device": (lambda folder: ["--input", "/dev/null"], "neither a file nor a directory"),
    "not json": (_bad_line(b'{"text": '), "in.jsonl:2: invalid JSON"),
    "deep json": (_bad_line(b"[" * 100_000), "in.jsonl:2: invalid JSON"),
    "not utf-8": (_bad_line(b'{"text": "\xe9"}'), "in.jsonl:2: is not UTF-8"),
    "not an object": (_bad_line(b'["text"]'), "in.jsonl:2: is not a JSON object"),
    "no key": (_bad_line(b'{"body": "x"}'), "in.jsonl:2: has no key 'text' (keys: 'body')"),
    "not a string": (_bad_line(b'{"text": 1}'), "in.jsonl:2: the value of 'text' is not"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("tokenizer", ["bpe", "byte"])
def test_wrong_input_is_one_line(tmp_path, capsys, case, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    make, expected = BAD_INPUT[case]
    arguments = [*make(tmp_path / "in"), "--workers", "1", "--tokenizer", tokenizer]
    assert run_cli([*arguments, "--output-prefix", str(tmp_path / "out" / "set")]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("prepare_data: error: ")
    assert errors.count("\n") == 1
    assert expected in errors
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--input"),
        (["--input", "a.txt"], "--output-prefix"),
        (["--input", "a.txt", "--output-prefix", "set", "--workers", "two"], "--workers"),
        (["--input", "a.txt", "--output-prefix", "set", "--tokenizer", "word"], "--tokenizer"),
        (
            ["--input", "a.txt", "--output-prefix", "s", "--tokenizer", "byte", "--vocab-size", "9"],
            "--vocab-size",
        ),
        (
            ["--input", "a", "--output-prefix", "s", "--tokenizer-file", "t", "--vocab-size", "999"],
            "--tokenizer-file",
        ),
    ],
)
def test_wrong_usage_is_one_line(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        run_cli(arguments)
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("prepare_data: error: ")
    assert errors.count("\n") == 1
    assert expected in errors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"output_prefix": "out/set.idx"}, "--output-prefix out/set"),
        ({"output_prefix": "out/"}, "names a folder"),
        ({"output_prefix": "in"}, "names a folder"),
        ({"output_prefix": "in/a.txt/set"}, "cannot write to the folder in/a.txt"),
        ({"output_prefix": "/proc/set"}, "cannot write to the folder /proc"),
        ({"vocab_size": 256}, "at least 257"),
        ({"workers": 0}, "--workers is 0"),
        ({"min_document_tokens": 0}, "--min-document-tokens is 0"),
        ({"tokenizer": "word"}, "unknown tokenizer"),
        ({"tokenizer_file": "in/no"}, "in/no: cannot be read"),
        ({"tokenizer_file": "in/a.txt"}, "in/a.txt: is not a tokenizer"),
        ({"tokenizer_file": "plain.json"}, f"plain.json: has no {END_OF_DOCUMENT}"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/a.txt").write_text("text")
    Tokenizer(models.BPE()).save("plain.json")
    with pytest.raises(ValueError, match=r".") as error:
        prepare_dataset(PreparationOptions(**{"inputs": ["in"], "output_prefix": "o/s"} | options))
    assert_one_line(error, expected)


def test_unlistable_folder_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scan = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="sub: cannot be read"):
        sources.find_sources([str(tmp_path)])


# Checking a prefix


def test_reading_agrees_with_megatron(whole):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(whole))
    index = index_file.open_index(dataset_paths(whole).idx)
    assert index.dtype == dataset.index.dtype
    assert np.array_equal(index.lengths, dataset.sequence_lengths)
    assert np.array_equal(index.pointers, dataset.index.sequence_pointers)
    assert np.array_equal(index.document_indices, dataset.document_indices)
    info = inspect_prefix(str(whole))
    assert info.prefix == str(whole)
    assert info.num_documents == len(dataset.document_indices) - 1 == len(TEXTS)
    assert info.num_tokens == dataset.sequence_lengths.sum()
    assert info.longest_document == dataset.sequence_lengths.max() == 1501


@pytest.mark.parametrize("step", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("documents", [([3], [2, 0, 4, 1], [], [5], []), ([], [3], [2, 4])])
def test_documents_of_several_sequences_and_of_none(copy, monkeypatch, documents, dtype, step):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr(index_file, "_ENTRIES_PER_STEP", step)
    paths = dataset_paths(copy)
    builder = IndexedDatasetBuilder(paths.bin, dtype=dtype)
    for lengths in documents:
        builder.add_document(np.zeros(sum(lengths)), lengths)
    builder.finalize(paths.idx)
    info = inspect_prefix(copy)
    sums = [sum(lengths) for lengths in documents]
    assert (info.num_documents, info.num_tokens) == (len(documents), sum(sums))
    assert info.longest_document == max(sums)


def test_every_truncation_of_the_index_is_found(copy):
    path = Path(dataset_paths(copy).idx)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is truncated") as error:
            inspect_prefix(copy)
        assert_one_line(error, path, "prepare the dataset again")


def test_every_inverted_byte_of_the_index_is_found(copy):
    path = Path(dataset_paths(copy).idx)
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r".") as error:
            inspect_prefix(copy)
        assert_one_line(error, path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_of_the_index_is_a_value_error_or_none(whole, data):
    paths = dataset_paths(whole)
    original = Path(paths.idx).read_bytes()
    place = data.draw(st.integers(0, len(original)))
    damage = data.draw(st.binary(max_size=40))
    rest = data.draw(st.sampled_from([place, place + len(damage), len(original)]))
    folder = Path(paths.idx).parent / "damaged"
    folder.mkdir(exist_ok=True)
    for path in (paths.bin, paths.tokenizer):
        shutil.copy(path, folder)
    (folder / "set.idx").write_bytes(original[:place] + damage + original[rest:])
    # Damage may spare what matters, or hit the type or a document's bound in a way that fits.
    with contextlib.suppress(ValueError):
        assert inspect_prefix(folder / "set").num_tokens == inspect_prefix(whole).num_tokens


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (0, b"PK\x03\x04", "wrong magic"),
        (9, struct.pack("<Q", 2), "has version 2"),
        (17, b"\x00", "unknown dtype code, 0"),
        (17, b"\x09", "unknown dtype code, 9"),
        (17, b"\x06", "float64 data"),
        (17, b"\x04", "sequence 1 does not start where"),
        (18, struct.pack("<Q", 1), "is too long"),
        (18, struct.pack("<Q", 2**63), "is truncated"),
        (26, struct.pack("<Q", 2**64 - 1), "is truncated"),
        (HEADER, struct.pack("<i", -1), "sequence 0 has a negative length"),
        (HEADER + 4 * 9, struct.pack("<i", 500), "set.bin: is"),
        (HEADER + 12 * 10, struct.pack("<q", 1), "document indices run from 1 to 10"),
        (HEADER + 12 * 10 + 8 * 3, struct.pack("<q", 1), "decrease after document 2"),
        (HEADER + 12 * 10 + 8 * 3, struct.pack("<q", 2**62), "decrease after document 3"),
        (HEADER + 12 * 10 + 8 * 3, struct.pack("<q", -1), "decrease after document 2"),
        (HEADER + 12 * 10 + 8 * 10, struct.pack("<q", 9), "run from 0 to 9"),
    ],
)
def test_damage_of_the_index_is_named(copy, offset, value, expected):
    path = Path(dataset_paths(copy).idx)
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r".") as error:
        inspect_prefix(copy)
    assert_one_line(error, expected, path.parent)


def test_index_without_documents(copy):
    path = Path(dataset_paths(copy).idx)
    path.write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX", 1, 8, 0, 1, 0))
    with pytest.raises(ValueError, match="holds no documents"):
        inspect_prefix(copy)
    path.write_bytes(struct.pack("<9sQBQQiqqq", b"MMIDIDX", 1, 8, 1, 2, 0, 0, 0, 1))
    with pytest.raises(ValueError, match="holds no tokens"):
        inspect_prefix(copy)


def test_multimodal_index_is_named(copy):
    with open(dataset_paths(copy).idx, "ab") as stream:
        stream.write(bytes([*[0] * (len(TEXTS) - 2), 7, 1]))
    with pytest.raises(ValueError, match=rf"is a multimodal index \(sequence {len(TEXTS) - 2} has mode 7\)"):
        inspect_prefix(copy)


@pytest.mark.parametrize("change", [-2_000, -2, -1, 1, 2])
def test_size_of_the_data_is_checked(copy, change):
    path = dataset_paths(copy).bin
    info = inspect_prefix(copy)
    os.truncate(path, os.path.getsize(path) + change)
    with pytest.raises(ValueError, match="bytes, but") as error:
        inspect_prefix(copy)
    assert_one_line(error, path)
    with pytest.raises(ValueError, match="bytes, but"):
        check_token_ids(copy, info)


@pytest.mark.parametrize("name", ["bin", "idx", "tokenizer"])
def test_missing_file_is_named(copy, name):
    path = getattr(dataset_paths(copy), name)
    os.unlink(path)
    with pytest.raises(ValueError, match="no such file") as error:
        inspect_prefix(copy)
    assert_one_line(error, path)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".tokenizer.json"])
def test_prefix_with_suffix_is_corrected(whole, suffix):
    with pytest.raises(ValueError, match="without the suffix") as error:
        inspect_prefix(f"{whole}{suffix}")
    assert str(error.value).endswith(f", {whole}")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"version": "1.0",', b"null"])
def test_damaged_tokenizer_is_named(copy, content):
    path = Path(dataset_paths(copy).tokenizer)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a tokenizer") as error:
        inspect_prefix(copy)
    assert_one_line(error, path)


def test_tokenizer_without_end_of_document(copy):
    path = dataset_paths(copy).tokenizer
    Tokenizer(models.BPE()).save(path)
    with pytest.raises(ValueError, match="has no") as error:
        inspect_prefix(copy)
    assert_one_line(error, path, END_OF_DOCUMENT)


@pytest.mark.parametrize("step", [7, 1 << 24])
@pytest.mark.parametrize(("dtype", "bad"), [(np.uint16, 257), (np.int16, -3), (np.int16, 300)])
def test_first_token_outside_the_vocabulary_is_named(copy, monkeypatch, step, dtype, bad):
    monkeypatch.setattr(prefix, "_TOKENS_PER_STEP", step)
    paths = dataset_paths(copy)
    info = inspect_prefix(copy)
    check_token_ids(copy, info)
    tokens = np.fromfile(paths.bin, dtype=dtype)
    tokens[[100, 200]] = bad
    tokens.tofile(paths.bin)
    index = bytearray(Path(paths.idx).read_bytes())
    index[17] = {np.uint16: 8, np.int16: 3}[dtype]
    Path(paths.idx).write_bytes(index)
    assert inspect_prefix(copy) == info
    with pytest.raises(ValueError, match=f"token 100 has id {bad}") as error:
        check_token_ids(copy, info)
    assert_one_line(error, paths.bin, "257")
