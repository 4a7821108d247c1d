"""The sources of clips in data.videos or data.sources, each with its buckets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mochi_tune.config.schema import Buckets, ClipMode, DataConfig
from mochi_tune.data.buckets import Bucket, auto_buckets, read_buckets
from mochi_tune.errors import ConfigError
from mochi_tune.models.latents import check_geometry

# Settings, besides the sizes, that determine the clips and captions that `prepare` encodes.
_PREPARED = (
    "clips", "clip_stride", "max_clips", "frame_rate", "hdr", "captions", "caption_prefix", "caption_suffix",
    "tag_dropout", "caption_variants",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A folder of videos.

    Attributes:
        name: its own name, or else that of the folder; "" if it is the only source and has no name of its own.
        folder: folder of the videos.
        buckets: sizes of its clips.
        clips: which clips are cut from a video.
        caption_prefix: text before each caption.
        repeats: how often an epoch takes each clip.
        weight: share of the draws relative to the weights of the other sources; None: by `repeats`.
        shorter: setting that makes its clips shorter, for errors.
        validation: whether its clips are held out for validation.
    """

    name: str
    folder: Path
    buckets: list[Bucket]
    clips: ClipMode
    caption_prefix: str
    repeats: float = 1.0
    weight: float | None = None
    shorter: str = "a smaller data.num_frames"
    validation: bool = False

    @property
    def takes_stills(self) -> bool:
        """Whether still pictures are clips too: a bucket has one frame."""
        return any(bucket.num_frames == 1 for bucket in self.buckets)


def read_sources(data: DataConfig) -> list[Source]:
    """Returns the sources that the settings name.

    Raises:
        ConfigError: buckets do not fit the models, two sources have one name, one has none, only some have weights,
            none is left to train on, or settings of windows do not fit each other.
    """
    _check_windows(data)
    if not data.sources:
        buckets, shorter = _buckets(data, None, 0), _shorter(data, None, 0)
        return [Source("", Path(data.videos), buckets, data.clips, data.caption_prefix, shorter=shorter)]
    sources = [
        Source(
            own.name or _name(Path(own.folder), len(data.sources) == 1),
            Path(own.folder),
            _buckets(data, own.buckets, number),
            own.clips or data.clips,
            data.caption_prefix if own.caption_prefix is None else own.caption_prefix,
            own.repeats,
            own.weight,
            _shorter(data, own.buckets, number),
            own.validation,
        )
        for number, own in enumerate(data.sources)
    ]
    _check_sources(sources)
    return sources


def buckets_by_source(data: DataConfig) -> dict[str, list[Bucket]]:
    """Returns the sizes of clips, by the name of their source.

    Raises:
        ConfigError: as `read_sources`.
    """
    return {source.name: source.buckets for source in read_sources(data)}


def prepared_settings(data: DataConfig) -> dict[str, Any]:
    """Returns the settings, besides the sizes, that determine the cache, by name, as JSON values."""
    found = {f"data.{name}": getattr(data, name) for name in _PREPARED}
    for source, own in zip(read_sources(data), data.sources, strict=False):
        for name in ("clips", "caption_prefix"):
            if getattr(own, name) is not None:
                found[f"{name} of {source.name}"] = getattr(own, name)
    return found


def largest_bucket(data: DataConfig) -> Bucket:
    """Returns the bucket with the most tokens, which determines the memory of a run.

    Raises:
        ConfigError: as `read_sources`.
    """
    buckets = [bucket for sizes in buckets_by_source(data).values() for bucket in sizes]
    return max(buckets, key=lambda bucket: (bucket.num_tokens, bucket))


