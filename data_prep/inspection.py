"""Inspects a data set as the model will see it, without a model: each clip's pictures, captions and problems."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from mochi_tune.config.schema import DataConfig
from mochi_tune.data.rows import CacheSettings
from mochi_tune.data_prep.clips import TRANSFORM_VERSION, Cut, DecodedClip
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.gather import Clip, Inputs, cut_inputs, find_inputs
from mochi_tune.data_prep.probe import Scan
from mochi_tune.data_prep.report import MUCH_PICTURE, lost_picture
from mochi_tune.errors import DataError
from mochi_tune.models.text_encoder import MeasuredCaption, measure_caption

# Maximum number of clips with pictures; more would make the page too large for browsers.
MAX_DRAWN = 200
# Number of pictures per clip, first and last included; pixels of the longer side of a picture and of the source.
_NUM_PICTURES, PICTURE_SIZE, _SOURCE_SIZE = 6, 160, 240
# Mild flags are common, and do not make a clip worth showing first.
Weight = Literal["mild", "notable", "warning"]
_WEIGHTS: tuple[Weight, ...] = ("warning", "notable", "mild")


@dataclass(frozen=True)
class Flag:
    """A remark about a clip, such as a warning."""

    text: str
    weight: Weight


@dataclass(frozen=True)
class SeenClip:
    """A clip that was decoded.

    Attributes:
        clip: its row, its file and its cut.
        report: what was done to it, as `DecodedClip.report`.
        flags: of the clip.
        pictures: JPEG of some of its frames, in order; () if it is not drawn.
        source: JPEG of its first frame before cropping; b"" if it is not drawn.
    """

    clip: Clip
    report: dict[str, Any]
    flags: tuple[Flag, ...]
    pictures: tuple[bytes, ...] = ()
    source: bytes = b""


@dataclass
class Inspection:
    """The result of an inspection.

    Attributes:
        inputs: files with their properties, and unused files.
        clips: in the order of `inputs`, without refused ones.
        refused: why a file or a clip cannot be used, by its name.
        captions: of all clips, by text.
    """

    inputs: Inputs
    clips: list[SeenClip] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    captions: dict[str, MeasuredCaption] = field(default_factory=dict)


def inspect_clips(data: DataConfig, seed: int, tokenizer: Any | None) -> Inspection:
    """Finds, cuts and decodes all clips as `prepare` does.

    Args:
        data: the settings.
        seed: of the captions' tags.
        tokenizer: of the text encoder; None if it is missing.

    Raises:
        DataError: there are no videos.
    """
    # A clip without a caption is flagged, not an error as in `prepare`.
    inputs = find_inputs(data.model_copy(update={"allow_empty_captions": True}), seed)
    # `cut_inputs` saves the scans of files there, for `prepare`.
    Path(data.cache).mkdir(parents=True, exist_ok=True)
    # Nothing is encoded, so the keys of rows do not matter.
    settings = CacheSettings({"version": TRANSFORM_VERSION, "buckets": {}}, "", "", "", "")
    with ClipDecoder(data.decode_timeout_seconds) as decoder:
        cut_inputs(inputs, data, settings, decoder)
        found = Inspection(inputs, refused=dict(inputs.refused))
        texts = dict.fromkeys(text for clip in inputs.clips for text in clip.row.captions)
        found.captions = {text: measure_caption(text, tokenizer) for text in texts}
        clips = [(clip, inputs.scans[clip.file.name]) for clip in inputs.clips]
        flags = [
            find_flags(scan, clip.cut, [found.captions[text] for text in clip.row.captions]) for clip, scan in clips
        ]
        drawn = {clips[index][0].row.sample_id for index in choose_drawn(flags, MAX_DRAWN)}
        for clip, source, decoded in tqdm(_decode(inputs, drawn, decoder), desc="clips", total=len(clips), unit="clip"):
            if isinstance(decoded, DataError):
                found.refused[clip.row.sample_id] = str(decoded)
            else:
                found.clips.append(_inspect(found, clip, source, decoded))
    return found


def find_flags(
    scan: Scan, cut: Cut, captions: Sequence[MeasuredCaption], report: Mapping[str, Any] | None = None
) -> tuple[Flag, ...]:
    """Returns the flags of a clip, warnings first.

    Args:
        scan: of its file.
        cut: of the clip.
        captions: of the clip.
        report: of decoding it; None before that.
    """
    scale = max(cut.height / scan.height, cut.width / scan.width)
    lost = 1 - cut.height * cut.width / (scale**2 * scan.height * scan.width)
    if report:
        # The exact value, from the integer size that it was scaled to.
        lost = lost_picture(report)
    tokens = max(caption.lost_tokens for caption in captions)
    found: list[tuple[Any, str, Weight]] = [
        (lost > MUCH_PICTURE, f"crop loses {lost:.0%} of the picture", "warning"),
        (scale > 1, f"enlarged {scale:.2f} times", "warning"),
        (tokens, f"caption loses {tokens} tokens", "warning"),
        (not any(caption.text for caption in captions), "no caption", "warning"),
        (scan.has_discontinuity, "its clock jumps", "warning"),
        (scan.hdr, f"HDR, {scan.hdr}, tone-mapped", "notable"),
        (scan.is_interlaced, "deinterlaced", "notable"),
        # A rotation by 180 and a top-bottom mirror are a left-right mirror.
        (scan.rotation and (scan.rotation, scan.is_mirrored) != (180, True), f"turned by {scan.rotation}°", "notable"),
        (scan.is_mirrored, "mirrored", "notable"),
        (scan.pixel_aspect != 1, f"pixels {scan.pixel_aspect:.3g} times as wide as high, made square", "notable"),
        (cut.frame_rate == "retime", f"{scan.source_fps:.4g} fps played at 30", "notable"),
        ("assumed" in scan.color_matrix, f"colours: {scan.color_matrix}", "mild"),
    ]
    if report and 1 < cut.num_frames != report["distinct_frames"]:
        found.insert(0, (True, f"{report['distinct_frames']} distinct of {cut.num_frames} frames", "warning"))
    return tuple(Flag(text, weight) for is_so, text, weight in found if is_so)


def choose_drawn(flags: Sequence[Sequence[Flag]], most: int) -> set[int]:
    """Returns the numbers of the clips to draw: those with warnings first, then notable flags; each group evenly."""
    ranks = [min((_WEIGHTS.index(flag.weight) for flag in own), default=len(_WEIGHTS) - 1) for own in flags]
    chosen: set[int] = set()
    for rank in range(len(_WEIGHTS)):
        those, room = [index for index, own in enumerate(ranks) if own == rank], most - len(chosen)
        chosen |= set(those if len(those) <= room else (those[i * len(those) // room] for i in range(room)))
    return chosen


def whole_frame(scan: Scan, cut: Cut) -> Cut:
    """Returns a cut of a clip's first frame, small and uncropped."""
    share = min(_SOURCE_SIZE / max(scan.width, scan.height), 1)
    height, width = (max(round(side * share), 1) for side in (scan.height, scan.width))
    return replace(cut, num_frames=1, height=height, width=width, allow_upscale=True)


