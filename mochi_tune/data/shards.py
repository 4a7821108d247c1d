"""The shards of a cache, open for reading: however many there are, few files are open and few tables in memory."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mochi_tune.data.rows import shard_schema
from mochi_tune.errors import DataError

# A shard's own table takes 19 kB for each row, and 30 µs to read it again where it was dropped.
MAX_TABLE_ROWS = 4096
# Few large ones, which earlier versions made of tiny clips, would take seconds to read again.
MIN_OPEN = 8


class Shards:
    """Shards that are mapped into memory, all at once when the first one is read.

    Should `prepare` replace the cache meanwhile, the old files stay readable through the maps.

    Args:
        folder: the cache.
        files: of the shards, in it.
    """

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self._folder, self._files = folder, files
        self._maps: dict[str, Any] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Maps belong to a process.
        return self.__dict__ | {"_maps": {}, "_open": OrderedDict()}

    def open(self, file: str) -> Any:
        """Returns a shard's `pyarrow.parquet.ParquetFile`; those that were asked for last stay open.

        Raises:
            DataError: it is damaged.
            OSError: the disk, or this process, refuses.
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
                raise  # The disk or this process failed; the file's content may be right.
            raise damaged_shard(self._folder / file, str(error)) from error
        if not is_ours:
            raise damaged_shard(self._folder / file, "its columns are others than those of a shard")
        return shard


def _num_rows(shard: Any) -> int:
    return shard.metadata.num_rows


def damaged_shard(path: Path, why: str) -> DataError:
    """Builds the error of a shard that is damaged."""
    return DataError(
        f"{path} is damaged ({' '.join(why.split())}): delete it and run `mochi-tune prepare` again, "
        "which encodes its clips anew; data.damaged=quarantine goes on without such clips."
    )


def _map(path: Path) -> Any:
    """Maps a file into memory as a `pyarrow.Buffer`."""
    import pyarrow as pa

    try:
        # Unlike Python's and arrow's own maps this one keeps no file open: a process may have 1024 of them.
        return pa.py_buffer(torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8).numpy())
    except RuntimeError:
        # Empty, unreadable, or on a machine that does not grant private maps: arrow's map works, or says why not.
        return pa.memory_map(str(path)).read_buffer()
