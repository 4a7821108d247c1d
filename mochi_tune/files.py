"""Small things about files that several rooms need."""

import hashlib
import os
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Returns the hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_writable_folder(folder: Path) -> None:
    """Makes a folder and writes a byte to it, so that a place that cannot be written shows before any work is done.

    Raises:
        OSError: it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".write_probe_{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name only when all of it is there."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
