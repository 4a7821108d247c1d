"""Reads and writes `manifest.json` of a cache: its settings, and each shard's file, size, checksum and rows."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mochi_tune.data.row_table import RowBuilder, RowTable
from mochi_tune.data.rows import SCHEMA_VERSION, CacheSettings, Row, has_fields, is_row
from mochi_tune.files import atomic_file

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the manifest: its path in the cache, size, hex sha256 and number of rows."""

    file: str
    num_bytes: int
    sha256: str
    num_rows: int


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        schema_version: of the program that wrote it. If it is not SCHEMA_VERSION, the other attributes are empty.
        settings: as JSON values.
        shards: in order.
        rows: of all shards, in the order of the shards.
    """

    schema_version: Any
    settings: dict[str, Any]
    shards: list[ShardEntry]
    rows: RowTable

    @property
    def other_version(self) -> str:
        """Says that another version of the program wrote the cache; "" if this one reads it."""
        if self.schema_version == SCHEMA_VERSION:
            return ""
        layout = f"layout {self.schema_version}, this one reads {SCHEMA_VERSION}"
        return f"was written by another version of mochi-tune ({layout})"


class _RowNumber(int):
    """Placeholder for a row in the parsed JSON."""


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the manifest of a committed cache, or None if it is missing or incomplete."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    builder = RowBuilder()

    def keep_row(values: dict[str, Any]) -> Any:
        if not is_row(values):
            return values
        builder.append(values)
        return _RowNumber(builder.num_rows - 1)

    try:
        # Move each row into columns while parsing: the JSON objects of all rows would take much memory.
        values = json.loads(path.read_bytes(), object_hook=keep_row)
        rows = builder.table()
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or values.get("complete") is not True or "schema_version" not in values:
        return None
    if values["schema_version"] != SCHEMA_VERSION:
        return Manifest(values["schema_version"], {}, [], RowBuilder().table())
    if not _fits(values, len(rows)):
        return None
    shards = [ShardEntry(each["file"], each["bytes"], each["sha256"], len(each["rows"])) for each in values["shards"]]
    return Manifest(SCHEMA_VERSION, values["settings"], shards, rows)


def _fits(values: dict[str, Any], num_rows: int) -> bool:
    """Whether a manifest has the fields and types that this version reads, and its rows are inside shards."""
    settings, shards = values.get("settings"), values.get("shards")
    return (
        has_fields(settings, CacheSettings)
        and isinstance(settings["transform"], dict)
        and isinstance(shards, list)
        and all(
            isinstance(shard, dict)
            and isinstance(shard.get("file"), str)
            and isinstance(shard.get("bytes"), int)
            and isinstance(shard.get("sha256"), str)
            and isinstance(shard.get("rows"), list)
            and all(isinstance(row, _RowNumber) for row in shard["rows"])
            for shard in shards
        )
        and [row for shard in shards for row in shard["rows"]] == list(range(num_rows))
    )


def write_manifest(folder: Path, settings: CacheSettings, shards: Iterable[tuple[ShardEntry, Sequence[Row]]]) -> None:
    """Writes the manifest of a cache atomically, one shard at a time."""
    values = {"schema_version": SCHEMA_VERSION, "complete": True, "settings": asdict(settings), "shards": []}
    head, tail = json.dumps(values, indent=1).rsplit("[]", 1)
    with atomic_file(folder / MANIFEST_NAME, durable=True) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(head + "[")
        for number, (shard, rows) in enumerate(shards):
            entry = {"file": shard.file, "bytes": shard.num_bytes, "sha256": shard.sha256}
            text = json.dumps(entry | {"rows": [row.to_json() for row in rows]}, indent=1)
            # Indenting is safe: JSON escapes line ends inside strings.
            file.write(("," if number else "") + "\n" + textwrap.indent(text, "  "))
        file.write("\n ]" + tail)
