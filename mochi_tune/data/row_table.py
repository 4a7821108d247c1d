"""Rows in arrow columns, in a third of the memory of Python objects; `Row` objects are built when they are read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, overload

import numpy as np

from mochi_tune.data.rows import Row, shard_schema

# Number of rows that are converted to objects at a time.
_BLOCK_ROWS = 1024


class RowTable(Sequence[Row]):
    """Rows, read as a sequence of `Row` or column by column.

    Args:
        table: a `pyarrow.Table` with the columns of `row_schema`.
    """

    def __init__(self, table: Any) -> None:
        self.table = table

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> "RowTable":
        """Builds a table of rows."""
        builder = RowBuilder()
        for row in rows:
            builder.append(row.to_json())
        return builder.table()

    def sorted(self) -> "tuple[RowTable, np.ndarray]":
        """Returns the rows by ascending sample_id, and the index of each in this table."""
        names = self.column("sample_id")
        order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        # Most tables are sorted already; a copy takes time and memory.
        is_sorted = np.array_equal(order, np.arange(len(names)))
        return self if is_sorted else RowTable(self.table.take(order)), order

    def column(self, name: str) -> list[Any]:
        """Returns one field of all rows, as JSON values."""
        return self.table[name].to_pylist()

    def tuples(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yields fields of each row, as JSON values; converts _BLOCK_ROWS rows at a time."""
        for block in self._blocks():
            yield from zip(*(block[name].to_pylist() for name in names), strict=True)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        return Row.from_json(self.table.slice(numbers, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Row]:
        for block in self._blocks():
            yield from map(Row.from_json, block.to_pylist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RowTable):
            return self.table.equals(other.table)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _blocks(self) -> Iterator[Any]:
        for start in range(0, len(self), _BLOCK_ROWS):
            yield self.table.slice(start, _BLOCK_ROWS)


class RowBuilder:
    """Builds a `RowTable` from rows in JSON values."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._values: list[dict[str, Any]] = []
        self._batches: list[Any] = []

    def append(self, values: dict[str, Any]) -> None:
        """Adds a row for which `is_row` is true.

        Raises:
            ValueError: a column cannot hold a number or a text.
        """
        self._values.append(values)
        self.num_rows += 1
        if len(self._values) == _BLOCK_ROWS:
            self._flush()

    def table(self) -> RowTable:
        """Returns the table of all rows that were added.

        Raises:
            ValueError: as `append`.
        """
        import pyarrow as pa

        self._flush()
        return RowTable(pa.Table.from_batches(self._batches, row_schema()))

    def _flush(self) -> None:
        import pyarrow as pa

        try:
            self._batches.append(pa.RecordBatch.from_pylist(self._values, row_schema()))
        except (OverflowError, TypeError, pa.ArrowException) as error:
            raise ValueError(str(error)) from error
        self._values = []


def row_schema() -> Any:
    """Returns the arrow schema of rows: the columns of a shard that are fields of `Row`."""
    import pyarrow as pa

    whole = shard_schema()
    return pa.schema([whole.field(field.name) for field in fields(Row)])
