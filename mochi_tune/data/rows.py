"""One clip of a cache: its row, the keys of its latents and features, and the columns of a shard."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any, TypeGuard

import torch

from mochi_tune.data.buckets import Bucket

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class CacheSettings:
    """Everything except videos and captions that determines what is encoded.

    Args:
        transform: How clips are cut from the videos, as JSON values: `version`; `buckets`, the lists
            [frames, height, width] of each source by its name; `settings`, the settings of cuts and captions.
        vae: Fingerprint of the VAE encoder's weights.
        vae_dtype: Precision of the VAE encoder, "bf16" or "fp32".
        t5: Fingerprint of the text encoder's weights.
        t5_dtype: Precision of the text encoder.
    """

    transform: dict[str, Any]
    vae: str
    vae_dtype: str
    t5: str
    t5_dtype: str


@dataclass(frozen=True, order=True)
class Row:
    """One clip of a cache: where it comes from, and the keys of its latents and text features.

    Args:
        sample_id: Unique name of the clip in the cache; also keys random numbers.
        path: Path of the video, relative to the folder of its source.
        source: Name of the source; "" if there is only one.
        start: First frame, at 30 fps from the video's first picture.
        bucket: Size of the clip.
        captions: Texts as they were encoded, one or more. Training draws one each time.
        source_sha256: Hash of the video's bytes.
        clip_key: Hash of everything that the latents depend on: source, cut and VAE.
        text_keys: For each caption, hash of everything that its features depend on: caption and T5.
    """

    sample_id: str
    path: str
    source: str
    start: int
    bucket: Bucket
    captions: tuple[str, ...]
    source_sha256: str
    clip_key: str
    text_keys: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self) | {"bucket": astuple(self.bucket)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Row":
        """Builds a row from the result of `to_json`."""
        lists = {name: tuple(values[name]) for name in ("captions", "text_keys")}
        return cls(**{**values, **lists, "bucket": Bucket(*values["bucket"])})


def make_row(
    path: str,
    captions: Sequence[str],
    source_sha256: str,
    cut: Mapping[str, Any],
    settings: CacheSettings,
    source: str = "",
) -> Row:
    """Builds a clip's row. A key changes exactly when the latents or the features would.

    Args:
        path: Of the video, relative to the folder of its source.
        captions: One or more; "" trains without a caption.
        source_sha256: Hash of the video's bytes.
        cut: Everything except the file that determines the pixels: JSON values with `start`, `num_frames`, `height`,
            `width`.
        settings: Of the cache.
        source: Name of the source.
    """
    start, bucket = cut["start"], Bucket(cut["num_frames"], cut["height"], cut["width"])
    sample_id = f"{source}/{path}" if source else path
    clip_key = digest(
        "clip", source_sha256, {"version": settings.transform["version"], **cut}, settings.vae, settings.vae_dtype
    )
    text_keys = tuple(digest("text", caption, settings.t5, settings.t5_dtype) for caption in captions)
    return Row(
        f"{sample_id}@{start}" if start else sample_id, path, source, start, bucket, tuple(captions), source_sha256,
        clip_key, text_keys,
    )  # fmt: skip


def digest(*values: Any) -> str:
    """Returns the hex sha256 of JSON values and the schema version."""
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, *values], sort_keys=True).encode()).hexdigest()


def digest_list(values: Iterable[Any]) -> str:
    """Returns `digest` of a list of JSON values, read one at a time."""
    found = hashlib.sha256(f"[{SCHEMA_VERSION}, [".encode())
    for number, value in enumerate(values):
        found.update((", " * (number > 0) + json.dumps(value, sort_keys=True)).encode())
    found.update(b"]]")
    return found.hexdigest()


def shard_schema() -> Any:
    """Returns the arrow schema of a shard. A change needs a new SCHEMA_VERSION."""
    import pyarrow as pa

    floats = pa.list_(pa.float32())
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("path", pa.string()),
            ("source", pa.string()),
            ("start", pa.int32()),
            ("bucket", pa.list_(pa.int32())),  # frames, height, width
            ("captions", pa.list_(pa.string())),
            ("source_sha256", pa.string()),
            ("clip_key", pa.string()),
            ("text_keys", pa.list_(pa.string())),
            ("latent_shape", pa.list_(pa.int32())),  # C, T, h, w
            ("mean", floats),  # flattened latent_shape
            ("logvar", floats),
            ("prompt_embeds", floats),  # flattened (tokens, text_width): the valid tokens of one caption after another
            ("num_tokens", pa.list_(pa.int32())),  # of each caption
            ("text_width", pa.int32()),
            ("caption_tokens", pa.list_(pa.int32())),  # before truncation to num_tokens
            ("clip_report", pa.string()),  # JSON: how the clip was cut
            ("content_sha256", pa.string()),  # of mean, logvar and prompt_embeds; compared at every read
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


def read_texts(shard: Any, row: int) -> list[torch.Tensor]:
    """Reads the features of a clip's captions from an open shard: fp32 (num_tokens, text_width), valid tokens only."""
    table = shard.read_row_group(row, columns=["prompt_embeds", "num_tokens", "text_width"], use_threads=False)
    counts, width = table["num_tokens"][0].as_py(), table["text_width"][0].as_py()
    return list(_floats(table, "prompt_embeds").view(sum(counts), width).split(counts))


def content_sha256(mean: torch.Tensor, logvar: torch.Tensor, texts: Sequence[torch.Tensor]) -> str:
    """Returns the hex sha256 of a clip's tensors, fp32 on the CPU."""
    found = hashlib.sha256()
    for tensor in (mean, logvar, *texts):
        found.update(repr(tuple(tensor.shape)).encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def _floats(table: Any, column: str) -> torch.Tensor:
    # One copy: the arrow buffer is read-only, and torch needs a writable one.
    return torch.from_numpy(table.column(column).chunk(0).values.to_numpy(zero_copy_only=True).copy())


def is_row(value: Any) -> bool:
    """Whether JSON values are a result of `Row.to_json`."""
    if not has_fields(value, Row):
        return False
    texts = [value[name] for name in ("sample_id", "path", "source", "source_sha256", "clip_key")]
    captions, keys, numbers = value["captions"], value["text_keys"], value["bucket"]
    return (
        isinstance(captions, list)
        and isinstance(keys, list)
        and len(captions) == len(keys) > 0
        and all(isinstance(text, str) for text in (*texts, *captions, *keys))
        and isinstance(numbers, list)
        and len(numbers) == 3
        and all(isinstance(number, int) for number in (*numbers, value["start"]))
    )


def has_fields(value: Any, kind: type) -> TypeGuard[dict[str, Any]]:
    """Whether JSON values are an object with exactly the fields of a dataclass."""
    return isinstance(value, dict) and value.keys() == {field.name for field in fields(kind)}
