"""Finds what to encode: the files of all sources, their captions, and the clips to cut from them."""

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mochi_tune.config.schema import DataConfig
from mochi_tune.config.sources import Source, read_sources
from mochi_tune.data.cache import PARTS_FOLDER
from mochi_tune.data.rows import CacheSettings, Row, make_row
from mochi_tune.data_prep.caption_tables import find_other_tables
from mochi_tune.data_prep.captions import CaptionRules, find_orphans, load_captions
from mochi_tune.data_prep.clips import Cut
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.finding import (
    BESIDE_DATASET,
    STILL,
    TAKES_STILLS,
    as_utf8,
    clip_name,
    find_unused,
    find_videos,
    list_videos,
)
from mochi_tune.data_prep.hashes import HASHES_FILE, FileHashes, Signature, signature
from mochi_tune.data_prep.hf_dataset import is_dataset, materialise_dataset
from mochi_tune.data_prep.probe import Scan
from mochi_tune.data_prep.windows import choose_cuts, decisive
from mochi_tune.errors import DataError, counted, printable, some
from mochi_tune.files import parse_object, write_atomic

# Folder in the cache for the videos of Hugging Face datasets. `datasets.load_dataset(cache)` skips names with a dot.
_DATASET_FOLDER = ".dataset"
# Folder in it for the dataset in data.videos; those of data.sources have the names of their sources.
_ALONE = "_"
_SCANS_FILE = ".scans.json"
# Increase it when the same file would give another scan, or be refused: all files are scanned again.
_SCANS_VERSION = 3
# Minimum seconds between two saves of the scans, and minimum time as a multiple of the last save's duration: each save
# writes all scans, and must take a small share of the time however many there are.
SAVE_SECONDS, SAVE_TIMES = 30.0, 20
NO_VIDEO = "is a caption of no video"


@dataclass(frozen=True)
class MediaFile:
    """A video or a still of a source.

    Attributes:
        name: its path in the source's folder, after the source's name if there are several sources.
        path: of the file.
        relative: its path in the source's folder.
        source: that it belongs to.
        captions: one or more; ("",) if it has none.
    """

    name: str
    path: Path
    relative: str
    source: Source
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Clip:
    """A clip to encode: its row in the cache, its file, and its cut."""

    row: Row
    file: MediaFile
    cut: Cut


@dataclass
class Inputs:
    """All inputs of a `prepare`.

    Attributes:
        files: videos and stills, by name.
        clips: to encode, grouped by file, by ascending start.
        scans: properties of each file, by its name.
        signatures: of each file, by its name; they show whether it was changed.
        refused: why a file cannot be used, by its name.
        unused: why a file is not a clip or a caption, by its name.
        max_clips: maximum number of clips from one video; None for no limit.
    """

    files: dict[str, MediaFile] = field(default_factory=dict)
    clips: list[Clip] = field(default_factory=list)
    scans: dict[str, Scan] = field(default_factory=dict)
    signatures: dict[str, Signature] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    max_clips: int | None = None


def find_inputs(data: DataConfig, seed: int) -> Inputs:
    """Finds the files of all sources with their captions; does not open the videos.

    Raises:
        DataError: a source has no video, clips have no caption, or a table cannot be read.
    """
    inputs, without, orphans = Inputs(max_clips=data.max_clips), [], []
    sources = read_sources(data)
    for number, source in enumerate(sources):
        folder = source.folder
        setting = f"data.sources[{number}].folder" if data.sources else "data.videos"
        if folder.is_dir() and is_dataset(folder):
            folder = materialise_dataset(folder, Path(data.cache) / _DATASET_FOLDER / (source.name or _ALONE))
            # A row may name one of them.
            linked = {os.path.realpath(path) for path in list_videos(folder)}
            for path in list_videos(source.folder, source.takes_stills):
                if os.path.realpath(path) not in linked:
                    name = clip_name(source.name, source.folder, path)
                    inputs.unused[name] = as_utf8(f"{path}: {BESIDE_DATASET}")
        videos = find_videos(folder, source.takes_stills, setting, TAKES_STILLS)
        names = {video: clip_name(source.name, folder, video) for video in videos}
        found = load_captions(folder, videos, CaptionRules.from_config(data, source, seed))
        for note in found.notes:
            tqdm.write(printable(note))
        for video, name in names.items():
            captions, relative = found.texts.get(video, ("",)), video.relative_to(folder).as_posix()
            inputs.files[name] = MediaFile(name, video, relative, source, captions)
            if as_utf8(relative) != relative:
                inputs.refused[name] = f"{as_utf8(str(video))}: its name is not valid UTF-8: rename it."
            elif video in found.refused:
                inputs.refused[name] = found.refused[video]
            elif captions == ("",):
                without.append(name)
        unused = find_unused(folder, videos)
        # Captions of unused stills are not orphans: the still is reported instead.
        alone = find_orphans(folder, [*videos, *(path for path, why in unused.items() if why.endswith(STILL))])
        for path in [folder / name for name in alone]:
            inputs.unused[clip_name(source.name, folder, path)] = f"{path}: {NO_VIDEO}"
        orphans += alone
        for path, why in unused.items():
            inputs.unused[clip_name(source.name, folder, path)] = as_utf8(why)
    _check_captions(data, without, orphans, inputs)
    return inputs


