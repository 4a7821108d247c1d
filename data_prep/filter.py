"""`mochi-tune filter`: measures clips, and flags black, frozen, blurred, still, bordered and duplicate ones.

It can run again at any time: unchanged clips are not measured again. It moves clips only with move=.
"""

import base64
import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mochi_tune.data_prep.clip_scores import SCORES_VERSION, Scores, measure_clip
from mochi_tune.data_prep.contact_sheet import read_thumbnails
from mochi_tune.data_prep.duplicates import find_duplicates, find_nearest, shifted_distance
from mochi_tune.data_prep.filter_page import MAX_PICTURES, make_page
from mochi_tune.data_prep.finding import find_videos
from mochi_tune.data_prep.moving import files_of_clip, finish_moves, move_clip, read_moved, undo_moves
from mochi_tune.data_prep.output_folder import lock_folder, sibling_folder
from mochi_tune.data_prep.watched import WatchedProcess
from mochi_tune.errors import ConfigError, DataError, counted, printable, some
from mochi_tune.files import make_writable_folder, read_json_lines, remove_temporary_files, write_atomic
from mochi_tune.pages.html_page import write_png

TABLE, PAGE, _PICTURE, _MEASURED, _MOVED = "filter.csv", "filter.html", "filter.png", "scores.jsonl", "moved.csv"
_SCORE_COLUMNS = ("black", "frozen", "motion", "sharpness", "left", "top", "right", "bottom")
_COLUMNS: tuple[str, ...] = (
    "clip",
    "verdict",
    "duplicate_of",
    "nearest",
    *_SCORE_COLUMNS,
    "width",
    "height",
    "frames",
    "seconds",
    "reason",
)


@dataclass(frozen=True)
class FilterLimits:
    """Limits beyond which a clip is flagged; None for no limit.

    Attributes:
        max_black: share of black pictures.
        max_frozen: longest run of equal pictures, as a share of the clip.
        min_sharpness: variance of the Laplacian.
        min_motion: difference of pictures 0.1 s apart, of 255.
        max_border: width of a black border in pixels.
        duplicate_distance: share of hash bits that differ from a better clip; below it, the clip is a duplicate.
    """

    max_black: float | None = 0.1
    max_frozen: float | None = 0.2
    min_sharpness: float | None = 10.0
    min_motion: float | None = 0.3
    max_border: float | None = 4.0
    duplicate_distance: float | None = 0.1

    def flags(self, scores: Scores) -> list[str]:
        """Returns the flags of a clip, except for duplicates; an entirely black clip has only the flag "black"."""
        if scores.black == 1 and self.max_black is not None and self.max_black < 1:
            return ["black"]
        found = {
            "black": _is_above(scores.black, self.max_black),
            "frozen": _is_above(scores.frozen, self.max_frozen),
            "blurred": _is_above(self.min_sharpness, scores.sharpness),
            "still": _is_above(self.min_motion, scores.motion),
            "border": _is_above(scores.border, self.max_border),
        }
        return [name for name, is_found in found.items() if is_found]


def _is_above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit


@dataclass(frozen=True)
class Filter:
    """Settings of `filter`.

    Attributes:
        videos: the folder of clips.
        out: the folder of the table and the page; None for VIDEOS_filter next to the clips.
        limits: of the scores.
        move: the folder that flagged clips are moved to; None moves nothing.
        timeout_seconds: maximum time without progress in decoding a clip.
    """

    videos: Path
    out: Path | None = None
    limits: FilterLimits = field(default_factory=FilterLimits)
    move: Path | None = None
    timeout_seconds: float = 120.0

    @property
    def report(self) -> Path:
        """The folder of the table and the page."""
        return self.out or sibling_folder(self.videos, "_filter", "videos")


@dataclass(frozen=True)
class Judged:
    """A clip with its scores or the reason why it has none, its flags, and the clip that it is a duplicate of."""

    name: str
    scores: Scores | None
    flags: tuple[str, ...] = ()
    nearest: float = 1.0
    duplicate_of: str = ""
    reason: str = ""


