"""What there is to encode: the files of all sources, their captions, and the clips that are cut from them."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mochi_tune.config.schema import DataConfig
from mochi_tune.config.sources import Source, read_sources
from mochi_tune.data.cache import PARTS_FOLDER
from mochi_tune.data.rows import CacheSettings, Row, make_row
from mochi_tune.data_prep.captions import CaptionRules, find_orphans, load_captions
from mochi_tune.data_prep.clips import TRANSFORM_VERSION, Cut
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.finding import STILL, TAKES_STILLS, as_utf8, clip_name, find_unused, find_videos
from mochi_tune.data_prep.hashes import HASHES_FILE, FileHashes, Signature, signature
from mochi_tune.data_prep.hf_dataset import is_dataset, materialise_dataset
from mochi_tune.data_prep.probe import Scan
from mochi_tune.data_prep.windows import choose_cuts, decisive
from mochi_tune.errors import DataError, counted, printable, some
from mochi_tune.files import parse_object, write_atomic

# In the cache: the files of a dataset's videos. `datasets.load_dataset(cache)` passes over names with a dot.
DATASET_FOLDER = ".dataset"
# In it, of the one that data.videos names; those of data.sources have their names.
ALONE = "_"
SCANS_FILE = ".scans.json"
# Between two times at which what was read of files is kept, and at least so many times what the last time took: all of
# it is written each time, which is to take a small part of the time however much it grows.
SAVE_SECONDS, SAVE_TIMES = 30.0, 20
NO_VIDEO = "is a caption of no video"


@dataclass(frozen=True)
class MediaFile:
    """A video or a still of a source.

    Attributes:
        name: its path in its source's folder, behind the source's name where there are several.
        path: where it is.
        relative: its path in its source's folder.
        source: where it belongs.
        captions: one or more; "" where it has none.
    """

    name: str
    path: Path
    relative: str
    source: Source
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Clip:
    """A clip to encode: its row in the cache, its file, and what is cut out of it."""

    row: Row
    file: MediaFile
    cut: Cut


@dataclass
class Inputs:
    """All inputs of a `prepare`.

    Attributes:
        files: videos and stills, by name.
        clips: to encode, those of a file one after the other by ascending start.
        scans: what each file holds, by its name.
        signatures: what tells that a file was changed, by its name.
        refused: why a file cannot be used, by its name.
        unused: why a file is not taken, by its name.
        max_clips: of one video at most; None: any number.
    """

    files: dict[str, MediaFile] = field(default_factory=dict)
    clips: list[Clip] = field(default_factory=list)
    scans: dict[str, Scan] = field(default_factory=dict)
    signatures: dict[str, Signature] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    max_clips: int | None = None


def find_inputs(data: DataConfig, seed: int) -> Inputs:
    """Finds the files of all sources with their captions; opens none of the videos.

    Raises:
        DataError: a source has no video; clips have no caption; tables that cannot be read.
    """
    inputs, without, orphans = Inputs(max_clips=data.max_clips), [], []
    sources = read_sources(data)
    for number, source in enumerate(sources):
        folder = source.folder
        setting = f"data.sources[{number}].folder" if data.sources else "data.videos"
        if folder.is_dir() and is_dataset(folder):
            folder = materialise_dataset(folder, Path(data.cache) / DATASET_FOLDER / (source.name or ALONE))
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
        # The captions of stills that are not taken have a picture: it is the one to tell of.
        alone = find_orphans(folder, [*videos, *(path for path, why in unused.items() if why.endswith(STILL))])
        for path in [folder / name for name in alone]:
            inputs.unused[clip_name(source.name, folder, path)] = f"{path}: {NO_VIDEO}"
        orphans += alone
        for path, why in unused.items():
            inputs.unused[clip_name(source.name, folder, path)] = as_utf8(why)
    _check_captions(data, without, orphans, len(inputs.files))
    if inputs.refused:
        # Told before hours of encoding, and again with the others at the end.
        refused = f"{counted(len(inputs.refused), 'clip')} will be refused: {some(inputs.refused.values())}"
        tqdm.write(printable(refused))
    return inputs


def _check_captions(data: DataConfig, without: list[str], orphans: list[str], num_clips: int) -> None:
    if without and not data.allow_empty_captions:
        # A typo in a file's name is the usual cause; both names together make it visible.
        typos = f"; without a video there are the captions {some(orphans)}" if orphans else ""
        where = ", ".join(str(source.folder) for source in read_sources(data))
        found = printable(f"{counted(num_clips, 'clip')} in {where} ({some(without)}{typos})")
        raise DataError(
            f"without a caption: {len(without)} of {found}: write each one's caption into a .txt file of its name, or "
            "set data.allow_empty_captions=true to train them without."
        )
    if orphans:
        tqdm.write(printable(f"captions without a video of that name, not used: {some(orphans, limit=10)}"))


def cut_inputs(
    inputs: Inputs, data: DataConfig, settings: CacheSettings, decoder: ClipDecoder, share: str = ""
) -> None:
    """Reads each file's hash and what it holds, and adds the clips that are cut from it, or why there are none.

    Both are kept in the cache's folder, so that a second run opens new and changed files alone; of a share of the work,
    in the folder of its parts. A run that is stopped keeps what it has read.
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
            # Not of the others, so that what is encoded of them keeps its key.
            colours = {"from_profile": True} if scan.has_profile else {}
            for cut in cuts:
                values = decisive(cut) | colours
                row = make_row(file.relative, file.captions, sha256, values, settings, file.source.name)
                inputs.clips.append(Clip(row, file, cut))


