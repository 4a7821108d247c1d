"""Pictures that stand for a video until it is played: a frame of it, decoded once and kept."""

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
    """Returns where the picture of a video is kept: another place after each change of the video."""
    key = repr((os.fspath(path), facts.st_mtime_ns, facts.st_size))
    return folder / OWN_FOLDER / "thumbnails" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.jpg"


def posters(folder: Path, videos: Sequence[Path]) -> list[Path | None]:
    """Returns a JPEG of the middle of each video; None for one that has vanished or cannot be decoded.

    Args:
        folder: of the page.
        videos: in it.
    """
    # The child process is started by the first video that has no picture yet.
    with ClipDecoder(DECODE_SECONDS) as decoder:
        return [poster(folder, decoder, video) for video in videos]


def poster(folder: Path, decoder: ClipDecoder, video: Path) -> Path | None:
    """Returns a JPEG of the middle of one video, see `posters`."""
    try:
        path = thumbnail_path(folder, video, video.stat())
        if path.exists():
            return path
        scan = decoder.scan(video)
        middle = int(scan.source_seconds * FPS / 2)
        decoded = decoder.cut(video, Cut(1, scan.height, scan.width, start=middle, allow_upscale=True))
    except (OSError, DataError):
        # It is shown without a picture; a browser may play it all the same.
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, as_jpeg(decoded.frames[0], POSTER_SIZE))
    return path
