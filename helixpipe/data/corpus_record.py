"""What one look at all of a corpus has found, kept on disk: no other rank and no later start repeats it.

The record holds while the files are the same ones: size, time of the last change and inode number of each. It
lies in the folder of the index cache; where that cannot be written, everyone looks for themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from helixpipe.data.fingerprint import fingerprint
from helixpipe.data.index_file import check_index, hash_of_file, open_index
from helixpipe.data.prefix import DatasetInfo, check_token_ids, dataset_paths
from helixpipe.data.whole_file import write_whole
from helixpipe.json_input import read_json

_FORMAT = 1


class CorpusRecord(NamedTuple):
    """What is known of a corpus whose index is in order and whose ids are in the vocabulary.

    Attributes:
        files: which ones were looked at, and with which vocabulary.
        index_hash: SHA-256 of the index, see :func:`hash_of_file`.
        content: see :func:`fingerprint`.
    """

    files: str
    index_hash: str
    content: str


def checked_corpus(info: DatasetInfo, folder: Path) -> CorpusRecord:
    """The record of a corpus, which is checked now if there is none.

    Args:
        info: of the corpus.
        folder: of records.

    Raises:
        DataError: an index entry that does not fit the others, or an id outside the vocabulary.
    """
    return _recorded(info, folder) or _look(info, folder, checks=True)


def known_corpus(info: DatasetInfo, folder: Path) -> CorpusRecord:
    """The record of a corpus that some rank has checked; made here, unchecked, if it could not be kept."""
    return _recorded(info, folder) or _look(info, folder, checks=False)


def _look(info: DatasetInfo, folder: Path, *, checks: bool) -> CorpusRecord:
    # The files' state before they are read: what is changed meanwhile is looked at again.
    files, index = _identity(info), dataset_paths(info.prefix).idx
    if checks:
        check_index(open_index(index))
        check_token_ids(info.prefix, info)
    record = CorpusRecord(files, hash_of_file(index), fingerprint(info))
    if checks:
        # A folder that cannot be written to is no error here.
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"format": _FORMAT, **record._asdict()})
            write: Callable[[Path], object] = partial(Path.write_text, data=text, encoding="utf-8")
            write_whole(_place(info, folder), write)
    return record


def _recorded(info: DatasetInfo, folder: Path) -> CorpusRecord | None:
    try:
        found = read_json(_place(info, folder), "record")
        record = CorpusRecord(*(found[name] for name in CorpusRecord._fields))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_ours = found.get("format") == _FORMAT and all(isinstance(value, str) for value in record)
    return record if is_ours and record.files == _identity(info) else None


def _place(info: DatasetInfo, folder: Path) -> Path:
    """Corpora of one name may share a folder."""
    prefix = os.path.realpath(info.prefix)
    mark = hashlib.sha256(os.fsencode(prefix)).hexdigest()[:12]
    return folder / f"{os.path.basename(prefix)}-{mark}-checked.json"


def _identity(info: DatasetInfo) -> str:
    paths = dataset_paths(info.prefix)
    parts = [str((info.vocab_size, info.eod))]
    for path in paths if info.has_tokenizer_file else paths[:2]:
        found = os.stat(path)
        parts.append(f"{found.st_size} {found.st_mtime_ns} {found.st_ino}")
    return "; ".join(parts)
