"""The clips of a folder for the page: their facts, pictures and editable captions."""

import contextlib
import itertools
import os
import threading
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mochi_tune.config.schema import DataConfig
from mochi_tune.config.sources import read_sources
from mochi_tune.data.text_files import read_text
from mochi_tune.data_prep.caption_tables import is_table_name
from mochi_tune.data_prep.captions import (
    MAX_CAPTION_CHARACTERS,
    SIDECAR_SUFFIXES,
    CaptionRules,
    load_captions,
    stem_of,
)
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.finding import MEDIA_SUFFIXES, TAKES_STILLS, find_videos, walk
from mochi_tune.data_prep.inspection import Flag, find_flags
from mochi_tune.data_prep.probe import Scan
from mochi_tune.data_prep.windows import choose_cuts
from mochi_tune.errors import DataError, MochiTuneError, find_lone_surrogate
from mochi_tune.files import move_to_free_name, write_atomic
from mochi_tune.models.text_encoder import measure_caption
from mochi_tune.ui.folder import clean_name, inside
from mochi_tune.ui.posters import poster

UPLOADED = (*MEDIA_SUFFIXES, ".txt")
# Suffixes of videos that a browser plays. Of other videos the page shows a picture.
PLAYED = (".mp4", ".m4v", ".webm", ".mov")
SCAN_SECONDS = 30.0
# Suffixes of files with captions, and of tables of them.
_TEXTS = (*SIDECAR_SUFFIXES, ".csv", ".tsv", ".json", ".jsonl")
_UPLOADS = threading.Lock()


@dataclass(frozen=True)
class ClipCard:
    """The description of a video in the gallery.

    Attributes:
        path: path of the video.
        name: path relative to the folder of videos.
        length: length as text.
        size: size as text.
        bucket: the clips to cut from it, as text; "" if it cannot be used.
        flags: warnings.
        refused: why it cannot be used; "" if it can.
        thumbnail: JPEG; None if the video cannot be decoded.
    """

    path: Path
    name: str
    length: str = ""
    size: str = ""
    bucket: str = ""
    flags: tuple[Flag, ...] = ()
    refused: str = ""
    thumbnail: Path | None = None


def list_videos(folder: Path, videos: str) -> list[Path]:
    """Returns the videos of a folder by path, without links that lead out of the page's folder.

    Raises:
        DataError: the folder does not exist, contains no video, or is outside of the page's folder.
    """
    root = inside(folder, videos)
    found = find_videos(root, takes_stills=TAKES_STILLS)
    # Links to folders are not followed, so only links to files can lead out.
    return [path for path in found if not _leads_out(folder, path)]


class Gallery:
    """Reads videos in a child process, so that damaged ones cannot crash the server, and caches the results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._scans: dict[tuple[str, int, int], Scan | str] = {}

    def cards(self, root: Path, texts: Mapping[Path, str], data: DataConfig) -> list[ClipCard]:
        """Returns the cards of some videos.

        Args:
            root: folder of videos, to which the names are relative.
            texts: video -> caption, see `read_captions`.
            data: settings that determine the clips.
        """
        # A decoder serves one request at a time.
        with self._lock, ClipDecoder(SCAN_SECONDS) as decoder:
            return [self._card(decoder, root, path, text, data) for path, text in texts.items()]

    def _card(self, decoder: ClipDecoder, root: Path, path: Path, caption: str, data: DataConfig) -> ClipCard:
        name = path.relative_to(root).as_posix()
        try:
            facts = path.stat()
        except OSError:
            return ClipCard(path, name, refused="it has vanished: press Refresh.")
        key = (os.fspath(path), facts.st_mtime_ns, facts.st_size)
        if key not in self._scans:
            try:
                self._scans[key] = decoder.scan(path)
            except DataError as error:
                self._scans[key] = str(error)
        scan = self._scans[key]
        if isinstance(scan, str):
            return ClipCard(path, name, refused=scan)
        thumbnail = poster(self.folder, decoder, path)
        length, size = f"{scan.source_seconds:.1f} s at {scan.source_fps:.3g} fps", f"{scan.width} x {scan.height}"
        source = read_sources(data)[0]
        try:
            cuts = choose_cuts(scan, source.buckets, source.clips, data, source.shorter)
        except DataError as error:
            return ClipCard(path, name, length, size, refused=str(error), thumbnail=thumbnail)
        captions = [measure_caption(text, None) for text in (caption.split("\n") if caption else [""])]
        flags = find_flags(scan, cuts[0], captions)
        bucket = f"{cuts[0].num_frames} frames, {cuts[0].width} x {cuts[0].height}"
        many = f"{len(cuts)} clips: " if len(cuts) > 1 else ""
        return ClipCard(path, name, length, size, many + bucket, flags, thumbnail=thumbnail)


def read_captions(folder: Path, root: Path, videos: Sequence[Path], data: DataConfig) -> dict[Path, str]:
    """Returns the caption of each video in its file or table, with several ones as lines; "" for none.

    A table or a caption that is a link out of the page's folder is not read. If there is one, no table is.

    Args:
        folder: folder of the page.
        root: folder of the videos.
        videos: videos in it.
        data: settings of the captions.
    """
    tables: dict[Path, tuple[str, ...]] = {}
    stems = {stem_of(video) for video in videos}
    texts = [path for path, name in walk(root) if name.lower().endswith(_TEXTS)]
    read = (Path(path) for path in texts if stem_of(path) in stems or is_table_name(Path(path).name))
    if not any(_leads_out(folder, path) for path in read):
        # `prepare` reports a damaged table. Captions in files can be edited all the same.
        with contextlib.suppress(DataError):
            tables = load_captions(root, list(videos), CaptionRules(data.captions)).texts
    found = {}
    for video in videos:
        path = caption_path(video)
        text = "\n".join(tables.get(video, ()))
        if path.is_file() and not _leads_out(folder, path):
            try:
                text = read_text(path, fallback="cp1252")[0].strip() or text
            except (OSError, UnicodeDecodeError):
                text = ""
        found[video] = text
    return found


def _leads_out(folder: Path, path: Path) -> bool:
    """Whether a path is a link out of the page's folder."""
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def caption_path(video: Path) -> Path:
    """Returns the file for a video's caption, which takes precedence over tables and other files."""
    for suffix in (".txt", ".TXT"):
        if video.with_suffix(suffix).is_file():
            return video.with_suffix(suffix)
    return video.with_suffix(".txt")


