"""`mochi-tune split`: cuts footage into one clip per scene, and writes a table of the scenes, which a user may edit.

It can run again at any time: it keeps the scenes in the table and the clips that exist.
"""

import base64
import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

from tqdm import tqdm

from mochi_tune.data_prep.contact_sheet import NUM_PICTURES, SheetClip, read_thumbnails, write_sheets
from mochi_tune.data_prep.cutting import Mark, cut_clips, read_mark
from mochi_tune.data_prep.finding import VIDEO_SUFFIXES, find_videos
from mochi_tune.data_prep.output_folder import lock_folder, sibling_folder
from mochi_tune.data_prep.scene_table import (
    CUT,
    PLANNED,
    REFUSED,
    REMOVED,
    SHORT,
    SUFFIX,
    SceneRow,
    read_scenes,
    read_written,
    write_scenes,
)
from mochi_tune.data_prep.scenes import Scene, SceneRules, check_scenedetect, find_scenes
from mochi_tune.data_prep.watched import WatchedProcess
from mochi_tune.errors import ConfigError, DataError, counted, printable, some
from mochi_tune.files import (
    fsync,
    make_writable_folder,
    read_json,
    remove_temporary_files,
    temporary_file,
    write_atomic,
)

_TABLE, _SHEET, SETTINGS = "scenes.csv", "scenes.png", "settings.json"


@dataclass(frozen=True)
class Split:
    """Settings of `split`.

    Attributes:
        footage: a film or a folder of films.
        out: the folder of the clips.
        rules: of dividing films.
        crf: quality of the clips in x264; 0 is lossless.
        timeout_seconds: maximum time without progress in decoding a film.
    """

    footage: Path
    out: Path
    rules: SceneRules
    crf: int = 12
    timeout_seconds: float = 300.0

    @property
    def report(self) -> Path:
        """The folder of the table and the contact sheet: next to the clips, so that training does not read it."""
        return sibling_folder(self.out, "_split", "out")


def main(split: Split) -> int:
    """Splits the footage, and writes lines with the paths of the clips, the table and the contact sheet.

    Returns:
        The exit code: 0, or 1 if a film or a clip was refused; all others are written.

    Raises:
        ConfigError: PySceneDetect is not installed, or the settings contradict each other or those of the table.
        DataError: there is no footage, or the table is malformed.
        OSError: writing failed.
    """
    split.rules.check()
    check_scenedetect()
    films = find_films(split)
    for folder in (split.out, split.report):
        make_writable_folder(folder)
    with lock_folder(split.report, "split"):
        for folder in {split.report, split.out, *(split.out / name for name in map(Path, _folders(films)))}:
            if folder.is_dir():
                remove_temporary_files(folder)
        table = split.report / _TABLE
        rows = _read_table(table)
        check_settings(split, bool(rows))
        with WatchedProcess(split.timeout_seconds) as child:
            rows = _find_all(split, films, rows, child)
            rows, num_written = _cut_all(split, films, rows, child)
            clips = [row for row in rows if row.status == CUT]
            if clips and (num_written or not (split.report / _SHEET).exists()):
                write_sheets(split.report / _SHEET, _sheet(split, clips, child))
    return _summarize(split, films, rows, num_written)


def find_films(split: Split) -> dict[str, Path]:
    """Returns the films by their path in the folder of footage, or a single film by its name.

    Raises:
        ConfigError: the clips' folder is in the footage, whose clips would be split again; or a film is in it.
        DataError: there is no footage.
    """
    footage, out = split.footage, split.out
    if not footage.is_dir():
        if not footage.exists():
            raise DataError(f"in={footage} does not exist: name a film or a folder of films.")
        if footage.suffix.lower() not in VIDEO_SUFFIXES:
            raise DataError(f"in={footage} is not a known video format: use {' '.join(VIDEO_SUFFIXES)}.")
        if out.resolve() in (folder := footage.parent.resolve(), *folder.parents):
            raise ConfigError(
                f"in={footage} is in the folder of the clips, out={out}, and would count as a clip: use another folder."
            )
        return {footage.name: footage}
    if footage.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"out={out} is in the footage, in={footage}, and would be split again: use another folder.")
    return {path.relative_to(footage).as_posix(): path for path in find_videos(footage, setting="in")}


def check_settings(split: Split, has_table: bool) -> None:
    """Refuses settings that differ from those of the table; saves the settings of a new table.

    Raises:
        ConfigError: the settings differ.
    """
    path, settings = split.report / SETTINGS, asdict(split.rules) | {"crf": split.crf}
    if has_table and path.exists():
        before = read_json(path, ConfigError)
        if changed := [name for name in settings if before.get(name) != settings[name]]:
            names = ", ".join(f"{name}={before.get(name)}" for name in changed)
            raise ConfigError(
                f"{split.report / _TABLE} was made with {names}, now {changed[0]}={settings[changed[0]]}: give the "
                "same settings, delete the table to find the scenes again, or use another out=."
            )
    else:
        write_atomic(path, json.dumps(settings, indent=1).encode() + b"\n", durable=True)