def _decode(
    inputs: Inputs, drawn: set[str], decoder: ClipDecoder
) -> Iterator[tuple[Clip, DecodedClip | DataError | None, DecodedClip | DataError]]:
    """Yields each clip with its source's picture, if it is drawn, and its frames; decodes each file once."""
    by_file: dict[str, list[tuple[Clip, Cut]]] = {}
    for clip in inputs.clips:
        cuts = by_file.setdefault(clip.file.name, [])
        if clip.row.sample_id in drawn:
            cuts.append((clip, whole_frame(inputs.scans[clip.file.name], clip.cut)))
        cuts.append((clip, clip.cut))
    source: DecodedClip | DataError | None = None
    jobs = [(own[0][0].file.path, [cut for _, cut in own]) for own in by_file.values()]
    in_order = (pair for own in by_file.values() for pair in own)
    for (clip, cut), (_, _, decoded) in zip(in_order, decoder.cut_all(jobs), strict=True):
        if cut is not clip.cut:
            source = decoded
        else:
            yield clip, source, decoded
            source = None


def _inspect(found: Inspection, clip: Clip, source: DecodedClip | DataError | None, decoded: DecodedClip) -> SeenClip:
    captions = [found.captions[text] for text in clip.row.captions]
    flags = find_flags(found.inputs.scans[clip.file.name], clip.cut, captions, decoded.report)
    if not isinstance(source, DecodedClip):
        return SeenClip(clip, decoded.report, flags)
    last = len(decoded.frames) - 1
    numbers = sorted({round(i * last / (_NUM_PICTURES - 1)) for i in range(_NUM_PICTURES)})
    pictures = tuple(as_jpeg(decoded.frames[number], PICTURE_SIZE) for number in numbers)
    return SeenClip(clip, decoded.report, flags, pictures, as_jpeg(source.frames[0], _SOURCE_SIZE))


def as_jpeg(frame: Tensor, size: int) -> bytes:
    """Returns a uint8 (H, W, 3) frame as JPEG, its longer side at most `size` pixels."""
    from PIL import Image

    picture, content = Image.fromarray(frame.numpy()), io.BytesIO()
    picture.thumbnail((size, size))
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()
