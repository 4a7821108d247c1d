"""Finds changes to videos and captions since `prepare`, which training does not read."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mochi_tune.config.schema import DataConfig
from mochi_tune.config.sources import Source, read_sources
from mochi_tune.data.cache import REPORT_NAME, Cache
from mochi_tune.data.manifest import MANIFEST_NAME
from mochi_tune.data_prep.captions import CaptionRules, load_captions
from mochi_tune.data_prep.finding import as_utf8, clip_name, list_videos
from mochi_tune.data_prep.hashes import HASHES_FILE, FileHashes, signature
from mochi_tune.data_prep.hf_dataset import is_dataset
from mochi_tune.errors import DataError, counted, some
from mochi_tune.files import file_sha256

# Maximum clips of a cache whose captions are compared at each start of a training: a network disk takes minutes.
_MAX_CLIPS = 10_000
# Maximum bytes that are read of videos that may have been replaced.
MAX_BYTES = 2**30


@dataclass
class Changes:
    """Files that have changed since `prepare`, and folders with clips of which the cache has none."""

    gone: list[Path] = field(default_factory=list)
    new: list[Path] = field(default_factory=list)
    replaced: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def describe_changes(data: DataConfig, seed: int, cache: Cache) -> list[str]:
    """Compares a cache with the files that it was made from.

    Args:
        data: settings that the cache was prepared with.
        seed: of the captions' tags.
        cache: of the run.

    Returns:
        Lines about changes and what to do; [] if nothing has changed, or if the files are not on this machine.
    """
    if len(cache.rows) > _MAX_CLIPS:
        return []
    changes = Changes()
    try:
        seen = _names_of(cache.folder / REPORT_NAME)
        for source in read_sources(data):
            if source.folder.is_dir() and not is_dataset(source.folder):
                _compare(source, data, seed, cache, changes)
                if seen is not None:
                    changes.new += _new_files(source, seen)
    # Not an error: training reads only the cache.
    except (DataError, OSError, csv.Error) as error:
        return [f"cannot check whether clips or captions have changed since `prepare`: {error}"]
    return _lines(changes)


def _compare(source: Source, data: DataConfig, seed: int, cache: Cache, changes: Changes) -> None:
    """Adds the clips of a source that are gone, and those with other bytes or captions."""
    rows = cache.rows.tuples("source", "path", "captions", "source_sha256")
    own = {source.folder / path: (tuple(texts), sha256) for name, path, texts, sha256 in rows if name == source.name}
    videos = [path for path in own if path.exists()]
    if not videos:
        # An empty folder is where the disk of another machine is mounted.
        if own and list_videos(source.folder, source.takes_stills):
            changes.others.append(source.folder)
        return
    found = load_captions(source.folder, videos, CaptionRules.from_config(data, source, seed))
    changes.gone += [path for path in own if not path.exists()]
    changes.captions += [path for path in videos if found.texts.get(path, ("",)) != own[path][0]]
    changes.replaced += _replaced(cache, {path: own[path][1] for path in videos})


def _replaced(cache: Cache, hashes: Mapping[Path, str]) -> list[Path]:
    """Returns the videos whose bytes have changed; reads only files with another signature."""
    kept, prepared = FileHashes(cache.folder / HASHES_FILE), (cache.folder / MANIFEST_NAME).stat().st_mtime
    found, in_doubt, num_bytes = [], [], 0
    for path in hashes:
        now, before = signature(path), kept.signature_of(path)
        if before and before[0] != now[0]:
            found.append(path)
        elif before != now if before else path.stat().st_mtime > prepared:
            in_doubt.append(path)
            num_bytes += now[0]
    # In a copied or moved folder all signatures differ; reading all files would take minutes at each start.
    return found + [path for path in in_doubt if num_bytes <= MAX_BYTES and file_sha256(path) != hashes[path]]


def _names_of(report: Path) -> set[str] | None:
    """Returns the names of all files that `prepare` found, usable or not; None if its report does not have them."""
    if not report.is_file():
        return None
    with report.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file)
        # A spreadsheet program may have saved the report with other separators.
        clips = [row["clip"] or "" for row in rows] if "clip" in (rows.fieldnames or ()) else None
    # "@" precedes a clip's start in its video, but may also be part of a file's name: keep both.
    return None if clips is None else {*clips, *(clip.rpartition("@")[0] for clip in clips)}


def _new_files(source: Source, seen: set[str]) -> list[Path]:
    videos = list_videos(source.folder, source.takes_stills)
    names = {clip_name(source.name, source.folder, path): path for path in videos}
    # If `prepare` saw none of them, the folder is another one, or the source is new.
    return [names[name] for name in sorted(names.keys() - seen)] if names.keys() & seen else []


def _names(paths: list[Path]) -> list[str]:
    # Two sources may have the same folder.
    return [as_utf8(path.name) for path in dict.fromkeys(paths)]


def _lines(changes: Changes) -> list[str]:
    prepare, lines = "stop, run `mochi-tune prepare` with these settings, and train", []
    anew = f"{prepare} in another run_dir=DIR; this run continues with other clips only with resume=force"
    for folder in dict.fromkeys(changes.others):
        lines.append(
            f"none of the clips of the cache is in the folder {folder}, and this run trains on those of the cache: to "
            f"train on the clips in {folder}, {anew}"
        )
    if gone := _names(changes.gone):
        is_are, it = ("is", "it") if len(gone) == 1 else ("are", "them")
        lines.append(
            f"{counted(len(gone), 'video')} of the cache {is_are} no longer in the folder ({some(gone)}), and this "
            f"run trains on {it}: to leave {it} out, {anew}"
        )
    if new := _names(changes.new):
        has, it = ("has", "it") if len(new) == 1 else ("have", "them")
        lines.append(
            f"{counted(len(new), 'file')} {has} been added to the folder since `prepare` ({some(new)}), and this run "
            f"does not train on {it}: to add {it}, {anew}"
        )
    if replaced := _names(changes.replaced):
        has = "has" if len(replaced) == 1 else "have"
        lines.append(
            f"{counted(len(replaced), 'video')} {has} been replaced since `prepare` ({some(replaced)}), and this run "
            f"trains on the old: to use the new, {prepare} again"
        )
    if captions := _names(changes.captions):
        lines.append(
            f"captions of {counted(len(captions), 'video')} have changed since `prepare` "
            f"({some(captions)}), and this run has the old ones: to use the new ones, stop, run `mochi-tune "
            "prepare` with these settings, which encodes only those captions, and train again"
        )
    return lines
