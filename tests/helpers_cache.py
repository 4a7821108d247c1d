"""Makes small caches without any model."""

from pathlib import Path

import torch

from mochi_tune.data.cache import CacheSettings, make_row
from mochi_tune.data.cache_writer import CacheWriter

SHAPE = (12, 2, 4, 6)
WIDTH = 5
SETTINGS = CacheSettings(
    transform={"version": 1, "num_frames": 7, "height": 32, "width": 48}, vae="v" * 64, vae_dtype="fp32", t5="t" * 64,
    t5_dtype="fp32",
)  # fmt: skip


def tensors_of(row):
    """The latents and features that a row's keys stand for, different for each key."""
    latents = torch.Generator().manual_seed(int(row.clip_key[:15], 16))
    text = torch.Generator().manual_seed(int(row.text_key[:15], 16))
    return {
        "mean": torch.randn(SHAPE, generator=latents),
        "logvar": torch.randn(SHAPE, generator=latents),
        "prompt_embeds": torch.randn(len(row.caption.split()), WIDTH, generator=text),
    }


def rows_of(captions: dict[str, str], settings=SETTINGS):
    """One row a clip; a clip's bytes are its name."""
    return [make_row(path, caption, f"sha-{path}", settings) for path, caption in captions.items()]


def encode(writer: CacheWriter, rows) -> tuple[int, int]:
    """Puts what is missing; returns how many latents and how many texts."""
    num_latents = num_texts = 0
    for row in rows:
        tensors = tensors_of(row)
        if not writer.has_latents(row.clip_key):
            writer.put_latents(row.clip_key, tensors["mean"], tensors["logvar"], {"scale": 0.5, "name": row.path})
            num_latents += 1
        if not writer.has_text(row.text_key):
            writer.put_text(row.text_key, tensors["prompt_embeds"], len(row.caption.split()) + 1)
            num_texts += 1
    return num_latents, num_texts


def make_cache(folder: Path, captions: dict[str, str], settings=SETTINGS, shard_bytes=2**20):
    """Prepares a cache of these clips; returns its rows, and how many latents and texts were encoded."""
    rows = rows_of(captions, settings)
    with CacheWriter(folder) as writer:
        counts = encode(writer, rows)
        writer.commit(rows, settings, shard_bytes)
    return rows, counts
