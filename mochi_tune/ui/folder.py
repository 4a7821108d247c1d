"""The folder that a page serves: the page reads and writes files in it, and nothing else."""

import contextlib
import fcntl
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mochi_tune.errors import ConfigError, DataError
from mochi_tune.files import lock_file

# Folder of the page's own files: jobs, thumbnails and unfinished uploads.
OWN_FOLDER = ".mochi_tune"
MAX_NAME_BYTES = 200


def inside(folder: Path, name: str | Path) -> Path:
    """Returns the resolved path of a file or folder in `folder`, which need not exist.

    Args:
        folder: folder of the page.
        name: path relative to it, or absolute.

    Raises:
        DataError: the path leads out of the folder, by `..`, an absolute path or a symbolic link.
    """
    text = os.fspath(name)
    if "\0" in text:
        raise DataError(f"{text!r} contains NUL, which no file name can: use another name.")
    root = folder.resolve()
    try:
        path = (root / Path(text).expanduser()).resolve()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{text}: {error}: name another path.") from None
    if not path.is_relative_to(root):
        raise DataError(f"{text} is outside of {root}, the folder of this page: start `mochi-tune ui` on another one.")
    return path


def changed_at(path: Path) -> float:
    """Returns the modification time of a file, in seconds since 1970; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def relative(folder: Path, path: Path) -> str:
    """Returns a path in the folder as in a URL: relative to the folder, with slashes.

    Raises:
        DataError: as `inside`.
    """
    return inside(folder, path).relative_to(folder.resolve()).as_posix()


def make_own_folder(folder: Path) -> None:
    """Makes the folder of the page's own files.

    Raises:
        ConfigError: it cannot be written, or its disk has no file locks.
    """
    own = folder / OWN_FOLDER
    try:
        own.mkdir(exist_ok=True)
        with open(own / ".locks", "a") as file, contextlib.suppress(BlockingIOError):
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(f"folder={folder} cannot be written: {error.strerror}: use another folder.") from None


def lock(file: IO, operation: int) -> None:
    """Locks a file of the page's own folder until it is closed.

    Raises:
        BlockingIOError: `operation` has LOCK_NB, and another process holds the lock.
        ConfigError: the disk has no file locks.
    """
    if not lock_file(file, operation):
        folder = str(file.name).partition(f"{os.sep}{OWN_FOLDER}{os.sep}")[0]
        raise ConfigError(
            f"folder={folder} is on a disk without file locks, where two pages would run the same job twice: use a "
            "folder on another disk."
        )


@contextlib.contextmanager
def open_page_file(folder: Path, address: str) -> Iterator[str]:
    """Records the address of a folder's page; yields the address of the page that it already has, "" for none.

    The operating system releases the lock when the page's process ends, however it ends.
    """
    with open(folder / OWN_FOLDER / "page", "a+", encoding="utf-8") as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read().strip() or "another address"
            return
        file.truncate(0)
        file.write(address)
        file.flush()
        yield ""


def clean_name(name: str, suffixes: tuple[str, ...]) -> str:
    """Returns a safe file name for an uploaded file: the last part of its name, in plain characters.

    Args:
        name: name from the browser, which may be any text.
        suffixes: allowed suffixes, in lower case.

    Raises:
        DataError: the suffix is not allowed, or no character of the name is left.
    """
    # Browsers write a quotation mark in the name of an upload as %22.
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name.replace("%22", '"')))[-1]
    plain = "".join(c if _is_plain(c) else "_" for c in last).strip(" .")
    stem, suffix = os.path.splitext(plain)
    if suffix.lower() not in suffixes:
        raise DataError(f"{last[:80]!r} cannot be uploaded: its name must end in one of {' '.join(suffixes)}.")
    while len(stem.encode()) > MAX_NAME_BYTES:
        stem = stem[:-1]
    if not stem.strip(" ._"):
        raise DataError(f"{last[:80]!r} is no name for a file: rename it.")
    return stem + suffix


def _is_plain(character: str) -> bool:
    # Marks (M) are vowels in many scripts, so names that differ only in marks must stay different.
    return character.isalnum() or unicodedata.category(character).startswith("M") or character in " ._-()"
