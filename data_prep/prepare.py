"""`mochi-tune prepare`: encodes folders of videos and captions into the cache that training reads.

It can run again at any time. A hash of everything that an encoding depends on finds what is encoded already.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from mochi_tune.config.load import RunConfig, weights_paths
from mochi_tune.config.sources import buckets_by_source, prepared_settings, read_sources
from mochi_tune.data.cache import DATA_FOLDER, REPORT_NAME
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data.rows import CacheSettings, Row
from mochi_tune.data_prep import report
from mochi_tune.data_prep.clips import TRANSFORM_VERSION
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.decord_frames import check_decord
from mochi_tune.data_prep.gather import Inputs, cut_inputs, find_inputs
from mochi_tune.data_prep.pools import ProcessPool, WorkerPool
from mochi_tune.data_prep.preview import check_preview_folder, preview_paths
from mochi_tune.data_prep.shares import RECORD_FILE, Share, keep_share, merge_shares, write_record
from mochi_tune.data_prep.tasks import CaptionTask, ClipTask, Worker, WorkerSettings, WorkHere
from mochi_tune.errors import ConfigError, DataError, counted, format_bytes, printable, some
from mochi_tune.files import write_atomic
from mochi_tune.models.device import find_device
from mochi_tune.models.text_encoder import measure_caption
from mochi_tune.weights.folder import WeightsFolder


@dataclass(frozen=True)
class Prepared:
    """The result of a run: clips kept, inputs refused, clips and captions encoded now, the cache's size and buckets."""

    kept: int
    refused: int
    clips_encoded: int
    captions_encoded: int
    cache_bytes: int
    buckets: str


def main(config: RunConfig) -> int:
    """Prepares the cache, or a share of it, and writes a summary line.

    Returns:
        The exit code: 0, or 1 if clips were refused; the cache then holds the others.

    Raises:
        MochiTuneError: As `prepare`.
    """
    done = prepare(config)
    encoded = (
        f"{counted(done.kept, 'clip')} kept, {done.refused} refused; "
        f"encoded now: {counted(done.clips_encoded, 'clip')} and {counted(done.captions_encoded, 'caption')}, "
        f"reused: {counted(done.kept - done.clips_encoded, 'clip')}"
    )
    if (share := _share(config)) is not None:
        what = f"{config.data.cache}: share {share.number} of {share.count}: {encoded}. "
        tqdm.write(f"{what}When all shares have ended, parallel.shard=merge makes the cache")
        return 1 if done.refused else 0
    if ";" in done.buckets:
        tqdm.write(f"clips in buckets of [frames, height, width]: {done.buckets}")
    tqdm.write(
        f"{config.data.cache}: {encoded}; {format_bytes(done.cache_bytes)}. "
        f"Each input is listed in {Path(config.data.cache) / REPORT_NAME}"
    )
    return 1 if done.refused else 0