def _check_captions(data: DataConfig, without: list[str], orphans: list[str], inputs: Inputs) -> None:
    if without and not data.allow_empty_captions:
        # The usual cause is a typo in a file's name; showing both names makes it visible.
        typos = f"; captions without a video: {some(orphans)}" if orphans else ""
        folders = [source.folder for source in read_sources(data)]
        videos = [file.path for file in inputs.files.values()]
        if others := [path for folder in folders for path in find_other_tables(folder, videos)]:
            typos += f"; {others[0].name} is not read: a table of captions must be metadata{others[0].suffix}"
        where = ", ".join(map(str, folders))
        found = printable(f"{counted(len(videos), 'clip')} in {where} ({some(without)}{typos})")
        raise DataError(
            f"without a caption (missing or empty): {len(without)} of {found}: write each one's caption into a .txt "
            "file of its name, or set data.allow_empty_captions=true to train without them."
        )
    if orphans:
        tqdm.write(printable(f"captions without a video of that name, not used: {some(orphans, limit=10)}"))


def cut_inputs(
    inputs: Inputs, data: DataConfig, settings: CacheSettings, decoder: ClipDecoder, share: str = ""
) -> None:
    """Reads the hash and the properties of each file, and adds its clips or the reason why it has none.

    Hashes and properties are saved in the cache's folder, or in the folder of a share's parts, so that the next run
    opens only new and changed files. A run that is stopped keeps what it has read.
    """
    files = [file for name, file in inputs.files.items() if name not in inputs.refused]
    with _KnownFiles(Path(data.cache), share) as known:
        for file in tqdm(files, desc="files", unit="file"):
            try:
                inputs.signatures[file.name] = signature(file.path)
                sha256, scan = known.read(file.path, inputs.signatures[file.name], decoder)
                inputs.scans[file.name] = scan
                cuts = _choose_cuts(file, scan, data)
            except DataError as error:
                inputs.refused[file.name] = str(error)
                continue
            # Only for these files, so that the keys of all others stay the same.
            colours = {"from_profile": True} if scan.has_profile else {}
            colours |= {"colour_rules": scan.colour_rules} if scan.colour_rules > 1 else {}
            for cut in cuts:
                values = decisive(cut) | colours
                row = make_row(file.relative, file.captions, sha256, values, settings, file.source.name)
                inputs.clips.append(Clip(row, file, cut))


class _KnownFiles:
    """Hashes and scans of files; a context manager that saves them regularly and when the block ends or fails.

    Args:
        cache: folder that they are saved in.
        share: of the work, whose folder they are saved in instead; "" for none.
    """

    def __init__(self, cache: Path, share: str) -> None:
        parts = cache / PARTS_FOLDER
        self._kept = (parts / share if share else cache) / _SCANS_FILE
        self._before = _kept_scans(self._kept)
        self._known = self._before | {
            sha256: scan
            for file in (cache / _SCANS_FILE, *sorted(parts.glob(f"*/{_SCANS_FILE}")))
            for sha256, scan in _kept_scans(file).items()
        }
        others = [cache / HASHES_FILE, *parts.glob(f"*/{HASHES_FILE}")]
        self._hashes = FileHashes(self._kept.with_name(HASHES_FILE), others)
        self._now: dict[str, Scan] = {}
        self._next_save = time.monotonic() + SAVE_SECONDS

    def __enter__(self) -> "_KnownFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._save(is_whole=True)
        else:
            self._save_what_is_read()

    def read(self, path: Path, found: Signature, decoder: ClipDecoder) -> tuple[str, Scan]:
        """Returns the hash and the scan of a file with this signature; opens the file only if it is not known.

        Raises:
            DataError: the file cannot be read.
        """
        if time.monotonic() >= self._next_save:
            begun = time.monotonic()
            self._save_what_is_read()
            self._next_save = time.monotonic() + max(SAVE_SECONDS, SAVE_TIMES * (time.monotonic() - begun))
        sha256 = self._hashes.sha256(path, found)
        scan = self._known[sha256] if sha256 in self._known else decoder.scan(path)
        self._now[sha256] = scan
        return sha256, scan

    def _save_what_is_read(self) -> None:
        # The next run can read the files again, so a full disk must not replace the reason for which this one ends.
        with contextlib.suppress(OSError):
            self._save(is_whole=False)

    def _save(self, is_whole: bool) -> None:
        """Saves what this run has read and, until all files are read, what earlier runs have saved."""
        self._hashes.save(is_whole)
        scans = self._now if is_whole else self._before | self._now
        if scans != self._before:
            # Atomically: `inspect` may read the file while `prepare` writes it.
            values = {sha256: scan.to_json() for sha256, scan in scans.items()}
            write_atomic(self._kept, json.dumps({"version": _SCANS_VERSION, "scans": values}).encode())
            self._before = dict(scans)


def _choose_cuts(file: MediaFile, scan: Scan, data: DataConfig) -> list[Cut]:
    try:
        return choose_cuts(scan, file.source.buckets, file.source.clips, data, file.source.shorter)
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from None


def _kept_scans(path: Path) -> dict[str, Scan]:
    """Returns the scans that an earlier run saved, by hash; {} if their version differs or the file is damaged."""
    kept = (parse_object(path.read_bytes()) or {}) if path.is_file() else {}
    try:
        scans = kept["scans"] if kept.get("version") == _SCANS_VERSION else {}
        return {sha256: Scan.from_json(values) for sha256, values in scans.items()}
    except (LookupError, TypeError, AttributeError):
        # Another program wrote the file: scan again.
        return {}