def _read_table(table: Path) -> list[SceneRow]:
    """Reads the table; rows that were edited since it was written become PLANNED, to be cut again."""
    rows = read_scenes(table)
    try:
        # If the table was deleted, its copy does not describe the new one.
        written = read_written(table) if rows else set()
    except DataError as error:
        written = set()
        tqdm.write(printable(f"all rows of the table count as edited, and removed clips are cut again: {error}"))
    return [row if row in written or row.status not in (CUT, REMOVED) else replace(row, status=PLANNED) for row in rows]


def _folders(films: dict[str, Path]) -> set[str]:
    return {str(Path(name).parent) for name in films}


def _find_all(split: Split, films: dict[str, Path], rows: list[SceneRow], child: WatchedProcess) -> list[SceneRow]:
    """Finds the scenes of films that are not in the table; writes the table after each film."""
    known = {row.source for row in rows if row.scene}
    # A film that was refused as a whole is tried again.
    rows = [row for row in rows if row.scene or row.source not in films]
    wanted = {name: path for name, path in films.items() if name not in known}
    stems = Counter(str(Path(name).with_suffix("")) for name in films)
    with tqdm(total=0, desc="finding scenes", unit="frame", disable=not wanted) as bar:
        for name, path in wanted.items():
            try:
                scenes = _find(path, split.rules, child, bar)
                is_alone = stems[str(Path(name).with_suffix(""))] == 1
                new = _new_rows(name, is_alone, scenes, path.stat().st_size, {row.file for row in rows if row.file})
            except DataError as error:
                new = [SceneRow(name, status=REFUSED, reason=str(error))]
            rows = sorted([*rows, *new], key=_place)
            write_scenes(split.report / _TABLE, rows)
    return rows


def _place(row: SceneRow) -> tuple[str, float]:
    return row.source, row.start_seconds


def _find(path: Path, rules: SceneRules, child: WatchedProcess, bar: tqdm) -> list[Scene]:
    for message in child.run(find_scenes, path, {"rules": asdict(rules)}):
        if "total" in message:
            bar.total += message["total"]
        bar.update(message.get("pictures", 0))
        if "scenes" in message:
            return [Scene(**values) for values in message["scenes"]]
    raise AssertionError("the last result of the job has the scenes")


def _new_rows(source: str, is_alone: bool, scenes: Sequence[Scene], num_bytes: int, taken: set[str]) -> list[SceneRow]:
    """Builds the rows of a film's scenes.

    Args:
        source: the film's path in the folder of footage.
        is_alone: whether no other film has the same path except for the suffix.
        scenes: of the film.
        num_bytes: size of the film.
        taken: file names of all other rows, which the new rows must not use.
    """
    tries = ([_row(source, stem, scene, num_bytes) for scene in scenes] for stem in _stems(Path(source), is_alone))
    return next(rows for rows in tries if taken.isdisjoint(row.file for row in rows))


def _stems(film: Path, is_alone: bool) -> Iterator[Path]:
    """Yields candidates for the common beginning of a film's clip names."""
    if is_alone:
        yield film.with_suffix("")
    longer = film.with_name(f"{film.stem}_{film.suffix[1:]}")
    yield longer
    for number in count(2):
        yield longer.with_name(f"{longer.name}_{number}")


def _row(source: str, stem: Path, scene: Scene, num_bytes: int) -> SceneRow:
    part = f"_part_{scene.part}" if scene.part else ""
    file = "" if scene.is_short else stem.with_name(f"{stem.name}_scene_{scene.number:03d}{part}{SUFFIX}").as_posix()
    label = f"{scene.number}.{scene.part}" if scene.part else str(scene.number)
    status = SHORT if scene.is_short else PLANNED
    return SceneRow(
        source, label, scene.start_seconds, scene.end_seconds, scene.num_frames, file, status, source_bytes=num_bytes
    )


def _cut_all(
    split: Split, films: dict[str, Path], rows: list[SceneRow], child: WatchedProcess
) -> tuple[list[SceneRow], int]:
    """Cuts the missing clips; returns the updated rows and the number of clips that were written."""
    done, wanted = [], {name: [] for name in films}
    for row in rows:
        if not row.file:
            done.append(replace(row, status=PLANNED) if row.status == CUT else row)
        elif row.source not in films:
            # The film is not there: keep the row.
            is_gone = row.status == CUT and not (split.out / row.file).exists()
            done.append(replace(row, status=REMOVED) if is_gone else row)
        else:
            row = _update_status(split, films[row.source], row)
            (wanted[row.source] if row.status == PLANNED else done).append(row)
    total, num_written = sum(map(len, wanted.values())), 0
    with tqdm(total=total, desc="cutting", unit="clip", disable=not total) as bar:
        for name, those in wanted.items():
            those.sort(key=_place)
            for row in _cut(split, films[name], those, child):
                done.append(row)
                num_written += row.status == CUT
                bar.update()
                # After each clip: if the run stops, clips that are then moved away are known to have been cut.
                write_scenes(split.report / _TABLE, sorted([*done, *_left(wanted, done)], key=_place))
    done.sort(key=_place)
    write_scenes(split.report / _TABLE, done)
    return done, num_written


