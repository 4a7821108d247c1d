"""The on-disk contract between `prepare` and `train`: what a cache holds, and reading it.

A cache is one folder:

- `data/train-00000-of-0000N.parquet`: one row a clip, one row a row group; `datasets.load_dataset(folder)` reads it.
- `manifest.json`: the settings, and each shard's size, checksum and rows. It is written last: no manifest, no cache.
- `report.csv`: for every input, whether it was kept, and why not.
- `parts/`: what a running or killed `prepare` has encoded and not yet committed.
"""

import errno
import hashlib
import json
import re
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import torch

from mochi_tune.errors import DataError
from mochi_tune.files import parse_object
from mochi_tune.models.latents import latent_shape

SCHEMA_VERSION = 2
# Large enough to read at disk speed, small enough that a changed caption rewrites little.
SHARD_BYTES = 256 * 2**20
DATA_FOLDER = "data"
PARTS_FOLDER = "parts"
MANIFEST_NAME = "manifest.json"
REPORT_NAME = "report.csv"
# A manifest that names any other file was not written by `prepare`, and may point anywhere.
_SHARD_FILE = re.compile(rf"{DATA_FOLDER}/train-\d{{5,}}-of-\d{{5,}}\.parquet")


@dataclass(frozen=True)
class CacheSettings:
    """Everything besides videos and captions that decides what is encoded.

    Args:
        transform: What is cut out of a clip: JSON values, including `num_frames`, `height` and `width`.
        vae: Fingerprint of the VAE encoder's weights.
        vae_dtype: Precision that it runs in, "bf16" or "fp32".
        t5: Fingerprint of the text encoder's weights.
        t5_dtype: Precision that it runs in.
    """

    transform: dict[str, Any]
    vae: str
    vae_dtype: str
    t5: str
    t5_dtype: str


@dataclass(frozen=True, order=True)
class Row:
    """One clip of a cache: its source, and the keys of its latents and text features.

    Args:
        path: Path of the video, relative to the folder of videos.
        caption: Text as it was encoded.
        source_sha256: Hash of the video's bytes.
        clip_key: Hash of all that the latents depend on: source, transform and VAE.
        text_key: Hash of all that the text features depend on: caption and T5.
    """

    path: str
    caption: str
    source_sha256: str
    clip_key: str
    text_key: str


def make_row(path: str, caption: str, source_sha256: str, settings: CacheSettings) -> Row:
    """Builds a clip's row; a key changes exactly when its latents or its features would."""
    clip_key = _digest("clip", source_sha256, settings.transform, settings.vae, settings.vae_dtype)
    text_key = _digest("text", caption, settings.t5, settings.t5_dtype)
    return Row(path, caption, source_sha256, clip_key, text_key)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, *values], sort_keys=True).encode()).hexdigest()


def shard_schema() -> Any:
    """Returns the arrow schema of a shard; a change to it needs a new SCHEMA_VERSION."""
    import pyarrow as pa

    floats = pa.list_(pa.float32())
    return pa.schema(
        [
            ("path", pa.string()),
            ("caption", pa.string()),
            ("source_sha256", pa.string()),
            ("clip_key", pa.string()),
            ("text_key", pa.string()),
            ("latent_shape", pa.list_(pa.int32())),  # C, T, h, w
            ("mean", floats),  # flattened latent_shape
            ("logvar", floats),
            ("prompt_embeds", floats),  # flattened (num_tokens, text_width): the valid tokens only
            ("num_tokens", pa.int32()),
            ("text_width", pa.int32()),
            ("caption_tokens", pa.int32()),  # before the cut to num_tokens
            ("clip_report", pa.string()),  # JSON: how the clip was cut
            ("content_sha256", pa.string()),  # of mean, logvar and prompt_embeds; compared at every reading
        ]
    )