class _KnownFiles:
    """Hashes of files and what they hold, kept in the cache's folder: now and then, and when the block ends or fails.

    Args:
        cache: the folder.
        share: of the work, whose folder keeps them; "": the cache's.
    """

    def __init__(self, cache: Path, share: str) -> None:
        parts = cache / PARTS_FOLDER
        self._kept = (parts / share if share else cache) / SCANS_FILE
        self._before = _kept_scans(self._kept)
        self._known = self._before | {
            sha256: scan
            for file in (cache / SCANS_FILE, *sorted(parts.glob(f"*/{SCANS_FILE}")))
            for sha256, scan in _kept_scans(file).items()
        }
        others = [cache / HASHES_FILE, *parts.glob(f"*/{HASHES_FILE}")]
        self._hashes = FileHashes(self._kept.with_name(HASHES_FILE), others)
        self._now: dict[str, Scan] = {}
        self._next_save = time.monotonic() + SAVE_SECONDS

    def __enter__(self) -> "_KnownFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._save(is_whole=kind is None)

    def read(self, path: Path, found: Signature, decoder: ClipDecoder) -> tuple[str, Scan]:
        """Returns the hash of a file with this signature, and what the file holds; opens it only if it is not known.

        Raises:
            DataError: it cannot be read.
        """
        if time.monotonic() >= self._next_save:
            begun = time.monotonic()
            self._save(is_whole=False)
            self._next_save = time.monotonic() + max(SAVE_SECONDS, SAVE_TIMES * (time.monotonic() - begun))
        sha256 = self._hashes.sha256(path, found)
        scan = self._known[sha256] if sha256 in self._known else decoder.scan(path)
        self._now[sha256] = scan
        return sha256, scan

    def _save(self, is_whole: bool) -> None:
        """Keeps what was read; where files are still to be read, also what was known of them."""
        self._hashes.save(is_whole)
        scans = self._now if is_whole else self._before | self._now
        if scans != self._before:
            # `inspect` may read it while `prepare` writes it.
            values = {sha256: scan.to_json() for sha256, scan in scans.items()}
            write_atomic(self._kept, json.dumps({"version": TRANSFORM_VERSION, "scans": values}).encode())
            self._before = dict(scans)


def _choose_cuts(file: MediaFile, scan: Scan, data: DataConfig) -> list[Cut]:
    try:
        return choose_cuts(scan, file.source.buckets, file.source.clips, data, file.source.shorter)
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from None


def _kept_scans(path: Path) -> dict[str, Scan]:
    """Returns what files held at the last run, by their hash; nothing where that is of another version or damaged."""
    kept = (parse_object(path.read_bytes()) or {}) if path.is_file() else {}
    try:
        scans = kept["scans"] if kept.get("version") == TRANSFORM_VERSION else {}
        # Pictures are read again that were before their profiles counted.
        return {
            sha256: Scan.from_json(values)
            for sha256, values in scans.items()
            if values["codec"] or "has_profile" in values
        }
    except (LookupError, TypeError, AttributeError):
        # Written by another program: the files are read again.
        return {}