def prepare(config: RunConfig) -> Prepared:
    """Updates the cache to the videos, the captions and the settings; encodes only what is missing.

    With parallel.shard=3/16 it encodes that share and commits no cache; with merge it commits the cache of all shares.

    Raises:
        DataError: There are no clips, no usable clips, or clips without a caption; or a model returned NaN or infinity.
        CheckpointError: Weights are missing or belong to another model.
        ConfigError: The device is not available.
        ParallelError: The Ray cluster does not fit, or workers die repeatedly.
    """
    data, weights, share = config.data, WeightsFolder(weights_paths(config)), _share(config)
    device, folder = find_device(config.device), Path(data.cache)
    if overlapping := [source.folder for source in read_sources(data) if source.folder.resolve() == folder.resolve()]:
        raise ConfigError(f"data.cache={folder} is the folder of the videos, {overlapping[0]}: use another folder.")
    if data.preview:
        check_preview_folder(Path(data.preview), [source.folder for source in read_sources(data)])
        if config.parallel.shard is not None:
            raise ConfigError("data.preview does not work with parallel.shard: leave it out.")
    if data.decoder == "decord":
        check_decord()
    inputs = find_inputs(data, config.seed)
    if inputs.refused:
        # Reported before hours of encoding, and again at the end.
        refused = f"{counted(len(inputs.refused), 'clip')} will be refused: {some(inputs.refused.values())}"
        tqdm.write(printable(refused))
    if share is not None:
        keep_share(inputs, share)
    weights.check(["encoder", "text_encoder"])
    settings = _cache_settings(config, weights)
    label = share.label if share else ""
    with CacheWriter(folder, label) as cache, ClipDecoder(data.decode_timeout_seconds) as decoder:
        if not cache.is_locked:
            tqdm.write(f"{folder}: its disk has no locks: make sure that no other `mochi-tune prepare` writes there")
        if cache.other_version and config.parallel.shard != "merge":
            tqdm.write(f"the cache {folder} {cache.other_version}: all clips and captions are encoded again")
        with _open_workers(config, settings, cache, decoder, device) as workers:
            (cache.parts.folder / RECORD_FILE).unlink(missing_ok=True)
            cut_inputs(inputs, data, settings, decoder, label)
            if config.parallel.shard == "merge":
                clips_encoded, bad = 0, merge_shares(cache, inputs.clips, settings)
            else:
                clips_encoded, bad = _encode_clips(cache, inputs, decoder, workers, data.preview)
            # After the clips, because captions of refused clips are not needed.
            kept = [clip.row for clip in inputs.clips if clip.row.sample_id not in bad]
            captions_encoded = _encode_captions(cache, kept, workers)
        done = Prepared(len(kept), len(inputs.refused) + len(bad), clips_encoded, captions_encoded, 0, "")
        if share is not None:
            write_record(cache, share, inputs.clips, bad, settings)
            for reason in [*inputs.refused.values(), *bad.values()]:
                tqdm.write(printable(f"refused: {reason}"))
            return done
        records = report.make_records(cache, inputs, kept, bad, _lost_tails(cache, kept, weights))
        write_atomic(folder / REPORT_NAME, report.as_csv(records).encode(), durable=True)
        if not kept:
            first = printable(next(iter([*inputs.refused.values(), *bad.values()])))
            where = ", ".join(str(source.folder) for source in read_sources(data))
            raise DataError(
                f"none of the {done.refused} clips in {where} can be used, see {folder / REPORT_NAME}; {first}"
            )
        cache.commit(kept, settings)
    for line in report.notes(records, inputs, kept):
        tqdm.write(line)
    num_bytes = sum(file.stat().st_size for file in (folder / DATA_FOLDER).iterdir())
    return replace(done, cache_bytes=num_bytes, buckets=report.count_buckets(kept))


def _cache_settings(config: RunConfig, weights: WeightsFolder) -> CacheSettings:
    sizes = buckets_by_source(config.data)
    buckets = {name: [list(astuple(bucket)) for bucket in those] for name, those in sizes.items()}
    return CacheSettings(
        transform={"version": TRANSFORM_VERSION, "buckets": buckets, "settings": prepared_settings(config.data)},
        vae=weights.fingerprint("encoder"),
        vae_dtype=config.model.dtype,
        t5=weights.fingerprint("text_encoder"),
        t5_dtype=config.memory.t5_dtype,
    )


def _share(config: RunConfig) -> Share | None:
    """Returns the share that this run encodes; None if it encodes everything or merges."""
    return None if config.parallel.shard in (None, "merge") else Share.parse(config.parallel.shard)


def _open_workers(
    config: RunConfig, settings: CacheSettings, cache: CacheWriter, decoder: ClipDecoder, device: torch.device
) -> "WorkHere | WorkerPool":
    """Returns the workers: this process, several processes, or actors of a Ray cluster."""
    parallel = config.parallel
    worker_settings = WorkerSettings(
        weights=weights_paths(config),
        cache=settings,
        parts=cache.parts.folder,
        device=device.type,
        decode_timeout_seconds=config.data.decode_timeout_seconds,
        num_threads=torch.get_num_threads(),
    )
    if parallel.engine == "ray":
        from mochi_tune.data_prep.ray_pool import RayPool

        return RayPool(worker_settings, parallel.num_processes, parallel.ray_address)
    if parallel.num_processes > 1:
        return ProcessPool(worker_settings, parallel.num_processes)
    return WorkHere(Worker(worker_settings, cache, decoder, checks_weights=False))