def share_of_buckets(data: DataConfig) -> dict[Bucket, float]:
    """Returns the share of the draws of each bucket in the settings; {} for shares in proportion to the clips.

    Raises:
        ConfigError: there is no list of buckets, or one of another length.
    """
    if data.bucket_shares is None:
        return {}
    if own := [source.folder for source in data.sources if source.buckets is not None and not source.validation]:
        raise ConfigError(
            f"data.bucket_shares refers to data.buckets, and the source {own[0]} has its own buckets: leave one of "
            "them out."
        )
    if not isinstance(data.buckets, list):
        raise ConfigError(
            "data.bucket_shares are of the sizes that data.buckets lists, and there is no such list: set data.buckets "
            "to a list, or leave data.bucket_shares out."
        )
    listed = data.buckets
    if len(listed) != len(data.bucket_shares):
        raise ConfigError(
            f"data.bucket_shares has {len(data.bucket_shares)} numbers and data.buckets lists {len(listed)} sizes: "
            "give each size its share."
        )
    return dict(zip(read_buckets(listed, "data.buckets"), data.bucket_shares, strict=True))


def _check_sources(sources: Sequence[Source]) -> None:
    """Refuses sources that do not fit each other."""
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"data.sources has two sources with the name {twice[0]}, which identifies their clips: give one of them a "
            f"name: {{folder: ..., name: {twice[0]}_2}}."
        )
    trained = [source for source in sources if not source.validation]
    if not trained:
        raise ConfigError(
            "data.sources has no source to train on, as each has validation: true: leave that out of one, or add a "
            "source without it."
        )
    for source in sources:
        if source.validation and (source.repeats != 1 or source.weight is not None):
            raise ConfigError(
                f"data.sources: the source {source.name} has validation: true, and its clips are not trained on: leave "
                "its repeats or weight out."
            )
    weights = [source.weight for source in trained]
    if any(weights) and (None in weights or any(source.repeats != 1 for source in trained)):
        raise ConfigError("data.sources: give either each source a weight or use repeats, which weights replace.")


def _name(folder: Path, is_alone: bool) -> str:
    """Returns the source name of the clips of a folder."""
    # A single source needs no name; the clips of existing caches must keep their names.
    name = folder.name if is_alone or folder.name not in ("", "..") else folder.resolve().name
    if not (name or is_alone):
        raise ConfigError(
            f"data.sources: the folder {folder} has no name: give it one, name: NAME, or name the folders in it."
        )
    return name


def _shorter(data: DataConfig, own: Buckets | None, number: int) -> str:
    """Returns the setting that makes the clips of source `number` shorter; `own` are its own buckets."""
    if own is None and data.buckets is None:
        return "a smaller data.num_frames"
    return f"shorter buckets in {_buckets_setting(own, number)}"


def _buckets_setting(own: Buckets | None, number: int) -> str:
    return "data.buckets" if own is None else f"data.sources[{number}].buckets"


def _buckets(data: DataConfig, own: Buckets | None, number: int) -> list[Bucket]:
    """Returns the buckets of source `number`, with its own buckets `own` if any."""
    asked = data.buckets if own is None else own
    if asked is None:
        check_geometry(data.num_frames, data.height, data.width)
        return [Bucket(data.num_frames, data.height, data.width)]
    if asked != "auto":
        return read_buckets(asked, _buckets_setting(own, number))
    longest = data.num_frames if data.max_frames is None else data.max_frames
    check_geometry(longest, data.height, data.width)
    if data.resolution is None:
        return auto_buckets(longest, data.height, data.width)
    return auto_buckets(longest, *([max(round(data.resolution / 16), 1) * 16] * 2))


def _check_windows(data: DataConfig) -> None:
    """Refuses settings of clips that other settings leave unused."""
    modes = {data.clips, *(own.clips for own in data.sources)}
    if "uniform" in modes and data.max_clips is None:
        raise ConfigError("data.clips=uniform spreads data.max_clips clips over each video: set data.max_clips=4.")
    if data.clip_stride is not None and "slide" not in modes:
        raise ConfigError(f"data.clip_stride={data.clip_stride} does nothing without data.clips=slide: leave it out.")
    asked = {str(data.buckets), *(str(own.buckets) for own in data.sources)}
    for name in ("resolution", "max_frames"):
        if getattr(data, name) is not None and "auto" not in asked:
            raise ConfigError(f"data.{name} does nothing without data.buckets=auto: set that, or leave it out.")
