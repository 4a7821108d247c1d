"""Reads the shards of a cache, with few files open and few tables in memory however many there are."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mochi_tune.data.rows import shard_schema
from mochi_tune.errors import DataError

# Maximum rows of the tables in memory. A shard's table takes 19 kB per row; reading it again takes 30 µs per row.
MAX_TABLE_ROWS = 4096
# Minimum number of tables in memory: earlier versions made large shards of tiny clips, which take seconds to read.
MIN_OPEN = 8


class Shards:
    """The shards of a cache, all mapped into memory when the first one is read.

    If `prepare` replaces the cache meanwhile, the maps still read the old files.

    Args:
        folder: the cache.
        files: paths of the shards in it.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._folder, self._files = folder, files
        self._maps: dict[str, Any] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps cannot be sent to another process.
        return self.__dict__ | {"_maps": {}, "_open": OrderedDict()}

    def open(self, file: str) -> Any:
        """Returns a shard's `pyarrow.parquet.ParquetFile`; the most recently used ones stay open.

        Raises:
            DataError: the shard is damaged.
            OSError: a disk error, or too many open files.
        """
        if not self._maps:
            self._maps = {each: _map(self._folder / each) for each in self._files}
        if file not in self._open:
            self._open[file] = self._parse(file)
        self._open.move_to_end(file)
        while len(self._open) > MIN_OPEN and sum(map(_num_rows, self._open.values())) > MAX_TABLE_ROWS:
            self._open.popitem(last=False)
        return self._open[file]

    def _parse(self, file: str) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            shard = pq.ParquetFile(self._maps[file])
            is_ours = shard.schema_arrow.equals(shard_schema())
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # The disk or this process failed; the content of the file may be intact.
            raise damaged_shard(self._folder / file, str(error)) from error
        if not is_ours:
            raise damaged_shard(self._folder / file, "its columns are not those of a shard")
        return shard


def _num_rows(shard: Any) -> int:
    return shard.metadata.num_rows


def damaged_shard(path: Path, why: str) -> DataError:
    """Builds the error for a damaged shard."""
    return DataError(
        f"{path} is damaged ({' '.join(why.split())}): delete it and run `mochi-tune prepare` again, "
        "which encodes its clips again; data.damaged=quarantine continues without such clips, but not with "
        "parallel.context or zero3."
    )


def _map(path: Path) -> Any:
    """Maps a file into memory as a `pyarrow.Buffer`."""
    import pyarrow as pa

    try:
        # Unlike Python's and arrow's maps, this one keeps no file open: a process may have 1024 open files.
        return pa.py_buffer(torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8).numpy())
    except RuntimeError:
        # The file is empty or unreadable, or private maps are not allowed: arrow's map works or reports the reason.
        return pa.memory_map(str(path)).read_buffer()