def write_caption(folder: Path, video: Path, text: str) -> None:
    """Writes a caption next to its video, atomically.

    Raises:
        DataError: the video has vanished, or the text cannot be a caption.
    """
    path = inside(folder, caption_path(video))
    if not video.is_file():
        raise DataError(f"{video.name} has vanished: press Refresh.")
    if len(text) > MAX_CAPTION_CHARACTERS or "\0" in text or find_lone_surrogate(text):
        raise DataError(
            f"{video.name}: this cannot be a caption: use at most {MAX_CAPTION_CHARACTERS} characters of text."
        )
    # It may be the only copy of a caption.
    write_atomic(path, (text.strip() + "\n").encode() if text.strip() else b"", durable=True)


def changed_captions(texts: dict[Path, str], find: str, replacement: str, prefix: str) -> dict[Path, str]:
    """Returns the captions that change by a replacement and a prefix, by video.

    Args:
        texts: video -> caption.
        find: text to replace everywhere; "" for none.
        replacement: text to insert instead.
        prefix: put before each caption that is not empty and does not begin with it.
    """
    changed = {}
    for video, text in texts.items():
        new = text.replace(find, replacement) if find else text
        if prefix and new:
            lines = [line if line.startswith(prefix) or not line else prefix + line for line in new.split("\n")]
            new = "\n".join(lines)
        if new != text:
            changed[video] = new
    return changed


def take_uploads(folder: Path, videos: str, files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Moves uploaded files into the folder of videos, under safe and free names.

    A clip and its caption keep a common name: if another clip has it already, both get the same new one. Different
    names stay different, even if their safe names are equal.

    Returns:
        The names of the moved files, and the errors of the others.
    """
    taken, refused = [], []
    groups: dict[str, list[tuple[Path, Path]]] = {}
    for file in files:
        try:
            clean = Path(clean_name(file.name, UPLOADED))
            groups.setdefault(unicodedata.normalize("NFC", file.stem), []).append((file, clean))
        except MochiTuneError as error:
            refused.append(str(error))
    if not groups:
        return taken, refused
    # One upload at a time, because existing names are listed once.
    with _UPLOADS:
        try:
            names = _Names(inside(folder, videos))
        except MochiTuneError as error:
            return taken, [*refused, str(error)]
        # Names that are safe already come first and keep their name, because the existing clip or caption has it.
        for _, members in sorted(groups.items(), key=lambda group: group[0] != group[1][0][1].stem):
            try:
                _check_pairs([file.name for file, _ in members])
                taken += names.take(members)
            except MochiTuneError as error:
                refused.append(str(error))
    return taken, refused


def lonely_captions(folder: Path, videos: str, names: Sequence[str]) -> list[str]:
    """Returns those of the added files that are captions without a clip of their name. Lists of captions need none."""
    texts = [name for name in names if name.lower().endswith(".txt") and not is_table_name(name)]
    there = inside(folder, videos).iterdir() if texts else ()
    clips = {path.stem for path in there if path.suffix.lower() in MEDIA_SUFFIXES}
    return [name for name in texts if Path(name).stem not in clips]


def _check_pairs(names: Sequence[str]) -> None:
    """Refuses several clips of one name with captions, because the captions cannot be assigned to them."""
    twice = [name for name in names if names.count(name) > 1]
    if twice and {os.path.splitext(name)[1].lower() for name in names} - set(MEDIA_SUFFIXES):
        raise DataError(
            f"{twice[0]} was added twice, so captions cannot be assigned to clips: add the clips one by one."
        )


class _Names:
    """The existing and new names of files in a folder of videos."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._there = {(path.stem, path.suffix.lower()) for path in root.iterdir()}
        # Names given to other files of the same upload.
        self._given: set[str] = set()

    def take(self, members: Sequence[tuple[Path, Path]]) -> list[str]:
        """Moves files that belong together into the folder under one free name, and returns their names.

        Args:
            members: pairs of a file and its safe name.
        """
        free = self._free_stem(members[0][1].stem, [clean.suffix.lower() for _, clean in members])
        self._given.add(free)
        moved = [move_to_free_name(file, self._root / f"{free}{clean.suffix}") for file, clean in members]
        self._there |= {(path.stem, path.suffix.lower()) for path in moved}
        return [path.name for path in moved]

    def _free_stem(self, stem: str, suffixes: Sequence[str]) -> str:
        """Returns a free name without its suffix. For a clip, no clip and no file of these suffixes has the name."""
        has_clip = not set(suffixes).isdisjoint(MEDIA_SUFFIXES)
        # A caption without a clip is for the existing clip.
        wanted = {*suffixes, *MEDIA_SUFFIXES} if has_clip else set()
        names = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        return next(
            name
            for name in names
            if name not in self._given and not any((name, suffix) in self._there for suffix in wanted)
        )