def main(settings: Filter) -> int:
    """Measures and judges the clips, writes the table and the page, moves clips if requested, and writes a summary.

    Returns:
        The exit code: 0, or 1 if a clip could not be read or moved.

    Raises:
        ConfigError: a folder of the settings is inside the folder of clips.
        DataError: there are no clips, or a table is malformed.
        OSError: writing failed.
        MochiTuneError: the browser fails.
    """
    for key, folder in (("out", settings.report), ("move", settings.move)):
        if folder is not None and settings.videos.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ConfigError(f"{key}={folder} is inside the clips, videos={settings.videos}: use another folder.")
    if not settings.videos.is_dir():
        find_videos(settings.videos, setting="videos")
    report = settings.report
    make_writable_folder(report)
    with lock_folder(report, "filter"), WatchedProcess(settings.timeout_seconds) as child:
        remove_temporary_files(report)
        # Before listing the clips, so that none of them is half moved.
        finished = finish_moves(report / _MOVED)[-1:]
        for row in finished:
            tqdm.write(
                printable(
                    f"{row.original}: its interrupted move to {row.moved} was finished; {report / _MOVED} lists it, "
                    "undo=true moves it back"
                )
            )
        clips = {
            path.relative_to(settings.videos).as_posix(): path
            for path in find_videos(settings.videos, setting="videos")
        }
        # The table and the page of the run that was stopped are replaced: these show its last clip too.
        clips |= {os.path.relpath(row.original, settings.videos): Path(row.moved) for row in finished}
        judged = judge(_measure_all(report / _MEASURED, clips, child), settings.limits)
        write_atomic(report / TABLE, as_csv(judged).encode(errors="surrogateescape"), durable=True)
        _make_page(settings, clips, judged, child)
        not_moved = _move_all(settings, clips, judged) if settings.move else []
    return _summarize(settings, judged, not_moved)


def undo(settings: Filter) -> int:
    """Moves the clips back that `filter` has moved; returns the exit code, 1 if some were not found or stay.

    Raises:
        DataError: nothing was moved.
        OSError: writing failed.
    """
    table = settings.report / _MOVED
    if not settings.report.is_dir():
        raise DataError(f"{settings.report} does not exist: give the out= of the `filter` that moved clips.")
    with lock_folder(settings.report, "filter"):
        remove_temporary_files(settings.report)
        finish_moves(table)
        rows = read_moved(table)
        if not rows and table.exists():
            tqdm.write(f"{table} lists no moved files: all are back")
            return 0
        if not rows:
            raise DataError(f"{table} lists no moved files: there is nothing to undo.")
        count, absent, stayed = undo_moves(table, rows)
        for reason in stayed:
            tqdm.write(printable(reason))
        tqdm.write(f"{settings.videos}: {count} files were moved back")
        if stayed:
            tqdm.write(
                f"{counted(len(stayed), 'file')} not moved back: {table} still lists them; move the files at their "
                "original paths away and run the same command again"
            )
        if absent:
            lost = printable(f"{counted(len(absent), 'file')} not found ({some(absent)})")
            tqdm.write(f"{lost}: {table} still lists them; restore them and run the same command again")
    return 1 if absent or stayed else 0


def _measure_all(path: Path, clips: Mapping[str, Path], child: WatchedProcess) -> dict[str, Scores | str]:
    """Measures new and changed clips; returns the scores of each clip, or the reason why it has none."""
    known = {(each.get("clip"), *each.get("signature", ())): each.get("scores") for each in read_json_lines(path)}
    found: dict[str, Scores | str] = {}
    with open(path, "a", encoding="utf-8") as file:
        for name, clip in tqdm(clips.items(), desc="measuring", unit="clip"):
            try:
                status = clip.stat()
            except OSError as error:
                found[name] = f"{clip}: cannot be read ({error.strerror})"
                continue
            try:
                signature = [SCORES_VERSION, status.st_size, status.st_mtime_ns]
                values = known.get((name, *signature))
                if values is None:
                    for message in child.run(measure_clip, clip, {}):
                        values = message
                    file.write(json.dumps({"clip": name, "signature": signature, "scores": values}) + "\n")
                    file.flush()
                assert values is not None, "the last result of the job has the scores"
                found[name] = Scores(**{**values, "hashes": tuple(values["hashes"])})
            except DataError as error:
                found[name] = str(error)
    return found


def judge(measured: Mapping[str, Scores | str], limits: FilterLimits) -> list[Judged]:
    """Returns the verdict on each clip, in the order given.

    Of a group of duplicates, the best clip is not flagged: one without other flags, then the one with most pixels, most
    pictures, clearly higher sharpness, and the first name.
    """
    scores = {name: value for name, value in measured.items() if isinstance(value, Scores)}
    flags = {name: limits.flags(value) for name, value in scores.items()}

    def rank(name: str) -> tuple:
        each = scores[name]
        # Rounded to powers of 2: two encodings of one clip differ a little in sharpness, which must not decide.
        sharpness = round(math.log2(max(each.sharpness, 1)))
        return bool(flags[name]), -each.width * each.height, -each.frames, -sharpness, name

    hashes = {name: scores[name].hashes for name in sorted(scores, key=rank)}
    nearest = find_nearest(hashes)
    limit = limits.duplicate_distance
    timelines = {name: scores[name].timeline for name in hashes}
    duplicates = {} if limit is None else find_duplicates(hashes, limit, timelines)
    for name, other in duplicates.items():
        nearest[name] = min(nearest[name], round(shifted_distance(timelines[name], timelines[other]), 4))
    judged = []
    for name, value in measured.items():
        if isinstance(value, str):
            judged.append(Judged(name, None, ("unreadable",), reason=value))
            continue
        found = [*flags[name], *(["duplicate"] if name in duplicates else [])]
        judged.append(Judged(name, value, tuple(found), nearest[name], duplicates.get(name, "")))
    return judged


