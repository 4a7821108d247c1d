"""Finds the videos and stills of a folder, and what else lies there."""

from collections.abc import Iterable
from pathlib import Path

from mochi_tune.data_prep.stills import STILL_SUFFIXES
from mochi_tune.errors import DataError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".gif")
IMAGE_SUFFIXES = STILL_SUFFIXES
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
# Captions, which are read by other code.
CAPTION_SUFFIXES = (".txt", ".csv", ".jsonl", ".json")


def find_videos(folder: Path) -> list[Path]:
    """Lists the videos in `folder` and below it, sorted by path; files whose name starts with a dot are left out.

    Raises:
        DataError: the folder does not exist, is a file, or holds no video.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data.videos={folder} is not a folder: name the folder that holds your clips.")
    if not folder.is_dir():
        raise DataError(f"data.videos={folder} does not exist: name the folder that holds your clips.")
    videos = [path for path in _files(folder) if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise DataError(f"data.videos={folder} holds no video: put clips in it ({' '.join(VIDEO_SUFFIXES)}).")
    return videos


def find_unused(folder: Path, used: Iterable[Path]) -> list[Path]:
    """Lists the files in `folder` and below it that are neither among `used` nor captions: sound, archives, others.

    Files whose name starts with a dot are left out, sorted by path.
    """
    taken = set(used)
    return [path for path in _files(folder) if path not in taken and path.suffix.lower() not in CAPTION_SUFFIXES]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.name.startswith(".") and not path.is_dir())
