"""Hashes of files, saved between runs: a file with the same size, inode and change time is not read again."""

import json
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from mochi_tune.errors import DataError
from mochi_tune.files import file_sha256, parse_object, write_atomic

HASHES_FILE = ".files.json"
# Minimum seconds since a file's change until its hash is saved: file systems store change times in steps, so that
# another change may follow with the same time.
SETTLED_SECONDS = 2.5
# Size in bytes, inode, change time in nanoseconds.
Signature = tuple[int, int, int]


class FileHashes:
    """The hashes that earlier runs have saved.

    Args:
        path: of the file that they are saved in.
        others: further files of saved hashes, which are only read.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        self._path = path
        self._before = _read(path)
        self._known = {name: entry for file in others for name, entry in _read(file).items()} | self._before
        self._now: dict[str, list[int | str]] = {}

    def sha256(self, path: Path, found: Signature) -> str:
        """Returns a file's hash; reads the file unless its signature is known.

        Raises:
            DataError: the file cannot be read, or is not a regular file.
        """
        name, begun = os.path.abspath(path), time.time_ns()
        entry = self._known.get(name)
        if entry is not None and entry[:3] == list(found):
            self._now[name] = entry
            return str(entry[3])
        sha256 = _read_hash(path)
        is_settled = begun - found[2] > SETTLED_SECONDS * 1e9
        if is_settled and signature(path) == found:
            self._now[name] = [*found, sha256]
        return sha256

    def signature_of(self, path: Path) -> Signature | None:
        """Returns the saved signature of a file; None if there is none."""
        entry = self._known.get(os.path.abspath(path))
        return None if entry is None else (int(entry[0]), int(entry[1]), int(entry[2]))

    def save(self, is_whole: bool = True) -> None:
        """Saves the hashes of this run.

        Args:
            is_whole: whether this run has asked for all files; if not, hashes of earlier runs are kept.
        """
        files = self._now if is_whole else self._before | self._now
        if files != self._before or not self._path.exists():
            write_atomic(self._path, json.dumps({"version": 1, "files": files}).encode())
            self._before = dict(files)


def signature(path: Path) -> Signature:
    """Returns a file's size, inode and change time, which programs cannot set. A write changes at least one.

    Raises:
        DataError: the file cannot be opened.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}): copy it again or remove it.") from None
    return found.st_size, found.st_ino, found.st_ctime_ns


def _read_hash(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Opening a pipe would block.
            raise DataError(f"{path}: is a pipe, a socket or a device, not a file: remove it.")
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}): copy it again or remove it.") from None


def _read(path: Path) -> dict[str, list[int | str]]:
    """Returns the entries of a saved file; {} if it is missing or another program wrote it."""
    kept = (parse_object(path.read_bytes()) or {}) if path.is_file() else {}
    files = kept.get("files") if kept.get("version") == 1 else None
    return {name: entry for name, entry in files.items() if _is_entry(entry)} if isinstance(files, dict) else {}


def _is_entry(entry: object) -> bool:
    kinds = (int, int, int, str)
    return isinstance(entry, list) and len(entry) == 4 and all(map(isinstance, entry, kinds))