def _left(wanted: dict[str, list[SceneRow]], done: Sequence[SceneRow]) -> list[SceneRow]:
    files = {row.file for row in done}
    return [row for those in wanted.values() for row in those if row.file not in files]


def _mark(split: Split, row: SceneRow) -> Mark:
    return Mark(row.source, row.source_bytes, row.start_seconds, row.end_seconds, split.crf)


def _update_status(split: Split, film: Path, row: SceneRow) -> SceneRow:
    """Returns the row with its status before cutting: PLANNED if its clip must be cut."""
    target = split.out / row.file
    if row.status in (CUT, REMOVED) and not target.exists():
        # `filter` or the user has moved it away.
        return replace(row, status=REMOVED)
    num_bytes = film.stat().st_size
    if row.source_bytes != num_bytes:
        reason = (
            f"{film}: was changed after its scenes were found (it has {num_bytes} bytes, had {row.source_bytes}): "
            f"delete its rows in {split.report / _TABLE} and its clips, and run the same command again."
        )
        return replace(row, status=REFUSED, reason=reason)
    row = replace(row, status=PLANNED, reason="")
    if not target.exists():
        return row
    mark = read_mark(target)
    if mark == _mark(split, row):
        return replace(row, status=CUT)
    # A clip of the same film whose row was edited is cut again.
    if mark is None or mark.source != row.source:
        reason = f"{target}: exists and was not cut from {row.source}: move it away, or change the name in the table."
        return replace(row, status=REFUSED, reason=reason)
    return row


def _cut(split: Split, film: Path, rows: list[SceneRow], child: WatchedProcess) -> Iterator[SceneRow]:
    """Cuts the clips of one film; yields each row when its clip is written or refused."""
    if not rows:
        return
    done = 0
    try:
        with contextlib.ExitStack() as stack:
            targets = [split.out / row.file for row in rows]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            temporary = [stack.enter_context(temporary_file(target)) for target in targets]
            marks = [asdict(_mark(split, row)) for row in rows]
            pieces = [{"file": str(file), "mark": mark} for file, mark in zip(temporary, marks, strict=True)]
            for message in child.run(cut_clips, film, {"pieces": pieces}):
                if "done" not in message:
                    continue
                index = message["done"]
                fsync(temporary[index])
                temporary[index].replace(targets[index])
                yield replace(rows[index], status=CUT, frames=message["frames"])
                rows[index] = replace(rows[index], status=CUT)
                done += 1
    except DataError as error:
        for row in rows:
            if row.status != CUT:
                yield replace(row, status=REFUSED, reason=str(error))


def _sheet(split: Split, rows: Sequence[SceneRow], child: WatchedProcess) -> list[SheetClip]:
    clips = []
    for row in tqdm(rows, desc="contact sheet", unit="clip"):
        pictures: list[bytes] = []
        # A clip that was removed since or is damaged gets an empty place.
        with contextlib.suppress(DataError):
            for message in child.run(read_thumbnails, split.out / row.file, {"count": NUM_PICTURES}):
                pictures = [base64.b64decode(jpeg) for jpeg in message.get("jpegs", ())]
        note = f"{row.start_seconds:.2f} to {row.end_seconds:.2f} s of {Path(row.source).name}, {row.frames} frames"
        clips.append(SheetClip(row.file, note, pictures))
    return clips


def _summarize(split: Split, films: dict[str, Path], rows: Sequence[SceneRow], num_written: int) -> int:
    """Writes a summary; returns the exit code."""
    refused = [row for row in rows if row.status == REFUSED]
    for reason in dict.fromkeys(row.reason for row in refused):
        tqdm.write(printable(f"refused: {reason}"))
    listed = {row.file for row in rows}
    files = sorted(path.relative_to(split.out).as_posix() for path in split.out.rglob(f"*{SUFFIX}"))
    stale = [file for file in files if file not in listed and read_mark(split.out / file)]
    if stale:
        tqdm.write(printable(f"clips in no row of the table: {some(stale)}; remove those that you do not want"))
    clips = [row for row in rows if row.status == CUT]
    gone = list(dict.fromkeys(row.source for row in clips if row.source not in films))
    if gone and split.footage.is_dir():
        num_gone = sum(row.source in gone for row in clips)
        tqdm.write(
            printable(
                f"{counted(num_gone, 'clip')} of films that are no longer in {split.footage}: {some(gone)}; if a film "
                "has another name now, its clips are there twice: remove the old ones and their rows in the table"
            )
        )
    seconds = sum(row.end_seconds - row.start_seconds for row in clips)
    num_short = sum(row.status == SHORT for row in rows)
    tqdm.write(
        f"{split.out}: {counted(len(clips), 'clip')}, {seconds:.1f} s, of {counted(len(films), 'film')}; "
        f"written now: {num_written}, too short: {num_short}, refused: {len(refused)}. "
        f"The scenes are listed in {split.report / _TABLE}"
    )
    if clips:
        tqdm.write(f"contact sheet: {split.report / _SHEET}")
    return 1 if refused else 0
