"""Publish checkpoints in one step, set abandoned branches aside, remove what is too old.

A checkpoint is written into ``iter_0000010.saving``. When every file is on disk, the manifest is added, a
journal notes that the folder is whole, the folder gets its name, and the tracker names it. Whoever owns the
root next finishes what a journal says was begun. Nothing that the tracker names, and no other branch, is
ever removed: checkpoints that do not lead to the one that was just published get another name.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from helixpipe.data.whole_file import sync_folder
from helixpipe.json_input import parse_object
from megatron.pretrain.checkpoint.files import (
    FORMAT,
    LINEAGE,
    MANIFEST,
    TRACKER,
    FileDigest,
    Lineage,
    Saved,
    branch_left_of,
    branch_of,
    digest,
    folder_of,
    id_of,
    iteration_of,
    lineage_of,
    usable,
    write_whole,
)

JOURNAL = "publishing.json"
_SAVING = ".saving"
_REMOVING = ".removing"
_SET_ASIDE = ".set-aside"


class Published(NamedTuple):
    """A checkpoint that is there, and what became of others, in words."""

    saved: Saved
    notes: list[str]


def start_saving(root: Path, iteration: int) -> Path:
    """An empty folder to write into; leftovers of interrupted saves go away."""
    finish_publishing(root)
    for ending in (_SAVING, _REMOVING):
        for leftover in root.glob(f"iter_*{ending}"):
            shutil.rmtree(leftover)
    temporary = saving_folder(root, iteration)
    temporary.mkdir(parents=True)
    return temporary


def saving_folder(root: Path, iteration: int) -> Path:
    """Where :func:`start_saving` has made the folder."""
    return root / (folder_of(root, iteration).name + _SAVING)


def publish(
    root: Path,
    iteration: int,
    digests: Mapping[str, FileDigest],
    *,
    job: str,
    previous: Saved | None,
    keep: int | None,
) -> Published:
    """Give a finished checkpoint its manifest and its name, and point the tracker at it.

    Args:
        root: the folder of ``--save``.
        iteration: of the checkpoint in its temporary folder.
        digests: of every file in it.
        job: that saves it.
        previous: the checkpoint in this root that the job has last saved, or gone on from, if it has not been
            removed since; None if there is none, then all others are another job's.
        keep: how many checkpoints of this branch stay; None for all.

    Raises:
        OSError: it is not published, and the tracker names what it has named.
    """
    temporary = saving_folder(root, iteration)
    before = [] if previous is None else branch_left_of(previous)
    lineage = Lineage(uuid.uuid4().hex, job, tuple(lineage_of(folder).id for folder in before))
    write_whole(temporary / LINEAGE, json.dumps(lineage._asdict()) + "\n")
    files = {**digests, LINEAGE: digest(temporary / LINEAGE)}
    manifest = {
        "format": FORMAT,
        "iteration": iteration,
        "files": {name: found._asdict() for name, found in sorted(files.items())},
    }
    write_whole(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    sync_folder(temporary)
    if before:
        # The job may have gone back; from here on another checkpoint may lose its name.
        _point_to(root, before[-1])
    journal = {"id": lineage.id, "iteration": iteration, "tracker": _tracker_text(root)}
    write_whole(root / JOURNAL, json.dumps(journal) + "\n")
    try:
        notes = finish_publishing(root)
    except OSError:
        _take_back(root, lineage.id, iteration)
        raise
    final = folder_of(root, iteration)
    return Published(Saved(final, lineage), notes + _tidy(root, final, keep))


def finish_publishing(root: Path) -> list[str]:
    """Finish what was begun when the process was killed, if anything was; what became of others, in words."""
    journal, notes = root / JOURNAL, []
    if not journal.exists():
        return []
    try:
        data = parse_object(journal.read_bytes(), str(journal))
        saved, iteration, tracker = str(data["id"]), int(data["iteration"]), str(data["tracker"])
    except (ValueError, KeyError, TypeError):
        journal.unlink()
        return []
    temporary, final = saving_folder(root, iteration), folder_of(root, iteration)
    # Otherwise it is done, or the user has since pointed it at another checkpoint.
    if _tracker_text(root) == tracker:
        if (temporary / MANIFEST).is_file() and id_of(temporary) == saved:
            notes += _give_name(temporary, final)
            sync_folder(root)
        # Another branch's may have the name, if this one was removed after an error.
        if final in usable(root) and id_of(final) == saved:
            _point_to(root, final)
    try:
        journal.unlink()
    except OSError as error:
        notes.append(f"{journal} could not be removed ({error})")
    return notes


def _give_name(temporary: Path, final: Path) -> list[str]:
    """Rename a finished folder; what became of another branch's that had the name, in words."""
    aside = _set_aside(final) if final.exists() else None
    try:
        temporary.rename(final)
    except OSError:
        if aside is not None:
            aside.rename(final)
        raise
    return [] if aside is None else [_note(final, aside)]


def _take_back(root: Path, saved: str, iteration: int) -> None:
    """Undo a publication that an error has ended, as far as the storage allows it."""
    final = folder_of(root, iteration)
    with contextlib.suppress(OSError):
        if _tracker_text(root) != _tracker_line(final):
            if id_of(final) == saved:
                final.rename(saving_folder(root, iteration))
            (root / JOURNAL).unlink()


def _tidy(root: Path, final: Path, keep: int | None) -> list[str]:
    """Leave no other branch under the names of checkpoints, and of this one the last ``keep``."""
    notes = []
    branch = branch_of(final)
    try:
        for other in usable(root):
            if other not in branch:
                notes.append(_note(other, _set_aside(other)))
        for old in branch[:-keep] if keep is not None else []:
            # In one step, so that it is never seen half removed.
            shutil.rmtree(old.rename(old.with_name(old.name + _REMOVING)))
    except OSError as error:
        notes.append(f"{root} could not be tidied up ({error})")
    return notes


def _set_aside(folder: Path) -> Path:
    """Give another branch's checkpoint a name under which it is neither loaded nor removed; says which."""
    aside, count = folder.with_name(folder.name + _SET_ASIDE), 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{folder.name}{_SET_ASIDE}-{count}")
    return folder.rename(aside)


def _note(folder: Path, aside: Path) -> str:
    return f"{folder} is not what this job goes on from: it is kept as {aside.name}"


def _point_to(root: Path, folder: Path) -> None:
    text = _tracker_line(folder)
    if _tracker_text(root) != text:
        write_whole(root / TRACKER, text)


def _tracker_line(folder: Path) -> str:
    return f"{iteration_of(folder)}\n"


def _tracker_text(root: Path) -> str:
    """Of any content; empty without a tracker."""
    try:
        return (root / TRACKER).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
