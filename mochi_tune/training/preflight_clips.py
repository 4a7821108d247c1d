"""Chooses the clips of a training: those that are held out, those that are measured, and the order of the others."""

import os
from collections.abc import Sequence

from mochi_tune.config.schema import DataConfig
from mochi_tune.config.sources import read_sources, share_of_buckets
from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache import Cache
from mochi_tune.data.order import ClipOrder, make_pools
from mochi_tune.errors import DataError
from mochi_tune.training.loader import held_out, spread, spread_over


def choose_held_out(data: DataConfig, cache: Cache, count: int, seed: int) -> list[int]:
    """Returns the indices of the clips that are held out for validation.

    Sources with validation: true hold out all clips of their videos, also those that another source has of the same
    videos. Without such a source, `held_out` chooses.

    Args:
        data: the settings of the sources.
        cache: of the run.
        count: number of clips for `held_out`.
        seed: of the run.

    Raises:
        DataError: sources with validation have no clip in the cache, or no other clip is left.
    """
    videos, named = video_names(data, cache), _validation_sources(data)
    if not named:
        return held_out(videos, count, seed)
    chosen = {video for video, source in zip(videos, cache.rows.column("source"), strict=True) if source in named}
    held = [number for number, video in enumerate(videos) if video in chosen]
    if not held or len(held) == len(videos):
        what = "no clip" if not held else "every video"
        raise DataError(
            f"the cache {cache.folder} has {what} of the sources with validation: true, {', '.join(sorted(named))}"
            f"{' and no other' if held else ''}: add clips to {'the other sources' if held else 'them'}, and run "
            "`mochi-tune prepare` again."
        )
    return held


def measured_clips(data: DataConfig, cache: Cache, held: Sequence[int], count: int) -> list[int]:
    """Returns the clips that validations measure: `count` of those held out, or of all if none is.

    Of sources with validation: true, each gives the same number, as far as it has clips.
    """
    named = _validation_sources(data)
    if not named:
        return spread(held or range(len(cache)), count)
    sources = cache.rows.column("source")
    groups = [[number for number in held if sources[number] == name] for name in sorted(named)]
    return spread_over(groups, count)


def video_names(data: DataConfig, cache: Cache) -> list[str]:
    """Returns the name of each clip's video: clips that several sources cut from one file have one name."""
    rows = cache.rows.tuples("source", "path")
    if not any(own.name or own.validation for own in data.sources):
        # As in earlier versions: the names decide what a run holds out, and its resumed part must hold out the same.
        return [f"{source}/{path}" if source else path for source, path in rows]
    folders = {source.name: os.path.realpath(source.folder) for source in read_sources(data)}
    names: dict[str, str] = {}
    return [
        names.setdefault(os.path.join(folders[source], path), f"{source}/{path}" if source else path)
        for source, path in rows
    ]


def clip_order(data: DataConfig, cache: Cache, held: Sequence[int], batch_size: int, seed: int) -> ClipOrder:
    """Returns the order of the training clips: all clips of a cache except those that are held out."""
    sources = {source.name: (source.repeats, source.weight) for source in read_sources(data)}
    rows = enumerate(cache.rows.tuples("source", "bucket"))
    are_held = frozenset(held)
    clips = {number: (source, Bucket(*bucket)) for number, (source, bucket) in rows if number not in are_held}
    pools = make_pools(clips, sources, share_of_buckets(data))
    return ClipOrder(pools, batch_size, seed)


def largest_clip(cache: Cache) -> Bucket:
    """Returns the size of the largest clips; settings such as data.buckets=auto allow larger ones than there are."""
    return max({Bucket(*size) for (size,) in cache.rows.tuples("bucket")}, key=lambda size: (size.num_tokens, size))


def bucket_shares(order: ClipOrder, cache: Cache) -> dict[Bucket, float]:
    """Returns the share of each size of clips among the samples."""
    draws: dict[Bucket, int] = {}
    for pool in order.pools:
        bucket = cache.rows[pool.clips[0]].bucket
        draws[bucket] = draws.get(bucket, 0) + pool.num_draws
    return {bucket: count / sum(draws.values()) for bucket, count in draws.items()}


def _validation_sources(data: DataConfig) -> set[str]:
    return {source.name for source in read_sources(data) if source.validation}
