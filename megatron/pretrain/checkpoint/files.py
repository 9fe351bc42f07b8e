"""Checkpoint folders on disk: published whole and verified, or invisible.

A checkpoint holds a manifest with the size and SHA-256 of every other file. A folder without one was never
finished. Its lineage names the checkpoints beside it that it goes back to: they are one branch, and a job
that goes back begins another. :mod:`megatron.pretrain.checkpoint.publishing` writes all this.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from helixpipe.json_input import parse_object
from helixpipe.reliability.exit_codes import DataError

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
TRACKER = "latest_checkpointed_iteration.txt"
# Of megatron.core.dist_checkpointing: there is one in every checkpoint.
FORM = "metadata.json"
FORMAT = "helixpipe-checkpoint"
_CHUNK_BYTES = 1 << 22


class FileDigest(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


class Lineage(NamedTuple):
    """Where a checkpoint comes from.

    Attributes:
        id: of this save alone.
        job: that saved it, see :func:`megatron.pretrain.health.rendezvous.job_identity`.
        ancestors: ids of the checkpoints in the same folder that came before it.
    """

    id: str
    job: str
    ancestors: tuple[str, ...]


class Saved(NamedTuple):
    """A checkpoint, and where it comes from."""

    folder: Path
    lineage: Lineage

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """One that is there; errors are those of :func:`lineage_of`."""
        return cls(folder, lineage_of(folder))


def folder_of(root: Path, iteration: int) -> Path:
    """The folder of a published checkpoint."""
    return root / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """The iteration after which a checkpoint was saved."""
    return int(folder.name[5:])


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


def is_same_folder(first: Path, second: Path) -> bool:
    """True for two names of one folder."""
    try:
        return first.samefile(second)
    except OSError:
        return first.resolve() == second.resolve()


def usable(root: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted((path for path in _named(root) if (path / MANIFEST).is_file()), key=iteration_of)


def of_another_program(root: Path) -> Path | None:
    """A checkpoint among others that another program has saved; None if there is none."""
    return next(filter(is_megatron_lms, _named(root)), None)


def _named(root: Path) -> list[Path]:
    """Folders with the name of a checkpoint; those that are being saved, removed or set aside have others."""
    return [path for path in root.glob("iter_*") if path.name[5:].isdecimal() and path.name.isascii()]


def is_megatron_lms(folder: Path) -> bool:
    """True for a checkpoint that another program has saved: it has no manifest."""
    return (folder / FORM).is_file() and not (folder / MANIFEST).exists()


def branch_of(folder: Path) -> list[Path]:
    """A published checkpoint after those beside it that it goes back to, oldest first.

    Raises:
        DataError: its lineage cannot be read.
    """
    return [*_ancestors(Saved.read(folder)), folder]


def branch_left_of(saved: Saved) -> list[Path]:
    """What is still there of a branch, oldest first: people remove checkpoints while a job runs."""
    is_there = id_of(saved.folder) == saved.lineage.id
    return [*_ancestors(saved), *([saved.folder] if is_there else [])]


def _ancestors(saved: Saved) -> list[Path]:
    ids = set(saved.lineage.ancestors)
    return [other for other in usable(saved.folder.parent) if id_of(other) in ids]


def lineage_of(folder: Path) -> Lineage:
    """Where a checkpoint comes from.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = folder / LINEAGE
    try:
        data = parse_object(path.read_bytes(), str(path))
        return Lineage(str(data["id"]), str(data["job"]), tuple(map(str, data["ancestors"])))
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} is missing or damaged; use another checkpoint") from None


def id_of(folder: Path) -> str:
    """Empty if it cannot be read: then it belongs to no branch."""
    try:
        return lineage_of(folder).id
    except DataError:
        return ""


def tracked(root: Path) -> Path | None:
    """The checkpoint that the tracker names, ours or another program's; None if nothing was ever saved here.

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
    try:
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise DataError(f"{tracker} cannot be read ({error.strerror}); {choice}") from None
    if not text.isdecimal():
        raise DataError(f"{tracker} holds {text!r} instead of an iteration; {choice}")
    folder = folder_of(root, int(text))
    if any(folder.glob("mp_rank_*/*.pt")):
        raise DataError(
            f"{folder} was saved as --ckpt-format torch, which is not read here; let Megatron-LM "
            "convert it by --ckpt-convert-format torch_dist --ckpt-convert-save DIR"
        )
    if folder not in usable(root) and not is_megatron_lms(folder):
        raise DataError(f"{tracker} names {folder.name}, which is not there; {choice}")
    return folder


def manifest_of(folder: Path) -> dict[str, FileDigest]:
    """What the files of a checkpoint must be.

    Raises:
        DataError: a manifest that is damaged, or files beside those that it names.
    """
    path = folder / MANIFEST
    try:
        data = parse_object(path.read_bytes(), str(path))
        if data["format"] != FORMAT or folder_of(folder.parent, data["iteration"]) != folder:
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
