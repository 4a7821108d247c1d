"""`mochi-tune prepare`: encodes a folder of videos and captions into the cache that training reads.

It may be run again at any time: it finds what is encoded already by a hash of all that the encoding depends on.
"""

import csv
import io
import json
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mochi_tune.config.load import RunConfig, weights_folder
from mochi_tune.config.schema import DataConfig
from mochi_tune.data.cache import REPORT_NAME, CacheSettings, Row, make_row
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data_prep.captions import find_orphans, load_captions
from mochi_tune.data_prep.clips import TRANSFORM_VERSION, Cut, choose_frame_rate, find_videos
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.encode import encode_caption, encode_frames
from mochi_tune.errors import DataError
from mochi_tune.files import file_sha256, write_atomic
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.text_encoder import MAX_TOKENS, TextEncoder
from mochi_tune.weights.folder import WeightsFolder

# An error or a summary names this many clips and counts the rest.
MAX_LISTED = 10
REPORT_COLUMNS: tuple[str, ...] = (
    "clip", "status", "reason", "caption", "caption_tokens", "lost_tokens", "start_seconds", "scale", "crop",
    "source_width", "source_height", "source_frames", "source_seconds", "source_fps", "frame_rate", "distinct_frames",
    "rotation", "is_mirrored", "pixel_aspect", "deinterlaced", "hdr", "color_matrix", "decoder",
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """The result of a run: clips kept and refused, clips and captions encoded now, and the cache's size."""

    kept: int
    refused: int
    clips_encoded: int
    captions_encoded: int
    cache_gib: float


def main(config: RunConfig) -> int:
    """Prepares the cache and writes a summary line.

    Returns:
        The exit code: 0, or 1 when a clip was refused; the cache then holds the others.

    Raises:
        MochiTuneError: As `prepare`.
    """
    done = prepare(config)
    tqdm.write(
        f"{config.data.cache}: {done.kept} clips kept, {done.refused} refused; encoded now: {done.clips_encoded} clips "
        f"and {done.captions_encoded} captions, reused: {done.kept - done.clips_encoded} clips; "
        f"{done.cache_gib:.3g} GiB. Each input is listed in {Path(config.data.cache) / REPORT_NAME}"
    )
    return 1 if done.refused else 0


def prepare(config: RunConfig) -> Prepared:
    """Brings the cache up to date with the videos, the captions and the settings; encodes only what is missing.

    Raises:
        DataError: No clips, a clip without a caption, none that can be used, or a model that gave NaN or infinity.
        CheckpointError: Weights that are missing or of another model.
        ConfigError: The device is not there.
    """
    folder, weights = Path(config.data.videos), WeightsFolder(weights_folder(config))
    device = find_device(config.device)
    captions = _read_captions(folder, config.data.allow_empty_captions)
    weights.check(["encoder", "text_encoder"])
    settings = CacheSettings(
        transform={"version": TRANSFORM_VERSION, **_transform(config.data)},
        vae=weights.fingerprint("encoder"),
        vae_dtype=config.model.dtype,
        t5=weights.fingerprint("text_encoder"),
        t5_dtype=config.memory.t5_dtype,
    )
    rows, refused = _fingerprint_videos(folder, captions, settings)

    with CacheWriter(Path(config.data.cache)) as cache:
        decoder = ClipDecoder(config.data.decode_timeout_seconds)
        clips_encoded, bad_clips = _encode_clips(cache, folder, rows, decoder, config, device)
        refused |= {row.path: bad_clips[row.clip_key] for row in rows if row.clip_key in bad_clips}
        # Captions come second: those of refused clips are not encoded, as no row of the cache would hold them.
        kept = [row for row in rows if row.path not in refused]
        captions_encoded = _encode_captions(cache, kept, config, device)
        records = _report_records(cache, captions, kept, refused)
        report = Path(config.data.cache) / REPORT_NAME
        write_atomic(report, _csv(records).encode(), durable=True)
        if not kept:
            first = next(iter(refused.values()))
            raise DataError(f"none of the {len(refused)} clips in {folder} can be used, see {report}; {first}")
        cache.commit(kept, settings)
    _write_notes(records, config.data.num_frames)
    num_bytes = sum(file.stat().st_size for file in (Path(config.data.cache) / "data").iterdir())
    return Prepared(len(kept), len(refused), clips_encoded, captions_encoded, num_bytes / 2**30)


def _transform(data: DataConfig) -> dict[str, Any]:
    """Returns the settings that decide a clip's frames."""
    return {
        "num_frames": data.num_frames,
        "height": data.height,
        "width": data.width,
        "allow_upscale": data.allow_upscale,
        "frame_rate": data.frame_rate,
        "hdr": data.hdr,
    }


def _read_captions(folder: Path, allow_empty: bool) -> dict[str, str]:
    """Returns the caption of each video by its path in the folder, sorted."""
    videos = find_videos(folder)
    found = load_captions(folder, videos)
    captions = {_relative(video, folder): found.get(video, "").strip() for video in videos}
    empty = [name for name, caption in captions.items() if not caption]
    orphans = find_orphans(folder, videos)
    if empty and not allow_empty:
        # A typo in a file's name is the usual cause; both names together make it visible.
        typos = f"; without a video there are the captions {_listed(orphans)}" if orphans else ""
        raise DataError(
            f"{len(empty)} of {len(videos)} clips in {folder} have no caption ({_listed(empty)}{typos}): write each "
            "one's caption into a .txt file of its name, or set data.allow_empty_captions=true to train them without."
        )
    if orphans:
        tqdm.write(f"captions without a video of that name, not used: {_listed(orphans)}")
    return captions


def _relative(video: Path, folder: Path) -> str:
    name = video.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of the clip {name!a} is not valid UTF-8: rename it.") from None
    return name


def _fingerprint_videos(
    folder: Path, captions: dict[str, str], settings: CacheSettings
) -> tuple[list[Row], dict[str, str]]:
    """Returns a row for each video that can be opened, and why the others cannot."""
    rows, refused = [], {}
    for name, caption in tqdm(captions.items(), desc="fingerprints", unit="clip"):
        try:
            if stat.S_ISREG((folder / name).stat().st_mode):
                rows.append(make_row(name, caption, file_sha256(folder / name), settings))
            else:
                # Opening a pipe would wait for its other end for ever.
                refused[name] = f"{folder / name}: is no file but a pipe, a socket or a device: remove it."
        except OSError as error:
            refused[name] = f"{folder / name}: cannot be opened ({error.strerror}): copy it again or remove it."
    return rows, refused


def _encode_clips(
    cache: CacheWriter, folder: Path, rows: list[Row], decoder: ClipDecoder, config: RunConfig, device: torch.device
) -> tuple[int, dict[str, str]]:
    """Encodes the clips that the cache lacks; returns their number, and the reason for each clip_key that failed."""
    # Two files with the same bytes have the same key, and are encoded once.
    missing = _unique((row.clip_key, row) for row in rows if not cache.has_latents(row.clip_key))
    num_encoded, encoder, saving = 0, None, None
    progress = tqdm(total=len(missing), desc="clips", unit="clip", disable=not missing)
    with decoder, ThreadPoolExecutor(1) as saver, progress:
        cuts, bad = _choose_cuts(folder, missing, decoder, config.data)
        progress.update(len(bad))
        missing = [row for row in missing if row.clip_key in cuts]
        clips = decoder.cut_all([(folder / row.path, [cuts[row.clip_key]]) for row in missing])
        for row, (_, _, clip) in zip(missing, clips, strict=True):
            if isinstance(clip, DataError):
                bad[row.clip_key] = str(clip)
            elif not _is_unchanged(folder / row.path, row.source_sha256):
                bad[row.clip_key] = f"{folder / row.path}: was changed while it was read: run this again."
            else:
                # Loaded only when a clip is there to be encoded: a second run over a bad clip reads no weights.
                weights = WeightsFolder(weights_folder(config))
                encoder = encoder or weights.load_encoder(device, DTYPES[config.model.dtype])
                mean, logvar = encode_frames(encoder, clip.frames, row.path)
                # A sync takes as long as a part of a clip's encoding: a clip is saved while the next one is encoded.
                if saving is not None:
                    saving.result()
                saving = saver.submit(cache.put_latents, row.clip_key, mean, logvar, clip.report)
                num_encoded += 1
            progress.update()
        if saving is not None:
            saving.result()
    del encoder
    free_memory()
    return num_encoded, bad


def _choose_cuts(
    folder: Path, rows: list[Row], decoder: ClipDecoder, data: DataConfig
) -> tuple[dict[str, Cut], dict[str, str]]:
    """Scans each file; returns by clip_key what to cut out of it, and the reason for each one that is refused."""
    cuts, bad = {}, {}
    for row in rows:
        try:
            frame_rate = choose_frame_rate(decoder.scan(folder / row.path), data.frame_rate)
        except DataError as error:
            bad[row.clip_key] = str(error)
        else:
            cuts[row.clip_key] = Cut(**_transform(data) | {"frame_rate": frame_rate}, decoder=data.decoder)
    return cuts, bad


def _is_unchanged(video: Path, sha256: str) -> bool:
    """Whether a video still has the content that its latents' key was computed from."""
    try:
        return file_sha256(video) == sha256
    except OSError:
        return False


def _encode_captions(cache: CacheWriter, rows: list[Row], config: RunConfig, device: torch.device) -> int:
    """Encodes the captions that the cache lacks, each text once, and frees the text encoder; returns how many."""
    missing = _unique((row.text_key, row) for row in rows if not cache.has_text(row.text_key))
    if not missing:
        return 0
    # Not in model.dtype: features are computed once, and T5's rounding affects all of training.
    text_encoder = TextEncoder.load(weights_folder(config), device, DTYPES[config.memory.t5_dtype])
    for row in tqdm(missing, desc="captions", unit="caption"):
        prompt_embeds, caption_tokens = encode_caption(text_encoder, row.caption, row.path)
        cache.put_text(row.text_key, prompt_embeds, caption_tokens)
    del text_encoder
    free_memory()
    return len(missing)


def _unique(keyed_rows: Iterable[tuple[str, Row]]) -> list[Row]:
    first: dict[str, Row] = {}
    for key, row in keyed_rows:
        first.setdefault(key, row)
    return list(first.values())


def _report_records(
    cache: CacheWriter, captions: dict[str, str], kept: list[Row], refused: dict[str, str]
) -> list[dict[str, Any]]:
    """Returns one record for each input, in the order of the clips; refused ones have no tokens and no crop."""
    rows = {row.path: row for row in kept}
    records = []
    for name, caption in captions.items():
        record = {"clip": name, "status": "refused", "reason": refused.get(name, ""), "caption": caption}
        if name in rows:
            num_tokens, caption_tokens = cache.token_counts(rows[name].text_key)
            clip_report = cache.clip_report(rows[name].clip_key)
            record |= {"status": "kept", "caption_tokens": caption_tokens, "lost_tokens": caption_tokens - num_tokens}
            record |= clip_report | {"crop": json.dumps(clip_report["crop"])}
        records.append(record)
    return records


def _csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, REPORT_COLUMNS)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _write_notes(records: list[dict[str, Any]], num_frames: int) -> None:
    """Writes lines on refused clips, repeated frames and cut captions, so that a user need not open the report."""
    for record in records:
        if record["status"] == "refused":
            tqdm.write(f"refused: {record['reason']}")
    repeated = [
        f"{record['clip']} {record['distinct_frames']} of {num_frames}"
        for record in records
        if record.get("distinct_frames", num_frames) < num_frames
    ]
    if repeated:
        tqdm.write(
            f"{len(repeated)} clips hold repeated frames ({_listed(repeated)}): their source shows fewer than 30 "
            "pictures a second; data.frame_rate=retime plays each of them once, which is faster than life."
        )
    cut = [f"{record['clip']} by {record['lost_tokens']}" for record in records if record.get("lost_tokens")]
    if cut:
        tqdm.write(f"captions cut to {MAX_TOKENS} tokens: {_listed(cut)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
