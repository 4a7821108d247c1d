"""Reading a cache, the files that `prepare` writes and `train` reads.

A cache is one folder:

- `data/train-00000-of-0000N.parquet`: one row per clip and row group; `datasets.load_dataset(folder)` reads it.
- `manifest.json`: the settings, and each shard's size, checksum and rows. It is written last: no manifest, no cache.
- `report.csv`: whether each input was kept, and if not, why.
- `parts/`: what a running or killed `prepare` has encoded and not yet committed.
"""

import errno
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from mochi_tune.data.buckets import Bucket
from mochi_tune.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from mochi_tune.data.rows import (
    CacheSettings,
    Row,
    content_sha256,
    digest,
    digest_list,
    read_latents,
    read_texts,
)
from mochi_tune.data.shards import Shards, damaged_shard
from mochi_tune.errors import DataError
from mochi_tune.models.latents import latent_shape

# Maximum size of a shard. Large enough to read at disk speed, small enough that a changed caption rewrites little.
SHARD_BYTES = 256 * 2**20
DATA_FOLDER = "data"
PARTS_FOLDER = "parts"
REPORT_NAME = "report.csv"
# Name of a share's folder in PARTS_FOLDER.
SHARE_LABEL = re.compile(r"\d+-of-\d+")
# `prepare` names only such files; another manifest may point anywhere.
_SHARD_FILE = re.compile(rf"{DATA_FOLDER}/train-\d{{5,}}-of-\d{{5,}}\.parquet")


class CacheVersionError(DataError):
    """Another version of the program wrote the cache, and this one cannot read it."""


class Cache:
    """A committed cache, open for reading. Clips are sorted by sample_id across all shards.

    Safe to pass to several data loading processes: each opens the shards itself.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.settings = CacheSettings(**manifest.settings)
        self.rows, self._places = manifest.rows.sorted()
        self._files = [shard.file for shard in manifest.shards]
        # Number of each shard's first row, in the order of the manifest.
        self._starts = np.cumsum([0, *(shard.num_rows for shard in manifest.shards)])
        self._shards = Shards(folder, self._files)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def contents(self) -> dict[str, str]:
        """Returns a short hash of each clip's latents and features, by sample_id."""
        rows = self.rows.tuples("sample_id", "clip_key", "text_keys")
        return {sample_id: digest(clip_key, text_keys)[:12] for sample_id, clip_key, text_keys in rows}

    @property
    def fingerprint(self) -> str:
        """Hash that changes when a clip, a caption, the transform or an encoder of the cache changes."""
        return digest_list(self.rows.tuples("sample_id", "clip_key", "text_keys"))

    def read(self, index: int, caption: int = 0) -> dict[str, torch.Tensor]:
        """Reads one clip: mean and logvar fp32 (C, T, h, w), prompt_embeds fp32 (num_tokens, text_width).

        Args:
            index: Number of the clip.
            caption: Number of the caption whose features are returned.

        Raises:
            DataError: A shard is damaged, or the clip's row differs from what was written.
        """
        file, number = self._locate(index)
        row = self.rows[index]
        path = row.sample_id
        try:
            with self._lock:  # Two threads must not use a shard's reader at once.
                mean, logvar, texts, written = self._read(file, number)
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            self._raise_damage(file, f"{path}: ", error)
        if why := _find_damage(row, mean, logvar, texts, written):
            raise damaged_shard(self.folder / file, why)
        return {"mean": mean, "logvar": logvar, "prompt_embeds": texts[caption]}

    def text_width(self) -> int:
        """Returns the width of the text features.

        Raises:
            DataError: The first clip's shard is damaged.
        """
        file, number = self._locate(0)
        try:
            return self._shards.open(file).read_row_group(number, columns=["text_width"])["text_width"][0].as_py()
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            self._raise_damage(file, "", error)

    def _raise_damage(self, file: str, what: str, error: Exception) -> NoReturn:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise error
        raise damaged_shard(self.folder / file, f"{what}{error}") from error

    def _read(self, file: str, number: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], dict[str, Any]]:
        shard = self._shards.open(file)
        mean, logvar = read_latents(shard, number)
        names = ["clip_key", "text_keys", "content_sha256"]
        written = shard.read_row_group(number, columns=names, use_threads=False).to_pylist()[0]
        return mean, logvar, read_texts(shard, number), written

    def _locate(self, index: int) -> tuple[str, int]:
        """Returns the file of a clip's shard and the clip's row in it."""
        place = self._places[index]
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._files[shard], int(place - self._starts[shard])