def _encode_clips(
    cache: CacheWriter, inputs: Inputs, decoder: ClipDecoder, workers: "WorkHere | WorkerPool", preview: str | None
) -> tuple[int, dict[str, str]]:
    """Encodes the clips that the cache lacks; returns their number, and the reason for each sample_id that failed."""
    tasks, num_encoded = _clip_tasks(cache, inputs, preview), 0
    # Reason and path of the file that was read, by clip_key.
    bad: dict[str, tuple[str, str]] = {}
    if isinstance(workers, WorkerPool):
        # Each worker has its own decoder.
        decoder.close()
    total = sum(len(task.clips) for task in tasks)
    with tqdm(total=total, desc="clips", unit="clip", disable=not tasks) as bar:
        for task, reasons in workers.run(tasks, bar.update):
            for clip, is_missing, reason in zip(task.clips, task.is_missing, reasons, strict=True):
                if reason:
                    bad[clip.row.clip_key] = reason, str(clip.file.path)
                elif is_missing:
                    num_encoded += 1
                    if isinstance(workers, WorkerPool):
                        cache.take_part(cache.parts.find(f"latents-{clip.row.clip_key}"))
    refused = {}
    for clip in inputs.clips:
        if clip.row.clip_key in bad:
            reason, path = bad[clip.row.clip_key]
            # The file that was read may be a copy of this one: name this one.
            refused[clip.row.sample_id] = reason.replace(printable(path), printable(str(clip.file.path)), 1)
    return num_encoded, refused


def _clip_tasks(cache: CacheWriter, inputs: Inputs, preview: str | None) -> list[ClipTask]:
    """Returns one task for each file with clips to decode."""
    previews: dict[str, Path] = {}
    if preview:
        paths = preview_paths(Path(preview), [(clip.file.name, clip.row.start) for clip in inputs.clips])
        previews = {clip.row.sample_id: path for clip, path in zip(inputs.clips, paths, strict=True)}
    # By name, not by path: a source's folder may be inside another source's.
    wanted, keys = {}, set()
    for clip in inputs.clips:
        # Files with the same bytes have the same keys, and are encoded once.
        is_missing = clip.row.clip_key not in keys and not cache.has_latents(clip.row.clip_key)
        keys.add(clip.row.clip_key)
        # Previews are always written again: those of an earlier run may have other settings.
        if is_missing or previews:
            wanted.setdefault(clip.file.name, []).append((clip, is_missing, previews.get(clip.row.sample_id)))
    return [
        ClipTask(clips, inputs.signatures[name], is_missing, paths)
        for name, (clips, is_missing, paths) in ((name, zip(*those, strict=True)) for name, those in wanted.items())
    ]


def _encode_captions(cache: CacheWriter, rows: Sequence[Row], workers: "WorkHere | WorkerPool") -> int:
    """Encodes the captions that the cache lacks, each text once; returns their number."""
    missing: dict[str, CaptionTask] = {}
    for row in rows:
        for key, caption in zip(row.text_keys, row.captions, strict=True):
            if not cache.has_text(key):
                missing.setdefault(key, CaptionTask(key, caption, row.sample_id))
    with tqdm(total=len(missing), desc="captions", unit="caption", disable=not missing) as bar:
        for task, _ in workers.run(list(missing.values()), bar.update):
            if isinstance(workers, WorkerPool):
                cache.take_part(cache.parts.find(f"text-{task.key}"))
    return len(missing)


def _lost_tails(cache: CacheWriter, rows: Sequence[Row], weights: WeightsFolder) -> dict[str, str]:
    """Returns the truncated end of each caption that is too long for the text encoder, by caption."""
    pairs = ((key, text) for row in rows for key, text in zip(row.text_keys, row.captions, strict=True))
    cut = {text for key, text in pairs if len(set(cache.token_counts(key))) > 1}
    tokenizer = weights.load_tokenizer() if cut else None
    return {text: text[measure_caption(text, tokenizer).num_read :].strip() for text in cut}
