"""Checkpoint folders on disk: published whole and verified, or invisible.

A checkpoint is written into ``iter_0000010.saving``. When every file is on disk, a manifest with the size and
SHA-256 of each is added and the folder gets its name. A folder without a manifest was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from helixpipe.reliability.exit_codes import DataError

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
_SAVING = ".saving"
_FORMAT = "helixpipe-checkpoint"
_CHUNK_BYTES = 1 << 22


class FileDigest(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def folder_of(root: Path, iteration: int) -> Path:
    """The folder of a published checkpoint."""
    return root / f"iter_{iteration:07d}"


def start_saving(root: Path, iteration: int) -> Path:
    """An empty folder to write into; leftovers of interrupted saves go away."""
    for leftover in root.glob(f"iter_*{_SAVING}"):
        shutil.rmtree(leftover)
    temporary = root / (folder_of(root, iteration).name + _SAVING)
    temporary.mkdir(parents=True)
    return temporary


def saving_folder(root: Path, iteration: int) -> Path:
    """Where :func:`start_saving` has made the folder."""
    return root / (folder_of(root, iteration).name + _SAVING)


def digest(path: Path, *, to_disk: bool = False) -> FileDigest:
    """Size and hash of a file; ``to_disk`` also makes sure that it has reached the disk."""
    hashed, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            hashed.update(block)
            size += len(block)
        if to_disk:
            os.fsync(stream.fileno())
    return FileDigest(size, hashed.hexdigest())


def share(names: list[str], rank: int, num_ranks: int) -> list[str]:
    """The files that ``rank`` reads, so that all ranks hash side by side."""
    return sorted(names)[rank::num_ranks]


def publish(root: Path, iteration: int, digests: Mapping[str, FileDigest], keep: int | None) -> Path:
    """Give a finished checkpoint its manifest and its name, point the tracker at it, drop the oldest.

    Args:
        root: the folder of ``--save``.
        iteration: of the checkpoint in its temporary folder.
        digests: of every file in it.
        keep: how many checkpoints stay; None for all.
    """
    temporary, final = saving_folder(root, iteration), folder_of(root, iteration)
    manifest = {
        "format": _FORMAT,
        "iteration": iteration,
        "files": {name: found._asdict() for name, found in sorted(digests.items())},
    }
    write_whole(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    _sync_folder(temporary)
    if final.exists():
        # A rerun of the same iteration. Until the new one has its name, the tracker names another one.
        others = [folder for folder in usable(root) if folder != final]
        if others:
            write_whole(root / TRACKER, f"{int(others[-1].name[5:])}\n")
        old = final.rename(final.with_name(final.name + ".old" + _SAVING))
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    _sync_folder(root)
    write_whole(root / TRACKER, f"{iteration}\n")
    if keep is not None:
        for folder in usable(root)[:-keep]:
            shutil.rmtree(folder)
    return final


def usable(root: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [path for path in root.glob("iter_*") if path.name[5:].isdecimal()]
    return sorted(path for path in found if (path / MANIFEST).is_file())


def tracked(root: Path) -> Path | None:
    """The checkpoint that the tracker names, or None if nothing was ever saved here.

    Raises:
        DataError: a tracker that is unreadable, missing, or names what is not there; the message lists what
            is.
    """
    choice = f"usable: {', '.join(path.name for path in usable(root)) or 'none'}"
    tracker = root / TRACKER
    if not tracker.exists():
        if usable(root):
            raise DataError(f"{root} holds checkpoints but no {TRACKER}; write the wanted iteration there")
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"{tracker} holds {text!r} instead of an iteration; {choice}")
    folder = folder_of(root, int(text))
    if folder not in usable(root):
        raise DataError(f"{tracker} names {folder.name}, which is not there; {choice}")
    return folder


def manifest_of(folder: Path) -> dict[str, FileDigest]:
    """What the files of a checkpoint must be.

    Raises:
        DataError: a manifest that is damaged, or files beside those that it names.
    """
    path = folder / MANIFEST
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT or folder_of(folder.parent, data["iteration"]) != folder:
            raise ValueError("another format or iteration")
        files = {
            str(name): FileDigest(int(e["bytes"]), str(e["sha256"])) for name, e in data["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged or of another checkpoint; use another one") from None
    for name in files:
        # A name must not lead out of the folder.
        if name in ("", "..") or name != Path(name).name:
            raise DataError(f"{path} names {name!r}, which is not a file of this folder; use another one")
    found = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    for name in sorted(found ^ set(files)):
        what = "is missing" if name in files else "does not belong there"
        raise DataError(f"{folder / name} {what}; use another checkpoint")
    return files


def check_file(folder: Path, name: str, expected: FileDigest) -> str:
    """What is wrong with a file; empty if it is as the manifest says."""
    path = folder / name
    if path.is_symlink() or not path.is_file():
        return f"{path} is not a plain file"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"{path} has {size} bytes instead of {expected.bytes}: it is truncated or from another save"
    if digest(path) != expected:
        return f"{path} has another checksum than when it was saved: it is damaged or from another save"
    return ""


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one step, so that it is never seen half-written."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    """Names in a folder survive a crash only once the folder itself is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
