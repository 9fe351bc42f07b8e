"""Facts and faults of a checkpoint on disk, ours or Megatron-LM's, without a process group or a model."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from helixpipe.json_input import parse_object
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.common_state import arguments_in, read_common
from megatron.pretrain.checkpoint.files import (
    FORM,
    TRACKER,
    check_file,
    folder_of,
    is_megatron_lms,
    manifest_of,
    share,
)
from megatron.pretrain.checkpoint.safe_pickle import find_unsafe_content, read_table, tensors_in

TABLE = ".metadata"
BACKEND = "torch_dist"
_OPTIMIZER = "optimizer."
# Of a job, as far as either program says it: Megatron's names.
_ARCHITECTURE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "seq_length", "max_position_embeddings", "position_embedding_type", "normalization", "swiglu",
    "untie_embeddings_and_output_weights", "padded_vocab_size", "global_batch_size",
)  # fmt: skip
_PARALLELISM = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")


def find_checkpoint(path: Path) -> Path:
    """The folder of a checkpoint: ``path`` itself, or the one that the tracker in it names.

    Raises:
        DataError: there is none.
    """
    if (path / FORM).is_file() or (path / TABLE).is_file():
        return path
    try:
        text = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        raise DataError(f"{path} holds neither a checkpoint nor {TRACKER}; give the folder of one") from None
    if not text.isdecimal() and text != "release":
        raise DataError(f"{path / TRACKER} holds {text!r} instead of an iteration; give iter_… itself")
    folder = path / text if text == "release" else folder_of(path, int(text))
    if not folder.is_dir():
        raise DataError(f"{path / TRACKER} names {folder.name}, which is not there; give iter_… itself")
    return folder


def facts(folder: Path) -> Iterator[tuple[str, Any]]:
    """What is to be known of a checkpoint, by name.

    Raises:
        DataError: it cannot be read; :func:`faults` says more.
    """
    common, tensors = read_common(folder), _tensors(folder)
    settings: Mapping[str, Any] = common.get("settings") or arguments_in(common)
    is_ours = not is_megatron_lms(folder)
    yield "folder", folder
    yield "saved by", "HelixPipe's pretrain_gpt.py" if is_ours else "another program, as torch_dist"
    yield "iteration", common.get("iteration", "not said")
    own, theirs = common.get("samples", {}), settings.get("consumed_train_samples", "not said")
    yield "consumed samples", own.get("consumed_samples", theirs)
    files = [path for path in folder.iterdir() if path.is_file()]
    yield "files", len(files)
    yield "bytes", sum(path.stat().st_size for path in files)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OPTIMIZER)}
    yield "weights", sum(math.prod(tensor.size) for tensor in weights.values())
    yield "type of weights", _types(weights)
    states = {name: tensor for name, tensor in tensors.items() if name.startswith(_OPTIMIZER)}
    yield "elements of optimizer states", sum(math.prod(tensor.size) for tensor in states.values())
    if states:
        yield "type of optimizer states", _types(states)
    form = common.get("content_metadata") or {}
    yield "form of optimizer states", form.get("distrib_optim_sharding_type", "not distributed")
    for name in (*_ARCHITECTURE, *_PARALLELISM):
        if settings.get(name) is not None:
            yield name.replace("_", "-"), settings[name]


def faults(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each; empty if it is whole.

    Ours is held to the sizes and hashes of its manifest. One of another program has none: its files are held
    to its table of contents, and each tensor's bytes to the checksum that torch has put beside them.
    """
    try:
        if is_megatron_lms(folder):
            return faults_by_table(folder)
        files = manifest_of(folder)
    except DataError as error:
        return [str(error)]
    found = [check_file(folder, name, expected) for name, expected in sorted(files.items())]
    return [text for text in found if text] or list(filter(None, [find_unsafe_content(folder)]))


def faults_by_table(folder: Path, rank: int = 0, num_ranks: int = 1) -> list[str]:
    """What is wrong with a checkpoint of another program, a line each.

    Args:
        folder: of the checkpoint.
        rank, num_ranks: which share of the shards to read.
    """
    try:
        form = parse_object((folder / FORM).read_bytes(), FORM)
        if form.get("sharded_backend") != BACKEND:
            return [f"{folder / FORM} names {form.get('sharded_backend')!r}; only {BACKEND} can be checked"]
    except (OSError, ValueError):
        return [f"{folder / FORM} is missing or damaged; use another checkpoint"]
    try:
        table = read_table(folder)
        tensors = tensors_in(table)
    except Exception as error:  # a damaged pickle may raise anything
        return [f"{folder / TABLE} cannot be read ({type(error).__name__}); use another checkpoint"]
    found = [
        f"{folder}: {name} has {_elements_in_chunks(tensor)} elements in its shards instead of "
        f"{math.prod(tensor.size)}; use another checkpoint"
        for name, tensor in tensors.items()
        if _elements_in_chunks(tensor) != math.prod(tensor.size)
    ]
    by_file: dict[str, list[tuple[str, Any]]] = {}
    for index, place in (table.storage_data or {}).items():
        by_file.setdefault(place.relative_path, []).append((index.fqn, place))
    for name in share(list(by_file), rank, num_ranks):
        found += _faults_of_file(folder, name, by_file[name])
    try:
        read_common(folder)
    except DataError as error:
        found.append(str(error))
    return found


def _faults_of_file(folder: Path, name: str, places: list[tuple[str, Any]]) -> Iterator[str]:
    path = folder / name
    if name != Path(name).name or path.is_symlink() or not path.is_file():
        yield f"{path} is missing, or is not a plain file; use another checkpoint"
        return
    size, wanted = path.stat().st_size, max(place.offset + place.length for _, place in places)
    if size != wanted:
        yield f"{path} has {size} bytes instead of {wanted}; use another checkpoint"
    with path.open("rb") as stream:
        for item, place in places:
            if place.offset + place.length <= size and not _is_whole(stream, place.offset, place.length):
                yield f"{path}: {item} has another checksum than when it was saved; use another checkpoint"


def _is_whole(stream: IO[bytes], offset: int, length: int) -> bool:
    """Whether what ``torch.save`` has written there still has its checksums."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_Part(stream, offset, length))) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive may raise anything
        return False


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, stream: IO[bytes], offset: int, length: int) -> None:
        self._stream, self._offset, self._length = stream, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._stream.seek(self._offset + self._position)
        block = self._stream.read(count)
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)


def _tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    try:
        return tensors_in(read_table(folder))
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"{folder / TABLE} cannot be read ({type(error).__name__}); use another checkpoint"
        ) from None


def _elements_in_chunks(tensor: TensorStorageMetadata) -> int:
    return sum(math.prod(chunk.sizes) for chunk in tensor.chunks)


def _types(tensors: Mapping[str, TensorStorageMetadata]) -> str:
    found = {str(tensor.properties.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return ", ".join(sorted(found))