def as_csv(judged: Sequence[Judged]) -> str:
    """Returns the text of filter.csv."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for each in judged:
        row: dict[str, Any] = {"clip": each.name, "verdict": " ".join(each.flags) or "good", "reason": each.reason}
        if each.scores is not None:
            row |= asdict(each.scores) | {"duplicate_of": each.duplicate_of, "nearest": each.nearest}
        writer.writerow(row)
    return text.getvalue()


def _make_page(settings: Filter, clips: Mapping[str, Path], judged: Sequence[Judged], child: WatchedProcess) -> None:
    """Writes the page, and a picture of it if a browser is installed; skips both if nothing has changed."""
    page, limits = settings.report / PAGE, asdict(settings.limits)
    made_of = hashlib.sha256(repr((judged, limits)).encode(errors="backslashreplace")).hexdigest()
    mark = f"<!-- {made_of} -->\n"
    if page.exists() and page.read_bytes().endswith(mark.encode()):
        return
    text = make_page(judged, limits, settings.videos.resolve().name, _thumbnails(clips, judged, child)) + mark
    write_atomic(page, text.encode(errors="backslashreplace"), durable=True)
    if write_png(page, settings.report / _PICTURE):
        tqdm.write(f"picture of the page: {settings.report / _PICTURE}")


def _thumbnails(clips: Mapping[str, Path], judged: Sequence[Judged], child: WatchedProcess) -> dict[str, bytes]:
    """Returns a JPEG of each flagged clip on the page, and of the clips that they are duplicates of."""
    flagged = [each for each in judged if each.flags and each.scores is not None][:MAX_PICTURES]
    wanted = dict.fromkeys([name for each in flagged for name in (each.name, each.duplicate_of) if name])
    pictures = {}
    for name in tqdm(wanted, desc="pictures", unit="clip", disable=not wanted):
        try:
            for message in child.run(read_thumbnails, clips[name], {"count": 1}):
                if "jpegs" in message:
                    pictures[name] = base64.b64decode(message["jpegs"][0])
        except DataError:
            # The clip was removed after it was measured: the page shows it without a picture.
            continue
    return pictures


def _move_all(settings: Filter, clips: Mapping[str, Path], judged: Sequence[Judged]) -> list[str]:
    """Moves the flagged clips that can be read; returns the reasons why some were not moved."""
    assert settings.move is not None
    table, problems, num_moved = settings.report / _MOVED, [], 0
    wanted = [
        each
        for each in judged
        if each.flags and each.scores is not None and clips[each.name].is_relative_to(settings.videos)
    ]
    for each in tqdm(wanted, desc="moving", unit="clip", disable=not wanted):
        target = settings.move / Path(each.name).parent
        moves = [(path.absolute(), (target / path.name).absolute()) for path in files_of_clip(clips[each.name])]
        try:
            move_clip(table, moves, " ".join(each.flags))
            num_moved += 1
        except DataError as error:
            problems.append(str(error))
    if num_moved:
        were = "clip was" if num_moved == 1 else "clips were"
        tqdm.write(f"{settings.move}: {num_moved} {were} moved there; {table} lists them, undo=true moves them back")
    return problems


def _summarize(settings: Filter, judged: Sequence[Judged], not_moved: Sequence[str]) -> int:
    """Writes a summary; returns the exit code."""
    unreadable = [each for each in judged if each.scores is None]
    for reason in [*(each.reason for each in unreadable), *not_moved]:
        tqdm.write(printable(f"refused: {reason}"))
    counts: dict[str, int] = {}
    for each in judged:
        for flag in each.flags:
            counts[flag] = counts.get(flag, 0) + 1
    listed = ", ".join(f"{count} {flag}" for flag, count in counts.items())
    num_good = sum(not each.flags for each in judged)
    tqdm.write(
        f"{settings.videos}: {num_good} of {len(judged)} clips are good{f'; {listed}' if listed else ''}. "
        f"Scores: {settings.report / TABLE}, page: {settings.report / PAGE}"
    )
    return 1 if unreadable or not_moved else 0
