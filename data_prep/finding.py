"""Finds videos and stills in a folder, and reports its other files."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mochi_tune.config.load import RECORDS
from mochi_tune.data_prep.stills import STILL_SUFFIXES, is_animation
from mochi_tune.errors import DataError, counted, some

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".gif")
_IMAGE_SUFFIXES = STILL_SUFFIXES
_ANIMATED_SUFFIX = ".webp"
MEDIA_SUFFIXES = (*VIDEO_SUFFIXES, *_IMAGE_SUFFIXES)
# Suffixes of captions, which other modules read.
_CAPTION_SUFFIXES = (".txt", ".caption", ".csv", ".tsv", ".jsonl", ".json")
# Reason why a still is not used: no bucket has one frame.
STILL = "is a still picture, which data.buckets=auto uses"
# Reason why a file of another kind is not used.
UNKNOWN = "is not a known video format"
# Reason why the videos are skipped that genmo's trainer writes next to clips, to show what its VAE makes of them.
_RECONSTRUCTION, RECONSTRUCTED = ".recon.mp4", "is a reconstruction that genmo's trainer wrote, not a clip"
# Reason why clips next to the files of a Hugging Face dataset are not used.
BESIDE_DATASET = "lies next to a dataset, whose own videos are used"
# `init` writes it next to the clips, and datasets come with one.
_README = "README.md"
# Settings with which a training uses stills.
TAKES_STILLS = "data.buckets=auto or a bucket of one frame"
# Reasons why folders that this program has written are skipped: the videos of a run are not clips.
MADE_HERE = ("is a run of mochi-tune", "is a cache of mochi-tune")


def find_videos(
    folder: Path, with_stills: bool = False, setting: str = "data.videos", takes_stills: str = ""
) -> list[Path]:
    """Lists the videos in `folder` and below it, sorted by path; names that start with a dot are left out.

    Args:
        folder: to search.
        with_stills: whether to include still pictures.
        setting: that names the folder, for errors.
        takes_stills: settings that include stills, for errors; "" for verbs that read no picture files, not even
            animated ones.

    Raises:
        DataError: the folder does not exist, is a file, or holds no video.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{setting}={folder} is not a folder: use the folder with your clips.")
    if not folder.is_dir():
        raise DataError(f"{setting}={folder} does not exist: use the folder with your clips.")
    closed: dict[str, str] = {}
    videos = list_videos(folder, with_stills, closed, with_animations=bool(takes_stills))
    if not videos:
        suffixes = MEDIA_SUFFIXES if with_stills else VIDEO_SUFFIXES
        made = [f"{path} {why}" for path, why in sorted(closed.items()) if why in MADE_HERE]
        stills = [
            clip_name("", folder, path) for path in _files(folder, lambda path: suffix_of(path) in _IMAGE_SUFFIXES)
        ]
        others = [f"output of mochi-tune ({some(made)})"] if made else []
        others += [f"{counted(len(stills), 'still')} ({some(stills)})"] if stills else []
        but = f" but {' and '.join(others)}" if others else ""
        or_take = f", or include the stills with {takes_stills}" if stills and takes_stills else ""
        raise DataError(f"{setting}={folder} holds no video{but}: put clips in it ({' '.join(suffixes)}){or_take}.")
    return videos


def list_videos(
    folder: Path, with_stills: bool = False, closed: dict[str, str] | None = None, with_animations: bool = True
) -> list[Path]:
    """Lists the videos like `find_videos`; the folder may have none.

    Args:
        folder: to search.
        with_stills: whether to include still pictures.
        closed: for `walk`.
        with_animations: whether to include animated WebP.
    """
    suffixes = MEDIA_SUFFIXES if with_stills else VIDEO_SUFFIXES

    def is_wanted(path: str) -> bool:
        suffix = suffix_of(path)
        if path.lower().endswith(_RECONSTRUCTION):
            return False
        # WebP may be a video or a still: read the header if that decides.
        return suffix in suffixes or (with_animations and suffix == _ANIMATED_SUFFIX and is_animation(path))

    return _files(folder, is_wanted, closed)


