"""Writing a cache: each encoded clip or caption is saved at once, and committed into shards at the end.

Each is saved as a separate file in `parts/`, so a killed `prepare` loses only those in progress. `commit` builds all
shards in a new folder next to the old one, swaps the folders, and writes the manifest last. Both copies exist until
then, so the first commit needs twice the cache's size on disk. Unchanged shards are linked, not written again.
"""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from io import TextIOWrapper
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from mochi_tune.data.cache import (
    DATA_FOLDER,
    PARTS_FOLDER,
    SHARD_BYTES,
)
from mochi_tune.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest, write_manifest
from mochi_tune.data.parts import Part, PartsFolder, read_part
from mochi_tune.data.row_table import RowTable, row_schema
from mochi_tune.data.rows import (
    CacheSettings,
    Row,
    content_sha256,
    read_latents,
    read_texts,
    shard_schema,
)
from mochi_tune.errors import DataError
from mochi_tune.files import atomic_file, file_sha256, is_elsewhere, lock_file

# Maximum rows of a shard, which matters for tiny clips only: shards of Mochi's own clip sizes have fewer than 300. The
# metadata of an open shard takes 20 kB per row.
SHARD_ROWS = 512
# Seconds until a progress bar is shown: reading and writing a small cache takes less.
BAR_DELAY = 1
_STAGING_FOLDER = "data.new"
_TRASH_FOLDER = "trash"


@dataclass(frozen=True)
class _Shard:
    """A shard on disk; `small` is the arrow table of its columns without the tensors and their checksums."""

    file: Path
    sha256: str
    small: Any

    @property
    def rows(self) -> RowTable:
        return RowTable(self.small.select(row_schema().names))


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a clip or a caption is stored: a row of a shard, and a caption's number `place` in that row."""

    shard: _Shard
    row: int
    place: int = 0

    def value(self, column: str) -> Any:
        return self.shard.small[column][self.row].as_py()


