"""Posters of videos: a frame that is decoded once and stored."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mochi_tune.data_prep.clips import Cut
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.inspection import as_jpeg
from mochi_tune.errors import DataError
from mochi_tune.files import write_atomic
from mochi_tune.models.latents import FPS
from mochi_tune.ui.folder import OWN_FOLDER

POSTER_SIZE = 640
DECODE_SECONDS = 30.0


def thumbnail_path(folder: Path, path: Path, facts: os.stat_result) -> Path:
    """Returns the path of a video's poster, which changes whenever the video does."""
    key = repr((os.fspath(path), facts.st_mtime_ns, facts.st_size))
    return folder / OWN_FOLDER / "thumbnails" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.jpg"


def posters(folder: Path, videos: Sequence[Path]) -> list[Path | None]:
    """Returns a JPEG of the middle frame of each video; None if the video has vanished or cannot be decoded.

    Args:
        folder: folder of the page.
        videos: videos in it.
    """
    # The first video without a poster starts the child process.
    with ClipDecoder(DECODE_SECONDS) as decoder:
        return [poster(folder, decoder, video) for video in videos]


def poster(folder: Path, decoder: ClipDecoder, video: Path) -> Path | None:
    """Returns a JPEG of the middle frame of one video, see `posters`."""
    try:
        path = thumbnail_path(folder, video, video.stat())
        if path.exists():
            return path
        scan = decoder.scan(video)
        middle = int(scan.source_seconds * FPS / 2)
        decoded = decoder.cut(video, Cut(1, scan.height, scan.width, start=middle, allow_upscale=True))
    except (OSError, DataError):
        # A browser may play the video all the same.
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, as_jpeg(decoded.frames[0], POSTER_SIZE))
    return path
