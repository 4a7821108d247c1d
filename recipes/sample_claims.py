"""Claims on the videos of a grid or a farm, so that only one of the processes that share a folder renders each."""

import contextlib
import fcntl
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mochi_tune.files import lock_file


@contextlib.contextmanager
def claimed(video: Path) -> Iterator[bool]:
    """Claims a video for the duration of the block; yields False if another process has claimed it.

    The claim is a file lock, which the system releases when a process dies. Temporary files of such a process are
    removed. On a disk without locks every claim succeeds.
    """
    path = video.with_name(f".{video.name}.claim")
    while True:
        with open(path, "ab") as file:
            try:
                is_locked = lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _is_still(path, file.fileno()):
                # The process that held the lock removed the file after it was opened here.
                continue
            if is_locked:
                for left in video.parent.glob(f".{glob.escape(video.stem)}.*.tmp"):
                    left.unlink()
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def has_locks(folder: Path) -> bool:
    """Whether a folder's disk supports the file locks of claims."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_still(path: Path, handle: int) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
