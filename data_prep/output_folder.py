"""The folder that `split` and `filter` write their tables and pages to: its default name, and its lock."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mochi_tune.errors import ConfigError, DataError
from mochi_tune.files import lock_file


def sibling_folder(folder: Path, ending: str, setting: str) -> Path:
    """Returns the folder next to another one, with the name of that one plus `ending`.

    Args:
        folder: the other folder.
        ending: of the name.
        setting: that names the other folder, for errors.

    Raises:
        ConfigError: `folder` is the root of the file system, which has no siblings.
    """
    # "." and ".." are other folders' names.
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    if not folder.name:
        raise ConfigError(
            f"{setting}={folder} is the root of the file system, next to which nothing fits: use out=DIR."
        )
    return folder.with_name(f"{folder.name}{ending}")


@contextlib.contextmanager
def lock_folder(folder: Path, verb: str) -> Iterator[None]:
    """Holds the lock of a folder, which ends with the process; continues without one on a disk that has no locks.

    Args:
        folder: to lock.
        verb: of the command line, for messages.

    Raises:
        DataError: another process holds the lock.
    """
    with open(folder / ".lock", "w") as lock:
        try:
            if not lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                tqdm.write(f"{folder}: its disk has no locks: make sure that no other {verb} writes there")
        except BlockingIOError:
            raise DataError(f"{folder} is in use by another {verb}: wait for it, or use another out=.") from None
        yield
