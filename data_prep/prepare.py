"""`mochi-tune prepare`: encodes folders of videos and captions into the cache that training reads.

It may be run again at any time: it finds what is encoded already by a hash of all that the encoding depends on.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mochi_tune.config.load import RunConfig, weights_paths
from mochi_tune.config.sources import buckets_by_source, prepared_settings, read_sources
from mochi_tune.data.cache import REPORT_NAME
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data.rows import CacheSettings, Row
from mochi_tune.data_prep import report
from mochi_tune.data_prep.clips import TRANSFORM_VERSION, DecodedClip
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.encode import encode_caption, encode_frames
from mochi_tune.data_prep.gather import Clip, Inputs, cut_inputs, find_inputs, signature
from mochi_tune.data_prep.preview import check_preview_folder, preview_paths, write_preview
from mochi_tune.errors import DataError
from mochi_tune.files import file_sha256, write_atomic
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.text_encoder import measure_caption
from mochi_tune.weights.folder import WeightsFolder


@dataclass(frozen=True)
class Prepared:
    """The result of a run: clips kept and inputs refused, clips and captions encoded now, the cache's size."""

    kept: int
    refused: int
    clips_encoded: int
    captions_encoded: int
    cache_gib: float
    buckets: str


def main(config: RunConfig) -> int:
    """Prepares the cache and writes a summary line.

    Returns:
        The exit code: 0, or 1 when a clip was refused; the cache then holds the others.

    Raises:
        MochiTuneError: As `prepare`.
    """
    done = prepare(config)
    if ";" in done.buckets:
        tqdm.write(f"clips in buckets of [frames, height, width]: {done.buckets}")
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
    data, weights = config.data, WeightsFolder(weights_paths(config))
    device, folder = find_device(config.device), Path(data.cache)
    if data.preview:
        check_preview_folder(Path(data.preview), [source.folder for source in read_sources(data)])
    inputs = find_inputs(data, config.seed)
    weights.check(["encoder", "text_encoder"])
    buckets = {name: [list(astuple(bucket)) for bucket in sizes] for name, sizes in buckets_by_source(data).items()}
    settings = CacheSettings(
        transform={"version": TRANSFORM_VERSION, "buckets": buckets, "settings": prepared_settings(data)},
        vae=weights.fingerprint("encoder"),
        vae_dtype=config.model.dtype,
        t5=weights.fingerprint("text_encoder"),
        t5_dtype=config.memory.t5_dtype,
    )
    with CacheWriter(folder) as cache, ClipDecoder(data.decode_timeout_seconds) as decoder:
        cut_inputs(inputs, data, settings, decoder)
        clips_encoded, bad = _encode_clips(cache, inputs, decoder, config, device)
        # Captions come second: those of refused clips are not encoded, as no row of the cache would hold them.
        kept = [clip.row for clip in inputs.clips if clip.row.sample_id not in bad]
        captions_encoded = _encode_captions(cache, kept, config, device)
        records = report.make_records(cache, inputs, kept, bad, _lost_tails(cache, kept, weights))
        write_atomic(folder / REPORT_NAME, report.as_csv(records).encode(), durable=True)
        if not kept:
            first = next(iter([*inputs.refused.values(), *bad.values()]))
            count = len(inputs.refused) + len(bad)
            where = ", ".join(str(source.folder) for source in read_sources(data))
            raise DataError(f"none of the {count} clips in {where} can be used, see {folder / REPORT_NAME}; {first}")
        cache.commit(kept, settings)
    for line in report.notes(records, inputs, kept):
        tqdm.write(line)
    num_bytes = sum(file.stat().st_size for file in (folder / "data").iterdir())
    num_refused = len(inputs.refused) + len(bad)
    sizes = report.count_buckets(kept)
    return Prepared(len(kept), num_refused, clips_encoded, captions_encoded, num_bytes / 2**30, sizes)