def find_unused(folder: Path, used: Iterable[Path]) -> dict[Path, str]:
    """Returns the files in `folder` and below it that are neither in `used` nor captions, with the reasons.

    README.md and files whose name starts with a dot are left out. Folders that were not searched are included.
    """
    taken, unused, closed = set(used), {}, {}
    for path in _files(folder, lambda path: suffix_of(path) not in _CAPTION_SUFFIXES, closed):
        if path not in taken and path.name != _README:
            why = STILL if path.suffix.lower() in _IMAGE_SUFFIXES else UNKNOWN
            unused[path] = f"{path}: {RECONSTRUCTED if path.name.lower().endswith(_RECONSTRUCTION) else why}"
    return unused | {Path(path): f"{path}: {why}" for path, why in closed.items()}


def clip_name(source: str, folder: Path, path: Path) -> str:
    """Returns the name of a file in the cache and its report: the source's name, if any, and the path in its folder."""
    name = as_utf8(path.relative_to(folder).as_posix())
    return f"{source}/{name}" if source else name


def as_utf8(text: str) -> str:
    """Escapes the bytes of a file's name that are not UTF-8, which cannot be written to a report."""
    return text.encode(errors="backslashreplace").decode()


def walk(folder: Path, closed: dict[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields the path and the name of each file in `folder` and below it; does not follow links to folders.

    The order is arbitrary, and there is no system call per file: a folder may have 100,000. Subfolders whose name
    starts with a dot are left out, as file managers keep deleted files there. Runs and caches of this program are
    skipped, unless `folder` itself is one.

    Args:
        folder: to search.
        closed: filled with the folders that are not searched, and the reasons.
    """
    closed = {} if closed is None else closed
    folders, is_top = ["" if str(folder) == "." else str(folder)], True
    while folders:
        parent = folders.pop()
        try:
            with os.scandir(parent or ".") as found:
                entries = list(found)
        except PermissionError:
            closed[parent] = "is a folder that cannot be read: change its permissions"
            continue
        start = os.path.join(parent, "")
        if not is_top and (made := _made_here(start, {entry.name for entry in entries})):
            closed[parent] = made
            continue
        is_top = False
        for entry in entries:
            path = start + entry.name
            if entry.is_dir(follow_symlinks=False):
                folders += [] if entry.name.startswith(".") else [path]
            elif not (entry.is_symlink() and Path(path).is_dir()):
                yield path, entry.name
            elif not entry.name.startswith("."):
                closed[path] = "is a link to a folder, which is not followed: add that folder to data.sources"


def _made_here(start: str, names: set[str]) -> str:
    """Returns the reason in MADE_HERE for a folder, given its path with a slash and the names in it; "" if none."""
    if "config.yaml" in names and any(any(Path(start).glob(record)) for record in RECORDS):
        return MADE_HERE[0]
    # Other programs write manifest.json next to clips too.
    if {"manifest.json", "data"} <= names and os.path.isdir(f"{start}data"):
        with contextlib.suppress(PermissionError):
            if any(name.startswith("train-") and name.endswith(".parquet") for name in os.listdir(f"{start}data")):
                return MADE_HERE[1]
    return ""


def suffix_of(name: str) -> str:
    """Returns the suffix of a file's name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def _files(folder: Path, is_wanted: Callable[[str], bool], closed: dict[str, str] | None = None) -> list[Path]:
    """Lists the files whose path is wanted and whose name does not start with a dot, sorted by path."""
    found = (path for path, name in walk(folder, closed) if not name.startswith(".") and is_wanted(path))
    # By path components, like `Path` objects are compared.
    return [Path(path) for path in sorted(found, key=lambda path: path.split(os.sep))]