class CacheWriter:
    """Finds everything that was encoded for a cache before, committed or not, and adds what is missing.

    A context manager; holds the cache's lock, which ends with the process. On a disk without locks it continues without
    one, and `is_locked` is False.

    Args:
        folder: The cache.
        share: Name of a share of the work, whose parts go to a separate folder. Writers of different shares may run at
            the same time; none of them commits.

    Raises:
        DataError: Another `prepare` is writing to the cache, or one of its files is damaged.
    """

    def __init__(self, folder: Path, share: str = ""):
        self.folder = Path(folder)
        self.share = share
        self.parts = PartsFolder(self.folder / PARTS_FOLDER / share)
        self.is_locked = True
        self._latents: dict[str, Part | _Stored] = {}
        self._texts: dict[str, Part | _Stored] = {}
        self._manifest: Manifest | None = None
        self._shards: list[_Shard] = []

    def __enter__(self) -> "CacheWriter":
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"data.cache={self.folder} is a file: name a folder.")
        for name in (PARTS_FOLDER, DATA_FOLDER):
            if is_elsewhere(self.folder / name):
                raise DataError(
                    f"{self.folder / name} is a link or a mount point, but `prepare` renames and removes this folder: "
                    f"put the whole cache on one disk; data.cache={self.folder} itself may be a link."
                )
        self.parts.folder.mkdir(parents=True, exist_ok=True)
        whose = f"another `mochi-tune prepare` is writing to the cache {self.folder}"
        self._locks = [self._lock(self.folder, fcntl.LOCK_SH if self.share else fcntl.LOCK_EX, whose)]
        if self.share:
            whose = f"another `mochi-tune prepare` is writing the share {self.share} of the cache {self.folder}"
            self._locks.append(self._lock(self.parts.folder, fcntl.LOCK_EX, whose))
        self._clear_leftovers()
        self._find_parts()
        self._find_shards()
        return self

    def __exit__(self, *_: object) -> None:
        parts = self.folder / PARTS_FOLDER
        if not self.share and parts.is_dir() and not any(parts.iterdir()):
            parts.rmdir()
        for lock in self._locks:
            lock.close()

    def _lock(self, folder: Path, kind: int, whose: str) -> TextIOWrapper:
        # NFS needs a readable file for a shared lock and a writable one for an exclusive lock.
        lock = (folder / ".lock").open("a+")
        try:
            self.is_locked &= lock_file(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise DataError(f"{whose}: wait for it, or stop it.") from None
        return lock

    def _clear_leftovers(self) -> None:
        folders = [self.parts.folder]
        if not self.share:
            data, trash = self.folder / DATA_FOLDER, self.folder / _TRASH_FOLDER
            if (trash / DATA_FOLDER).is_dir() and not data.exists():
                # `commit` was killed between its two renames: the old shards are the only ones.
                os.rename(trash / DATA_FOLDER, data)
            for folder in (trash, self.folder / _STAGING_FOLDER):
                if folder.exists():
                    shutil.rmtree(folder)
            folders += [self.folder, *(folder for folder in self.parts.folder.iterdir() if folder.is_dir())]
        for folder in folders:
            for file in folder.glob("*.tmp"):
                file.unlink()

    def _find_parts(self) -> None:
        parts = self.folder / PARTS_FOLDER
        files = sorted([*parts.glob("*.safetensors"), *parts.glob("*/*.safetensors")])
        for file in tqdm(files, desc="reading the parts", unit="part", delay=BAR_DELAY):
            self.take_part(file)

    def take_part(self, file: Path) -> None:
        """Adds a part that another process has encoded.

        Raises:
            DataError: It is damaged.
        """
        kind, key = file.stem.split("-")
        (self._latents if kind == "latents" else self._texts)[key] = read_part(file)

    def _find_shards(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._manifest = manifest = read_manifest(self.folder)
        recorded = {shard.file: shard.sha256 for shard in manifest.shards} if manifest else {}
        columns = [*row_schema().names, "latent_shape", "num_tokens", "text_width", "caption_tokens", "clip_report"]
        files = sorted((self.folder / DATA_FOLDER).glob("*.parquet"))
        for file, sha256 in zip(files, _hash_all(files), strict=True):
            # Without a manifest (killed during a commit) a shard is still complete: it was synced before its rename.
            if manifest is not None and recorded.get(f"{DATA_FOLDER}/{file.name}") != sha256:
                continue
            try:
                with pq.ParquetFile(file) as shard:
                    if not shard.schema_arrow.equals(shard_schema()):
                        continue
                    # Each row group is a chunk of one row until the chunks are combined.
                    small = shard.read(columns=columns).combine_chunks()
            except pa.ArrowInvalid:
                continue
            self._add_shard(_Shard(file, sha256, small))

    def _add_shard(self, shard: _Shard) -> None:
        self._shards.append(shard)
        for number, (clip_key, text_keys) in enumerate(shard.rows.tuples("clip_key", "text_keys")):
            self._latents.setdefault(clip_key, _Stored(shard, number))
            for place, key in enumerate(text_keys):
                self._texts.setdefault(key, _Stored(shard, number, place))

    @property
    def other_version(self) -> str:
        """Says that another version wrote the committed cache, of which nothing is reused; "" otherwise."""
        return self._manifest.other_version if self._manifest else ""

    def has_latents(self, clip_key: str) -> bool:
        """Whether a clip's latents were encoded before."""
        return clip_key in self._latents

    def has_text(self, text_key: str) -> bool:
        """Whether a caption's features were encoded before."""
        return text_key in self._texts

    def clip_report(self, clip_key: str) -> dict[str, Any]:
        """Returns the `clip_report` that was passed to `put_latents`."""
        where = self._latents[clip_key]
        return where.info if isinstance(where, Part) else json.loads(where.value("clip_report"))

    def token_counts(self, text_key: str) -> tuple[int, int]:
        """Returns a caption's number of tokens after and before truncation to the maximum prompt length."""
        where = self._texts[text_key]
        if isinstance(where, Part):
            return where.info["num_tokens"], where.info["caption_tokens"]
        return where.value("num_tokens")[where.place], where.value("caption_tokens")[where.place]

    def _num_bytes(self, row: Row) -> int:
        """Returns the size of a row's tensors."""
        where = self._latents[row.clip_key]
        size = where.num_bytes if isinstance(where, Part) else 2 * 4 * math.prod(where.value("latent_shape"))
        for text in map(self._texts.__getitem__, row.text_keys):
            if isinstance(text, Part):
                size += text.num_bytes
            else:
                size += 4 * text.value("num_tokens")[text.place] * text.value("text_width")
        return size

    def put_latents(self, clip_key: str, mean: torch.Tensor, logvar: torch.Tensor, clip_report: dict[str, Any]) -> None:
        """Saves a clip's posterior, fp32 (C, T, h, w) on the CPU, and its report, and syncs them to disk."""
        self._latents[clip_key] = self.parts.put_latents(clip_key, mean, logvar, clip_report)

    def put_text(self, text_key: str, prompt_embeds: torch.Tensor, caption_tokens: int) -> None:
        """Saves a caption's features, fp32 (num_tokens, text_width), and its token count before truncation."""
        self._texts[text_key] = self.parts.put_text(text_key, prompt_embeds, caption_tokens)

    def commit(self, rows: Iterable[Row], settings: CacheSettings, shard_bytes: int = SHARD_BYTES) -> bool:
        """Replaces the content of the cache by these rows; does nothing if the cache has exactly them.

        Args:
            rows: At least one; their latents and features are encoded.
            settings: With which they were encoded.
            shard_bytes: Maximum size of a shard of several clips.

        Returns:
            Whether anything was written.
        """
        rows = sorted(rows, key=attrgetter("sample_id"))
        assert rows and not self.share
        parts, data, trash = (self.folder / name for name in (PARTS_FOLDER, DATA_FOLDER, _TRASH_FOLDER))
        if self._is_committed(rows, settings):
            shutil.rmtree(parts)
            return False
        shards = self._stage(rows, shard_bytes)
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        trash.mkdir()
        if data.exists():
            os.rename(data, trash / DATA_FOLDER)
        os.rename(self.folder / _STAGING_FOLDER, data)
        # Remove the parts before the manifest is written: both together mean an unfinished prepare.
        shutil.rmtree(parts)
        write_manifest(self.folder, settings, shards)
        shutil.rmtree(trash)
        return True

    def _is_committed(self, rows: list[Row], settings: CacheSettings) -> bool:
        manifest = self._manifest
        if manifest is None or manifest.other_version or manifest.settings != asdict(settings):
            return False
        return len(self._shards) == len(manifest.shards) and self._holds(rows)

    def _holds(self, rows: Sequence[Row]) -> bool:
        """Whether the shards hold exactly these rows, which are sorted."""
        import pyarrow as pa

        if sum(len(shard.rows) for shard in self._shards) != len(rows):
            return False
        found, _ = RowTable(pa.concat_tables([shard.rows.table for shard in self._shards])).sorted()
        return found == RowTable.from_rows(rows)

    def _stage(self, rows: list[Row], shard_bytes: int) -> list[tuple[ShardEntry, Sequence[Row]]]:
        """Builds all shards in the staging folder and returns them with their rows, for the manifest."""
        staging = self.folder / _STAGING_FOLDER
        staging.mkdir()
        open_rows = set(rows)
        done: list[tuple[Path, str, Sequence[Row]]] = []
        for shard in self._shards:
            # Small shards are packed again: adding clips one by one would leave a shard for each.
            is_large = shard.file.stat().st_size >= shard_bytes // 2 or len(shard.rows) >= SHARD_ROWS
            if is_large and open_rows.issuperset(shard.rows):
                open_rows.difference_update(shard.rows)
                done.append((_link(shard.file, staging / f"{len(done)}.parquet"), shard.sha256, shard.rows))
        with tqdm(total=len(open_rows), desc="writing the cache", unit="clip", delay=BAR_DELAY) as bar:
            for batch in self._batches([row for row in rows if row in open_rows], shard_bytes):
                file = staging / f"{len(done)}.parquet"
                with atomic_file(file, durable=True) as temporary:
                    self._write_shard(temporary, batch, bar)
                done.append((file, file_sha256(file), RowTable.from_rows(batch)))
        entries = []
        for number, (file, sha256, shard_rows) in enumerate(done):
            name = f"train-{number:05d}-of-{len(done):05d}.parquet"
            size = file.rename(staging / name).stat().st_size
            entries.append((ShardEntry(f"{DATA_FOLDER}/{name}", size, sha256, len(shard_rows)), shard_rows))
        return entries

    def _batches(self, rows: list[Row], shard_bytes: int) -> Iterable[list[Row]]:
        batch: list[Row] = []
        size = 0
        for row in rows:
            row_bytes = self._num_bytes(row)
            if batch and (size + row_bytes > shard_bytes or len(batch) == SHARD_ROWS):
                yield batch
                batch, size = [], 0
            batch.append(row)
            size += row_bytes
        if batch:
            yield batch

    def _read_latents(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and logvar, from a part or a shard."""
        import pyarrow.parquet as pq

        where = self._latents[row.clip_key]
        if isinstance(where, Part):
            with safe_open(where.file, framework="pt") as part:
                return part.get_tensor("mean"), part.get_tensor("logvar")
        with pq.ParquetFile(where.shard.file, memory_map=True) as shard:
            return read_latents(shard, where.row)

    def _read_text(self, key: str) -> torch.Tensor:
        """Returns a caption's features, from a part or a shard."""
        import pyarrow.parquet as pq

        where = self._texts[key]
        if isinstance(where, Part):
            with safe_open(where.file, framework="pt") as part:
                return part.get_tensor("prompt_embeds")
        with pq.ParquetFile(where.shard.file, memory_map=True) as shard:
            return read_texts(shard, where.row)[where.place]

    def _write_shard(self, file: Path, rows: list[Row], bar: tqdm) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # Latents do not compress. One row group per clip makes each clip one read.
        with pq.ParquetWriter(file, shard_schema(), compression="none", use_dictionary=False) as writer:
            for row in rows:
                mean, logvar = self._read_latents(row)
                texts = [self._read_text(key) for key in row.text_keys]
                values = asdict(row) | {"bucket": list(astuple(row.bucket))}
                counts = [self.token_counts(key) for key in row.text_keys]
                values["num_tokens"], values["caption_tokens"] = zip(*counts, strict=True)
                values["clip_report"] = json.dumps(self.clip_report(row.clip_key))
                values["text_width"] = texts[0].shape[1]
                values["content_sha256"] = content_sha256(mean, logvar, texts)
                values["latent_shape"] = list(mean.shape)
                columns = {name: pa.array([value], shard_schema().field(name).type) for name, value in values.items()}
                for name, tensor in (("mean", mean), ("logvar", logvar), ("prompt_embeds", torch.cat(texts))):
                    columns[name] = _list_of_floats(tensor)
                arrays = [columns[field.name] for field in shard_schema()]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=shard_schema()))
                bar.update()


def _hash_all(files: list[Path]) -> Iterator[str]:
    """Yields the sha256 of each file; shows a progress bar if that takes a while."""
    sizes = [file.stat().st_size for file in files]
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "delay": BAR_DELAY}
    with tqdm(total=sum(sizes), desc="checking the cache", **options) as bar:
        for file, size in zip(files, sizes, strict=True):
            yield file_sha256(file)
            bar.update(size)


def _list_of_floats(tensor: torch.Tensor) -> Any:
    import pyarrow as pa

    values = pa.array(tensor.reshape(-1).numpy())
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _link(source: Path, target: Path) -> Path:
    try:
        os.link(source, target)
    except OSError:
        # The file system has no hard links.
        shutil.copy2(source, target)
    return target
