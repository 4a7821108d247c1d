"""Small things about files that several rooms need."""

import hashlib
import json
import os
from itertools import count
from pathlib import Path
from typing import Any

# The full-size models and adapters need a twentieth of it.
MAX_HEADER_BYTES = 4 * 2**20


def file_sha256(path: Path) -> str:
    """Returns the hex sha256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_header(path: Path) -> None:
    """Refuses a safetensors header that no model needs, before the library parses it: over-long, or a name in it twice.

    The library itself sees to offsets, sizes and dtypes, and reads a header of a million tensors, for half a minute.

    Raises:
        ValueError: saying what is wrong with the header.
    """
    with open(path, "rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header says it is {num_bytes} bytes long, and {MAX_HEADER_BYTES} are the most")
        header = file.read(num_bytes)
    try:
        json.loads(header, object_pairs_hook=_once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("its header is no JSON, or cut short") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("its header has a name twice")
    return entries


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


def move_to_free_name(source: Path, target: Path) -> Path:
    """Renames a file to `target`, or to NAME_2, NAME_3 and so on where that is taken by now; returns the name."""
    for number in count(1):
        place = target if number == 1 else target.with_stem(f"{target.stem}_{number}")
        try:
            # Unlike a rename, a link never replaces what another process has put there.
            os.link(source, place)
        except FileExistsError:
            continue
        except OSError:
            # A file system without hard links.
            if place.exists():
                continue
            os.rename(source, place)
            return place
        source.unlink()
        return place