def read_latents(shard: Any, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads one clip's posterior from an open shard.

    Args:
        shard: A `pyarrow.parquet.ParquetFile`.
        row: Row in it, from 0.

    Returns:
        mean and logvar in the VAE's space, fp32 (C, T, h, w).
    """
    table = shard.read_row_group(row, columns=["latent_shape", "mean", "logvar"], use_threads=False)
    shape = tuple(int(size) for size in table.column("latent_shape").chunk(0).values.to_numpy())
    return _floats(table, "mean").view(shape), _floats(table, "logvar").view(shape)


def read_text(shard: Any, row: int) -> torch.Tensor:
    """Reads one caption's features from an open shard: fp32 (num_tokens, text_width), valid tokens only."""
    table = shard.read_row_group(row, columns=["prompt_embeds", "num_tokens", "text_width"], use_threads=False)
    return _floats(table, "prompt_embeds").view(table["num_tokens"][0].as_py(), table["text_width"][0].as_py())


def content_sha256(mean: torch.Tensor, logvar: torch.Tensor, prompt_embeds: torch.Tensor) -> str:
    """Returns the hex sha256 of what a clip's row holds, fp32 tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in (mean, logvar, prompt_embeds):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _floats(table: Any, column: str) -> torch.Tensor:
    # Copied once, straight out of the arrow buffer: that one is read-only, which torch does not take.
    return torch.from_numpy(table.column(column).chunk(0).values.to_numpy(zero_copy_only=True).copy())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a committed cache, or None where it is missing or incomplete."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    manifest = parse_object(path.read_bytes())
    return manifest if manifest is not None and manifest.get("complete") is True and _fits(manifest) else None


def _fits(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has what this version reads, or is another version's."""
    if manifest.get("schema_version") != SCHEMA_VERSION:
        return "schema_version" in manifest
    settings, shards = manifest.get("settings"), manifest.get("shards")
    return (
        _has(settings, CacheSettings)
        and isinstance(settings["transform"], dict)
        and isinstance(shards, list)
        and all(
            isinstance(shard, dict)
            and isinstance(shard.get("file"), str)
            and isinstance(shard.get("bytes"), int)
            and isinstance(shard.get("sha256"), str)
            and isinstance(shard.get("rows"), list)
            and all(_has(row, Row) and all(isinstance(value, str) for value in row.values()) for row in shard["rows"])
            for shard in shards
        )
    )


def _has(value: Any, kind: type) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and value.keys() == {field.name for field in fields(kind)}


class Cache:
    """A committed cache, open for reading; its clips are sorted by path, whatever shard they are in.

    Can be used by several data loading processes: each opens the shards for itself.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.settings = CacheSettings(**manifest["settings"])
        located = [
            (Row(**row), shard["file"], number)
            for shard in manifest["shards"]
            for number, row in enumerate(shard["rows"])
        ]
        located.sort(key=lambda item: item[0].path)
        self.rows = [row for row, _, _ in located]
        self._locations = [(file, number) for _, file, number in located]
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_open": {}, "_lock": threading.Lock()}

    @property
    def fingerprint(self) -> str:
        """Changes when any clip, caption, transform or encoder of this cache does."""
        return _digest([(row.path, row.clip_key, row.text_key) for row in self.rows])

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """Reads one clip: mean and logvar fp32 (C, T, h, w), prompt_embeds fp32 (num_tokens, text_width).

        Raises:
            DataError: A shard is damaged, the clip's row is not what was written, or it is no posterior and features
                of these settings.
        """
        file, number = self._locations[index]
        path = self.rows[index].path
        try:
            with self._lock:  # A shard's reader must not be used by two threads at once.
                item, written = self._read(file, number)
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise self._damaged(file, f"{path}: {error}") from error
        expected = latent_shape(*(self.settings.transform[name] for name in ("num_frames", "height", "width")))
        if not item["mean"].shape == item["logvar"].shape == expected:
            raise self._damaged(file, f"{path} has latents {tuple(item['mean'].shape)}, not {expected}")
        for name, tensor in item.items():
            if not bool(tensor.isfinite().all()):
                raise self._damaged(file, f"the {name} of {path} holds NaN or infinity")
        if content_sha256(**item) != written:
            raise self._damaged(file, f"{path} is not what was written")
        return item

    def text_width(self) -> int:
        """Returns the width of the text features.

        Raises:
            DataError: The first clip's shard is damaged.
        """
        file, number = self._locations[0]
        try:
            return self._shard(file).read_row_group(number, columns=["text_width"])["text_width"][0].as_py()
        except (ValueError, RuntimeError, LookupError) as error:
            raise self._damaged(file, str(error)) from error

    def _read(self, file: str, number: int) -> tuple[dict[str, torch.Tensor], str]:
        shard = self._shard(file)
        mean, logvar = read_latents(shard, number)
        written = shard.read_row_group(number, columns=["content_sha256"], use_threads=False)["content_sha256"][0]
        return {"mean": mean, "logvar": logvar, "prompt_embeds": read_text(shard, number)}, written.as_py()

    def _shard(self, file: str) -> Any:
        if not self._open:
            # All at once: should `prepare` replace the cache meanwhile, the old files stay readable through these.
            self._open = {file: self._open_shard(file) for file in {file for file, _ in self._locations}}
        return self._open[file]

    def _open_shard(self, file: str) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            shard = pq.ParquetFile(self.folder / file, memory_map=True)
            is_ours = shard.schema_arrow.equals(shard_schema())
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # The disk or this process failed; the file's content may be right.
            raise self._damaged(file, str(error)) from error
        if not is_ours:
            raise self._damaged(file, "its columns are others than those of a shard")
        return shard

    def _damaged(self, file: str, why: str) -> DataError:
        return DataError(
            f"{self.folder / file} is damaged ({' '.join(why.split())}): delete it and run `mochi-tune prepare` again, "
            "which encodes its clips anew; data.damaged=quarantine goes on without such clips."
        )


def open_cache(
    folder: Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    vae_fingerprint: str | None = None,
    t5_fingerprint: str | None = None,
) -> Cache:
    """Opens a cache for training; refuses one that is incomplete or was made for other settings.

    Args:
        folder: The cache.
        num_frames: Pixel frames of a clip, 6k+1.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        vae_fingerprint: Of the encoder that the DiT belongs to; None where its weights are not available.
        t5_fingerprint: Of the text encoder for prompts; None where its weights are not available.

    Raises:
        DataError: No cache there, one that `prepare` has not finished, a shard that is missing or cut off,
            or a cache made for other settings.
    """
    folder = Path(folder)
    cache = Cache(folder, _complete_manifest(folder))
    wanted: dict[str, Any] = {"num_frames": num_frames, "height": height, "width": width}
    found: dict[str, Any] = {name: cache.settings.transform.get(name) for name in wanted}
    for name, fingerprint in (("vae", vae_fingerprint), ("t5", t5_fingerprint)):
        if fingerprint is not None:
            wanted[f"{name} weights"] = fingerprint[:12]
            found[f"{name} weights"] = getattr(cache.settings, name)[:12]
    # Weights are identified by their files, so the official and the diffusers layout of the same ones differ.
    layout = ": other weights, or the same in another file layout"
    differences = [
        f"{name}: the cache has {found[name]}, the config wants {wanted[name]}{layout * name.endswith(' weights')}"
        for name in wanted
        if found[name] != wanted[name]
    ]
    if differences:
        raise DataError(
            f"the cache {folder} was made for other settings ({'; '.join(differences)}): "
            "run `mochi-tune prepare` with this config, or name another folder in data.cache."
        )
    return cache


def _complete_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    again = "run `mochi-tune prepare` again, it goes on from there"
    parts = folder / PARTS_FOLDER
    if parts.is_dir() and any(parts.iterdir()):
        raise DataError(f"the cache {folder} is incomplete: `mochi-tune prepare` was stopped before its end: {again}.")
    if manifest is None:
        if (folder / DATA_FOLDER).is_dir():
            raise DataError(f"the cache {folder} is incomplete, it has no complete {MANIFEST_NAME}: {again}.")
        raise DataError(f"there is no cache in {folder}: run `mochi-tune prepare` first.")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"the cache {folder} has schema version {manifest['schema_version']}, this version reads "
            f"{SCHEMA_VERSION}: run `mochi-tune prepare` again."
        )
    missing = []
    for shard in manifest["shards"]:
        if not _SHARD_FILE.fullmatch(shard["file"]):
            raise DataError(
                f"the cache {folder} is not one of `mochi-tune prepare`: its {MANIFEST_NAME} names {shard['file']!a}, "
                f"which is no shard in {DATA_FOLDER}/: make the cache again, from the videos."
            )
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            missing.append(f"{shard['file']} is missing")
        elif size != shard["bytes"]:
            missing.append(f"{shard['file']} has {size} of {shard['bytes']} bytes")
    if missing:
        raise DataError(f"the cache {folder} is incomplete ({'; '.join(missing)}): {again}.")
    return manifest


def manifest_of(settings: CacheSettings, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Builds the manifest of a cache; `shards` hold file, bytes, sha256 and rows each."""
    return {"schema_version": SCHEMA_VERSION, "complete": True, "settings": asdict(settings), "shards": shards}
