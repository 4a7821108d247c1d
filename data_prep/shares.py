"""Shares of a `prepare`: each of several runs encodes its share of the files, and a last run merges them.

A share has a folder in the cache's parts with what it has encoded, the scans of its files, and a record of refused
clips.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mochi_tune.data.cache import PARTS_FOLDER, SHARE_LABEL
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data.parts import PartsFolder
from mochi_tune.data.rows import CacheSettings, has_fields
from mochi_tune.data_prep.gather import Clip, Inputs
from mochi_tune.errors import DataError
from mochi_tune.files import parse_object, write_atomic

RECORD_FILE = "record.json"


@dataclass(frozen=True)
class Share:
    """Share `number` of `count`; numbers start at 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Parses a text such as "3/16"."""
        number, _, count = text.partition("/")
        return cls(int(number), int(count))

    @property
    def label(self) -> str:
        """Name of the share's folder."""
        return f"{self.number}-of-{self.count}"

    def has(self, name: str) -> bool:
        """Whether a file belongs to this share; depends on its name only, so that no file must be read."""
        return share_of(name, self.count) == self.number


@dataclass(frozen=True)
class ShareRecord:
    """The record that a share writes when it has finished.

    Attributes:
        label: of the share.
        vae: fingerprint of the VAE encoder's weights.
        t5: fingerprint of the text encoder's weights.
        refused: clip_key and reason of each clip that cannot be decoded, by sample_id.
        parts: names of all parts of the share.
    """

    label: str
    vae: str
    t5: str
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)


def share_of(name: str, count: int) -> int:
    """Returns the number of a file's share, from 1 to `count`."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % count + 1


def keep_share(inputs: Inputs, share: Share) -> None:
    """Removes the files of all other shares from the inputs."""
    for files in (inputs.files, inputs.refused, inputs.unused):
        for name in [name for name in files if not share.has(name)]:
            del files[name]


def write_record(
    cache: CacheWriter, share: Share, clips: Sequence[Clip], bad: Mapping[str, str], settings: CacheSettings
) -> None:
    """Writes the record of a share that has finished.

    Args:
        cache: with everything that was encoded.
        share: of the run.
        clips: of the share.
        bad: why clips are refused, by their sample_id.
        settings: of the cache.
    """
    rows = [clip.row for clip in clips]
    names = {f"latents-{row.clip_key}" for row in rows} | {f"text-{key}" for row in rows for key in row.text_keys}
    made = sorted(name for name in names if cache.parts.path(name).exists())
    refused = {row.sample_id: (row.clip_key, bad[row.sample_id]) for row in rows if row.sample_id in bad}
    record = ShareRecord(share.label, settings.vae, settings.t5, refused, made)
    write_atomic(cache.parts.folder / RECORD_FILE, json.dumps(asdict(record)).encode(), durable=True)


def merge_shares(cache: CacheWriter, clips: Sequence[Clip], settings: CacheSettings) -> dict[str, str]:
    """Checks that the shares have encoded all clips and their captions.

    Args:
        cache: to commit.
        clips: of all shares.
        settings: of the cache.

    Returns:
        Why clips are refused, by their sample_id.

    Raises:
        DataError: clips or captions are missing, or a share had other weights.
    """
    records = _read_records(cache.folder / PARTS_FOLDER)
    for record in records:
        for what, theirs, ours in (("VAE encoder", record.vae, settings.vae), ("T5", record.t5, settings.t5)):
            if theirs != ours:
                raise DataError(
                    f"the {what} of share {record.label} has the fingerprint {theirs[:16]}…, here it is {ours[:16]}…: "
                    "give each machine the same weights, and run that share again."
                )
    _await_parts(cache, records)
    refused = {sample_id: entry for record in records for sample_id, entry in record.refused.items()}
    by_key: dict[str, str] = {}
    missing: dict[str, set[str]] = {}
    for clip in clips:
        row = clip.row
        key, reason = refused.get(row.sample_id, ("", ""))
        if key == row.clip_key and not cache.has_latents(key):
            by_key.setdefault(key, reason)
    for clip in clips:
        row = clip.row
        if row.clip_key not in by_key:
            lacks = {key for key in row.text_keys if not cache.has_text(key)}
            lacks |= set() if cache.has_latents(row.clip_key) else {row.clip_key}
            if lacks:
                missing.setdefault(clip.file.name, set()).update(lacks)
    if missing:
        raise DataError(_name_missing(missing, cache.folder / PARTS_FOLDER))
    return {clip.row.sample_id: by_key[clip.row.clip_key] for clip in clips if clip.row.clip_key in by_key}


def _name_missing(missing: Mapping[str, set[str]], parts: Path) -> str:
    """Returns the error for shares that lack clips or captions."""
    names = [folder.name for folder in parts.iterdir() if SHARE_LABEL.fullmatch(folder.name)]
    if not names:
        return (
            f"no share of {parts.parent} was prepared, {len(missing)} files are missing: run this command with "
            "parallel.shard=1/16 to parallel.shard=16/16 (or another number of shares) first, then with merge."
        )
    # The most frequent count; folders with another count are left from an earlier division.
    count = Counter(int(name.partition("-of-")[2]) for name in names).most_common(1)[0][0]
    lacking: Counter[int] = Counter()
    for name, keys in missing.items():
        lacking[share_of(name, count)] += len(keys)
    lines = []
    for number in sorted(lacking):
        has_ended = (parts / Share(number, count).label / RECORD_FILE).exists()
        state = "has finished without them" if has_ended else "has not finished"
        lines.append(f"parallel.shard={number}/{count} ({lacking[number]}, {state})")
    return (
        f"{len(lacking)} of {count} shares lack clips or captions: wait for those that run, and run this command "
        f"again with {', '.join(lines)}, then with merge."
    )


def _read_records(parts: Path) -> list[ShareRecord]:
    records = []
    for file in sorted(parts.glob(f"*/{RECORD_FILE}")):
        values = parse_object(file.read_bytes())
        # Skip files of other programs: missing parts are reported anyway.
        if values is not None and has_fields(values, ShareRecord):
            records.append(ShareRecord(**values))
    return records


def _await_parts(cache: CacheWriter, records: Sequence[ShareRecord]) -> None:
    """Waits for parts in the records that a network disk does not show yet."""
    for record in records:
        folder = PartsFolder(cache.folder / PARTS_FOLDER / record.label)
        unseen = [name for name in record.parts if not _is_known(cache, name)]
        # Wait for the first one only: if parts were deleted, waiting for each would take long.
        for file in [folder.find(unseen[0]), *map(folder.path, unseen[1:])] if unseen else []:
            if file.exists():
                cache.take_part(file)


def _is_known(cache: CacheWriter, name: str) -> bool:
    kind, key = name.split("-")
    return cache.has_latents(key) if kind == "latents" else cache.has_text(key)
