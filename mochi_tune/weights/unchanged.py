"""Detects files that change between a check and a later read."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mochi_tune.errors import CheckpointError


@dataclass(frozen=True)
class FileStamp:
    """Size, modification time and inode, which show without reading whether a file was changed or replaced."""

    num_bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Returns the current stamp of a file, or of the target of a link."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    @contextlib.contextmanager
    def unchanged(self, path: Path) -> Iterator[None]:
        """Calls `check` when the context starts and when it ends."""
        self.check(path)
        try:
            yield
        finally:
            self.check(path)

    def check(self, path: Path) -> None:
        """Refuses a file that no longer has this stamp.

        Raises:
            CheckpointError: the file was replaced, changed or removed.
        """
        try:
            now = FileStamp.of(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} was removed since it was checked ({error.strerror}): restore it, and start again."
            ) from None
        if now == self:
            return
        what = "replaced by another file" if now.inode != self.inode else "written to"
        sizes = f", from {self.num_bytes} to {now.num_bytes} bytes" if now.num_bytes != self.num_bytes else ""
        raise CheckpointError(
            f"{path} was {what} since it was checked{sizes}: start again when no other program changes the weights."
        )
