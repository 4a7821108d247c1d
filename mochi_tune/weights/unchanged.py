"""Files that are checked first and read later: whether they are still the same files."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mochi_tune.errors import CheckpointError


@dataclass(frozen=True)
class FileStamp:
    """What tells a file from another one that takes its place, without reading it: size, time of change, inode."""

    num_bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """Takes the stamp of a file as it is now; of a link, of the file that it leads to."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    @contextlib.contextmanager
    def unchanged(self, path: Path) -> Iterator[None]:
        """Refuses a file that is not the one of this stamp before it is read in the context, or after; as `check`."""
        self.check(path)
        try:
            yield
        finally:
            self.check(path)

    def check(self, path: Path) -> None:
        """Refuses a file that is not the one of this stamp any more.

        Raises:
            CheckpointError: it was replaced, changed or removed since.
        """
        try:
            now = FileStamp.of(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} was removed since it was checked ({error.strerror}): put it back, and start again."
            ) from None
        if now == self:
            return
        what = "replaced by another file" if now.inode != self.inode else "written to"
        sizes = f", from {self.num_bytes} to {now.num_bytes} bytes" if now.num_bytes != self.num_bytes else ""
        raise CheckpointError(
            f"{path} was {what} since it was checked{sizes}: start again when nothing changes the weights any more."
        )