def _find_damage(
    row: Row, mean: torch.Tensor, logvar: torch.Tensor, texts: list[torch.Tensor], written: Mapping[str, Any]
) -> str:
    """Returns why the values that were read are not the clip of a row; "" if they are."""
    path, expected = row.sample_id, latent_shape(*astuple(row.bucket))
    if not mean.shape == logvar.shape == expected:
        return f"{path} has latents {tuple(mean.shape)}, not {expected}"
    if len(texts) != len(row.captions):
        return f"{path} has {len(texts)} captions, not {len(row.captions)}"
    for name, tensor in (("mean", mean), ("logvar", logvar), *(("prompt_embeds", text) for text in texts)):
        if not bool(tensor.isfinite().all()):
            return f"the {name} of {path} holds NaN or infinity"
    if content_sha256(mean, logvar, texts) != written["content_sha256"]:
        return f"{path} is not what was written"
    if (row.clip_key, list(row.text_keys)) != (written["clip_key"], written["text_keys"]):
        # `prepare` has replaced the cache since the manifest was read.
        return f"another clip is in the place of {path}"
    return ""


def open_cache(
    folder: Path,
    buckets: Mapping[str, Sequence[Bucket]],
    vae_fingerprint: str | None = None,
    t5_fingerprint: str | None = None,
    settings: Mapping[str, Any] = {},
) -> Cache:
    """Opens a cache for training; refuses one that is incomplete or was made with other settings.

    Args:
        folder: The cache.
        buckets: Buckets in the settings, by the name of their source.
        vae_fingerprint: Of the VAE encoder that belongs to the DiT; None if its weights are not available.
        t5_fingerprint: Of the text encoder for prompts; None if its weights are not available.
        settings: Result of `prepared_settings`; {} accepts a cache made with any.

    Raises:
        CacheVersionError: Another version wrote it.
        DataError: There is no cache, `prepare` has not finished it, a shard is missing or truncated, or it was made
            with other settings.
    """
    folder = Path(folder)
    cache = Cache(folder, _complete_manifest(folder))
    wanted: dict[str, Any] = _sizes({name: [astuple(bucket) for bucket in sizes] for name, sizes in buckets.items()})
    found = _sizes(cache.settings.transform["buckets"])
    if wanted.keys() != found.keys():
        wanted, found = ({"buckets": _summarize(sizes)} for sizes in (wanted, found))
    # Caches of earlier versions do not have the settings; accept them.
    written = cache.settings.transform.get("settings")
    if settings and written:
        for name in sorted(settings.keys() | written.keys()):
            wanted[name], found[name] = _quoted(settings.get(name)), _quoted(written.get(name))
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
            f"the cache {folder} was made with other settings ({'; '.join(differences)}): "
            "give the data settings that it was prepared with, run `mochi-tune prepare` with this config, or name "
            "another folder in data.cache."
        )
    return cache


def _sizes(buckets: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
    """Returns the buckets by name, for an error: the three numbers of a single bucket, the list of several."""
    if len(buckets) == 1:
        [sizes] = buckets.values()
        if len(sizes) == 1:
            return dict(zip(("num_frames", "height", "width"), sizes[0], strict=True))
    return {f"buckets of {name}" if name else "buckets": [list(size) for size in s] for name, s in buckets.items()}


def _summarize(sizes: Mapping[str, Any]) -> str:
    """Returns a short text for the result of `_sizes`."""
    if "num_frames" in sizes:
        return f"{sizes['num_frames']} frames of {sizes['height']}x{sizes['width']}"
    return " and ".join(f"{len(buckets)} {name}" for name, buckets in sizes.items())


def _quoted(value: Any) -> Any:
    """Returns a setting's value for an error; text other than a plain word is quoted."""
    return repr(value) if isinstance(value, str) and not value.isalnum() else value


def _complete_manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    again = "run `mochi-tune prepare` again, which continues from there"
    parts = folder / PARTS_FOLDER
    names = [path.name for path in parts.iterdir()] if parts.is_dir() else []
    if any(map(SHARE_LABEL.fullmatch, names)):
        raise DataError(
            f"the cache {folder} is incomplete, its shares were not merged: run `mochi-tune prepare` with "
            "parallel.shard=merge."
        )
    if names:
        raise DataError(f"the cache {folder} is incomplete: `mochi-tune prepare` was stopped before its end: {again}.")
    if manifest is None:
        if (folder / DATA_FOLDER).is_dir():
            raise DataError(f"the cache {folder} is incomplete, it has no complete {MANIFEST_NAME}: {again}.")
        raise DataError(f"there is no cache in {folder}: run `mochi-tune prepare` first.")
    if manifest.other_version:
        raise CacheVersionError(
            f"the cache {folder} {manifest.other_version}: run `mochi-tune prepare`, which encodes all clips again."
        )
    missing = []
    for shard in manifest.shards:
        if not _SHARD_FILE.fullmatch(shard.file):
            raise DataError(
                f"the cache {folder} was not written by `mochi-tune prepare`: its {MANIFEST_NAME} names "
                f"{shard.file!a}, which is not a shard in {DATA_FOLDER}/: prepare the videos into an empty folder."
            )
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            missing.append(f"{shard.file} is missing")
        elif size != shard.num_bytes:
            missing.append(f"{shard.file} has {size} of {shard.num_bytes} bytes")
    if missing:
        raise DataError(f"the cache {folder} is incomplete ({'; '.join(missing)}): {again}.")
    return manifest
