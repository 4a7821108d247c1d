"""Temporary files: their names, their removal, and errors of the disk that name the file that is being written."""

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Errors of a full disk, and of a limit on the size of files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of a disk that fails, is lost or cannot be written to.
_FAILS = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT)


@contextlib.contextmanager
def temporary_file(path: Path, named: Path | None = None) -> Iterator[Path]:
    """Yields a path in the folder of `path` that no other process uses; an error removes what was written there.

    An error of the disk names `named`, or else `path`.
    """
    temporary = path.with_name(temporary_name(path.name, os.getpid()))
    with naming(named or path, temporary):
        try:
            yield temporary
        except BaseException:
            # A disk that refused to write may refuse this too; the first error says what is wrong.
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
            raise


@contextlib.contextmanager
def naming(path: Path | str, temporary: Path | None = None) -> Iterator[None]:
    """Makes errors of the disk name `path`: the system names no file when it refuses to write to an open one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        is_temporary = temporary is not None and error.filename == str(temporary)
        # A full disk is never that of another file, such as the source of a copy.
        if is_temporary or error.errno in _FULL or (error.errno in _FAILS and error.filename is None):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def temporary_name(name: str, process: int | str) -> str:
    """Returns the name that a process of this machine or container gives to the temporary file of a file."""
    return f".{name}.{_host()}-{process}.tmp"


@cache
def _host() -> str:
    # Machines that share a disk can have the same process ids, and so can containers with the same host name.
    processes = os.readlink(path) if os.path.islink(path := "/proc/self/ns/pid") else ""
    return hashlib.sha256(f"{socket.gethostname()} {processes}".encode()).hexdigest()[:6]


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder; no process may be writing to it."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def remove_left_behind(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files that ended processes of this machine or container left in a folder.

    Args:
        folder: the folder; it need not exist.
        name: removes only those of the file of this name, which this process is about to write.
    """
    import psutil

    for path in folder.glob(temporary_name("*" if name is None else glob.escape(name), "*")):
        process = path.stem.rpartition("-")[2]
        # Another thread of this process may be writing another file.
        is_own = process == str(os.getpid())
        if process.isdecimal() and (name is not None if is_own else not psutil.pid_exists(int(process))):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