def _encode_clips(
    cache: CacheWriter, inputs: Inputs, decoder: ClipDecoder, config: RunConfig, device: torch.device
) -> tuple[int, dict[str, str]]:
    """Encodes the clips that the cache lacks; returns their number, and the reason for each sample_id that failed."""
    previews: dict[str, Path] = {}
    if config.data.preview:
        videos = [(clip.file.name, clip.row.start) for clip in inputs.clips]
        paths = preview_paths(Path(config.data.preview), videos)
        previews = {clip.row.sample_id: path for clip, path in zip(inputs.clips, paths, strict=True)}
    wanted, keys = [], set()
    for clip in inputs.clips:
        # Two files with the same bytes have the same keys, and are encoded once.
        is_new = clip.row.clip_key not in keys and not cache.has_latents(clip.row.clip_key)
        keys.add(clip.row.clip_key)
        # A preview of an earlier run may be of other settings.
        if is_new or previews:
            wanted.append(clip)
    num_encoded, bad, encoder, saving = 0, {}, None, None
    with ThreadPoolExecutor(1) as saver, tqdm(total=len(wanted), desc="clips", unit="clip", disable=not wanted) as bar:
        for clip, decoded in _decode(wanted, decoder):
            if isinstance(decoded, DataError):
                bad[clip.row.clip_key] = str(decoded)
            elif not _is_unchanged(clip, inputs.signatures[clip.file.name]):
                bad[clip.row.clip_key] = f"{clip.file.path}: was changed while it was read: run this again."
            else:
                if previews:
                    write_preview(previews[clip.row.sample_id], decoded.frames)
                if not cache.has_latents(clip.row.clip_key):
                    # Loaded only when a clip is there to be encoded: a second run over a bad clip reads no weights.
                    weights = WeightsFolder(weights_paths(config))
                    encoder = encoder or weights.load_encoder(device, DTYPES[config.model.dtype])
                    mean, logvar = encode_frames(encoder, decoded.frames, clip.row.sample_id)
                    # A sync takes as long as a part of a clip's encoding: one is saved while the next one is encoded.
                    if saving is not None:
                        saving.result()
                    saving = saver.submit(cache.put_latents, clip.row.clip_key, mean, logvar, decoded.report)
                    num_encoded += 1
            bar.update()
        if saving is not None:
            saving.result()
    del encoder
    free_memory()
    return num_encoded, {
        clip.row.sample_id: bad[clip.row.clip_key] for clip in inputs.clips if clip.row.clip_key in bad
    }


def _decode(clips: Sequence[Clip], decoder: ClipDecoder) -> Iterator[tuple[Clip, DecodedClip | DataError]]:
    """Yields each clip decoded, or the error that refuses it; a file is decoded once for all its clips."""
    by_file: dict[str, list[Clip]] = {}
    for clip in clips:
        # By name: a folder may lie in another one, and both be sources.
        by_file.setdefault(clip.file.name, []).append(clip)
    jobs = [(those[0].file.path, [clip.cut for clip in those]) for those in by_file.values()]
    in_order = (clip for those in by_file.values() for clip in those)
    for clip, (_, _, decoded) in zip(in_order, decoder.cut_all(jobs), strict=True):
        yield clip, decoded


def _is_unchanged(clip: Clip, before: tuple[int, int, int]) -> bool:
    """Whether a video still has the content that its latents' key was computed from."""
    try:
        # A long file with many clips is not read for each of them.
        return signature(clip.file.path) == before or file_sha256(clip.file.path) == clip.row.source_sha256
    except (OSError, DataError):
        return False


def _encode_captions(cache: CacheWriter, rows: Sequence[Row], config: RunConfig, device: torch.device) -> int:
    """Encodes the captions that the cache lacks, each text once, and frees the text encoder; returns how many."""
    missing: dict[str, tuple[str, str]] = {}
    for row in rows:
        for key, caption in zip(row.text_keys, row.captions, strict=True):
            if not cache.has_text(key):
                missing.setdefault(key, (caption, row.sample_id))
    if not missing:
        return 0
    # Not in model.dtype: features are computed once, and T5's rounding affects all of training.
    text_encoder = WeightsFolder(weights_paths(config)).load_text_encoder(device, DTYPES[config.memory.t5_dtype])
    for key, (caption, name) in tqdm(missing.items(), desc="captions", unit="caption"):
        cache.put_text(key, *encode_caption(text_encoder, caption, name))
    del text_encoder
    free_memory()
    return len(missing)


def _lost_tails(cache: CacheWriter, rows: Sequence[Row], weights: WeightsFolder) -> dict[str, str]:
    """Returns the end of each caption that is longer than what the text encoder reads, by caption."""
    pairs = ((key, text) for row in rows for key, text in zip(row.text_keys, row.captions, strict=True))
    cut = {text for key, text in pairs if len(set(cache.token_counts(key))) > 1}
    tokenizer = weights.load_tokenizer() if cut else None
    return {text: text[measure_caption(text, tokenizer).num_read :].strip() for text in cut}
