"""Safetensors files, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from helixpipe.json_input import parse_object

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class TensorFolder:
    """The tensors in a model's folder.

    Args:
        folder: with ``model.safetensors``, or several files and their index.
        prefix: what names begin with; put before names in files that have it nowhere.

    Attributes:
        names: of all tensors.

    Raises:
        ValueError: files that are missing or damaged.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._folder = folder
        files = self._files()
        self._file_of: dict[str, Any] = {}
        for file in files:
            path = folder / file
            try:
                opened = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}); download it again") from None
            names: list[str] = opened.keys()
            for name in names:
                if name in self._file_of:
                    raise ValueError(f"{folder} holds {name} twice, the second time in {file}; remove one")
                self._file_of[name] = opened
        self._missing = "" if any(name.startswith(prefix) for name in self._file_of) else prefix
        self.names = frozenset(self._missing + name for name in self._file_of)

    def _files(self) -> list[str]:
        index = self._folder / _INDEX
        if index.is_file():
            try:
                files = sorted(set(parse_object(index.read_bytes(), str(index))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index} is damaged; download it again") from None
            # A name must not lead out of the folder.
            outside = [name for name in files if name != Path(name).name]
            if outside:
                raise ValueError(f"{index} names {outside[0]!r}, which is not a file of this folder")
            return files
        if not (self._folder / _SINGLE).is_file():
            raise ValueError(
                f"{self._folder} has neither {_SINGLE} nor {_INDEX}; other formats are not read: save the "
                "model with transformers' save_pretrained"
            )
        return [_SINGLE]

    def describe(self, name: str) -> Tensor:
        """Shape and type of a tensor, as a tensor without data."""
        stored = name.removeprefix(self._missing)
        part = self._file_of[stored].get_slice(stored)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(
                f"{self._folder}: {name} has the type {part.get_dtype()}, which is not supported; use a "
                f"model in one of {', '.join(_DTYPES)}"
            )
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """A tensor, in host memory."""
        stored = name.removeprefix(self._missing)
        tensor: Tensor = self._file_of[stored].get_tensor(stored)
        return tensor


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorWriter:
    """Writes tensors into files of a limited size, and their index.

    Args:
        folder: to write into.
        shard_bytes: a file is closed before the tensor that would make it larger.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._open: dict[str, Tensor] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor, and write those before it if they fill a file."""
        held = sum(other.nbytes for other in self._open.values())
        if self._open and held + tensor.nbytes > self._shard_bytes:
            self._write()
        self._open[name] = tensor
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the rest, and give the files the names that say how many they are."""
        self._write()
        if len(self._shards) == 1:
            self._shards[0][0].replace(self._folder / _SINGLE)
            return
        places = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = self._folder / f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            path.replace(final)
            places.update(dict.fromkeys(names, final.name))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(places.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        path = self._folder / f"shard-{len(self._shards)}.tmp"
        save_file({name: tensor.contiguous() for name, tensor in self._open.items()}, path, {"format": "pt"})
        self._shards.append((path, list(self._open)))
        self._open = {}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that has its name once everything in it is written; until then it is called ``.tmp``.

    Raises:
        ValueError: it exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it, or give another --output")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
