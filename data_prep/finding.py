"""Finds the videos and stills of a folder, and what else lies there."""

from collections.abc import Iterable
from pathlib import Path

from mochi_tune.data_prep.stills import STILL_SUFFIXES
from mochi_tune.errors import DataError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".gif")
IMAGE_SUFFIXES = STILL_SUFFIXES
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
# Captions, which are read by other code.
CAPTION_SUFFIXES = (".txt", ".caption", ".csv", ".tsv", ".jsonl", ".json")


def find_videos(folder: Path, with_stills: bool = False, setting: str = "data.videos") -> list[Path]:
    """Lists the videos in `folder` and below it, sorted by path; files whose name starts with a dot are left out.

    Args:
        folder: to look in.
        with_stills: whether still pictures count too.
        setting: that names the folder.

    Raises:
        DataError: the folder does not exist, is a file, or holds no video.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{setting}={folder} is not a folder: name the folder that holds your clips.")
    if not folder.is_dir():
        raise DataError(f"{setting}={folder} does not exist: name the folder that holds your clips.")
    suffixes = MEDIA_SUFFIXES if with_stills else VIDEO_SUFFIXES
    videos = [path for path in _files(folder) if path.suffix.lower() in suffixes]
    if not videos:
        raise DataError(f"{setting}={folder} holds no video: put clips in it ({' '.join(suffixes)}).")
    return videos


def find_unused(folder: Path, used: Iterable[Path]) -> dict[Path, str]:
    """Returns why the files in `folder` and below it are not taken that are neither among `used` nor captions.

    Files whose name starts with a dot are left out.
    """
    taken, unused = set(used), {}
    for path in _files(folder):
        suffix = path.suffix.lower()
        if path not in taken and suffix not in CAPTION_SUFFIXES:
            is_still = suffix in IMAGE_SUFFIXES
            why = "is a still picture, which data.buckets=auto takes" if is_still else "is no video that is known"
            unused[path] = f"{path}: {why}"
    return unused


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if not path.name.startswith(".") and not path.is_dir())
    # In the order of paths, whose own comparison takes them apart each time.
    return sorted(found, key=lambda path: path.parts)
