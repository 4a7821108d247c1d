"""Makes small caches without any model."""

from dataclasses import asdict, astuple
from pathlib import Path

import torch

from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data.rows import CacheSettings, Row, make_row
from mochi_tune.models.latents import latent_shape

WIDTH = 5
BUCKET = Bucket(7, 32, 48)
BUCKETS = {"": [BUCKET]}
SETTINGS = CacheSettings(
    transform={"version": 1, "buckets": {"": [[7, 32, 48]]}}, vae="v" * 64, vae_dtype="fp32", t5="t" * 64,
    t5_dtype="fp32",
)  # fmt: skip


def tensors_of(row):
    """The latents and the first caption's features that a row's keys stand for, different for each key."""
    latents = torch.Generator().manual_seed(int(row.clip_key[:15], 16))
    shape = latent_shape(*astuple(row.bucket))
    return {
        "mean": torch.randn(shape, generator=latents),
        "logvar": torch.randn(shape, generator=latents),
        "prompt_embeds": features_of(row, 0),
    }


def features_of(row: Row, caption: int) -> torch.Tensor:
    text = torch.Generator().manual_seed(int(row.text_keys[caption][:15], 16))
    return torch.randn(len(row.captions[caption].split()), WIDTH, generator=text)


def row_of(path: str, caption: str | tuple[str, ...], sha256: str, settings=SETTINGS, bucket=BUCKET, start=0) -> Row:
    captions = (caption,) if isinstance(caption, str) else caption
    return make_row(path, captions, sha256, {"start": start, **asdict(bucket)}, settings)


def rows_of(captions: dict[str, str], settings=SETTINGS):
    """One row a clip; a clip's bytes are its name."""
    return [row_of(path, caption, f"sha-{path}", settings) for path, caption in captions.items()]


def encode(writer: CacheWriter, rows) -> tuple[int, int]:
    """Puts what is missing; returns how many latents and how many texts."""
    num_latents = num_texts = 0
    for row in rows:
        tensors = tensors_of(row)
        if not writer.has_latents(row.clip_key):
            writer.put_latents(row.clip_key, tensors["mean"], tensors["logvar"], {"scale": 0.5, "name": row.path})
            num_latents += 1
        for number, key in enumerate(row.text_keys):
            if not writer.has_text(key):
                writer.put_text(key, features_of(row, number), len(row.captions[number].split()) + 1)
                num_texts += 1
    return num_latents, num_texts


def make_cache(folder: Path, captions: dict[str, str], settings=SETTINGS, shard_bytes=2**20):
    """Prepares a cache of these clips; returns its rows, and how many latents and texts were encoded."""
    rows = rows_of(captions, settings)
    with CacheWriter(folder) as writer:
        counts = encode(writer, rows)
        writer.commit(rows, settings, shard_bytes)
    return rows, counts
