"""Resets a run folder to the step that the run resumes from.

If the user names an older checkpoint, or one of another run, the folder keeps only the rows, checkpoints and videos
that belong to it. The others are put aside: they get the prefix aside_NUMBER_, and so does a copy of the rows.

A branch is a sequence of rows of metrics.jsonl. A checkpoint stores the hash of the rows that led to it. The rows
contain the seconds of each step, so two executions never have the same hash.
"""

import filecmp
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mochi_tune.files import copy_atomic, parse_object, read_json_lines, remove_temporary_files, write_atomic
from mochi_tune.training import checkpoint
from mochi_tune.training.eval_files import find_eval_videos, find_temporary_videos, prompt_file
from mochi_tune.training.metrics import FILES
from mochi_tune.training.preflight import bound_settings
from mochi_tune.training.run_folder import read_history

if TYPE_CHECKING:
    from mochi_tune.training.resume import ResumePoint


def rewind(run_dir: Path, start: "ResumePoint", log: Callable[[str], None]) -> None:
    """Resets the run folder to its state at the step that the run resumes from.

    Checkpoints of later steps are put aside: they are damaged, or the user named an older one. Eval videos of later
    steps are removed, because they are rendered again; if the user named a checkpoint, they are put aside as well.

    Args:
        run_dir: the run folder.
        start: where the run resumes.
        log: prints a line.
    """
    checkpoints = run_dir / "checkpoints"
    for folder in (run_dir, checkpoints, run_dir / "base_latents"):
        remove_temporary_files(folder)
    for path in find_temporary_videos(run_dir):
        path.unlink()
    if checkpoints.is_dir() and (stale := checkpoint.clear_leftovers(checkpoints)):
        log(f"removed what an interrupted save left: {', '.join(stale)}")
    number = _find_number(run_dir) if start.is_named else _next_number(checkpoints)
    if start.is_named and start.folder is not None:
        _switch_branch(run_dir, start.folder, start.state, number, log)
        _put_videos_aside(run_dir, start.step, number)
    kept = [path for path in checkpoint.find_checkpoints(checkpoints) if checkpoint.step_of(path) <= start.step]
    for path in sorted(checkpoints.glob("step_*")):
        if path not in kept:
            log(f"put aside: {_put_aside(path, number)}")
    # `sample` writes other files to this folder, which stay.
    for step, _, video in find_eval_videos(run_dir):
        if step > start.step or start.folder is None:
            prompt_file(video).unlink(missing_ok=True)
            video.unlink()
    own = run_dir / "adapter.safetensors"
    if start.folder is not None:
        published = checkpoint.published_file(start.folder)
        if not own.exists() or not filecmp.cmp(published, own, shallow=False):
            # The run was killed after it saved a checkpoint and before it copied the adapter.
            copy_atomic(published, own)
    else:
        (run_dir / "validation.jsonl").unlink(missing_ok=True)


def _next_number(checkpoints: Path) -> int:
    """Returns the first number under which nothing was put aside yet."""
    return next(number for number in itertools.count() if not any(checkpoints.glob(f"aside_{number}_*")))


def _find_number(run_dir: Path) -> int:
    """Returns the number of a rewind that was interrupted before it changed the rows, or else a new number."""
    own, number = run_dir / "metrics.jsonl", _next_number(run_dir / "checkpoints")
    last = run_dir / "checkpoints" / f"aside_{number - 1}_metrics.jsonl"
    is_begun = own.exists() and last.exists() and filecmp.cmp(own, last, shallow=False)
    return number - 1 if is_begun else number


def _put_aside(path: Path, number: int) -> Path:
    """Renames a file or a folder so that the run ignores it; returns the new path, which replaces nothing."""
    targets = (path.with_name(f"aside_{each}_{path.name}") for each in itertools.count(number))
    target = next(target for target in targets if not os.path.lexists(target))
    os.rename(path, target)
    return target


def _put_videos_aside(run_dir: Path, after: int, number: int) -> None:
    """Puts the eval videos of later steps aside, with their prompts."""
    for step, _, video in find_eval_videos(run_dir):
        if step > after:
            # The prompt first: if this is interrupted, the next call finds the video and completes the pair.
            for file in (prompt_file(video), video):
                if file.exists():
                    _put_aside(file, number)


def _switch_branch(run_dir: Path, folder: Path, state: Mapping, number: int, log: Callable[[str], None]) -> None:
    """Restores the rows that led to a checkpoint, and puts rows, checkpoints and videos of other branches aside.

    The rows of metrics.jsonl are replaced last: if this is interrupted, the same command does it again.

    Args:
        run_dir: the run folder.
        folder: the named checkpoint, of this run or of another one.
        state: the state.json of the checkpoint.
        number: the number to put files aside under.
        log: prints a line.
    """
    checkpoints, own = run_dir / "checkpoints", {name: run_dir / f"{name}.jsonl" for name in FILES}
    # A checkpoint in the run's own folder belongs to it even if its rows were edited or an older version saved it.
    is_kept = _is_in(folder, checkpoints) and folder.name.startswith("step_")
    is_kept = is_kept or _is_copy(folder, checkpoints / f"step_{state['step']:06d}")
    rows, source = read_json_lines(own["metrics"]), None
    if "branch" in state or not is_kept:
        source = _find_rows(run_dir, folder, state)
    is_own = source == own["metrics"] or (source is None and is_kept)
    if rows and (not is_own or rows[-1].get("step", 0) > state["step"]):
        checkpoints.mkdir(exist_ok=True)
        for name, file in own.items():
            target = checkpoints / f"aside_{number}_{name}.jsonl"
            # An interrupted call may have made the copy and replaced the validation rows already.
            if file.exists() and not target.exists():
                copy_atomic(file, target)
    if is_own:
        return
    parting = _parting(own["metrics"], source) if source else _first_parting(run_dir, folder)
    if rows:
        found = f"it shares them up to step {parting}" if parting else "it has no rows"
        found = f"it continues those of {source}" if source else found
        log(f"{folder} is from another branch; the run's rows were put aside as aside_{number}_metrics.jsonl: {found}")
    for path in checkpoint.find_checkpoints(checkpoints):
        if checkpoint.step_of(path) > parting and path.resolve() != folder.resolve():
            log(f"put aside: {_put_aside(path, number)}")
    _put_videos_aside(run_dir, parting, number)
    for name in reversed(FILES):
        theirs = source and source.with_name(source.name.replace("metrics", name))
        if theirs and theirs.exists():
            copy_atomic(theirs, own[name])
        elif own[name].exists() and parting and not source:
            write_atomic(own[name], b"".join(_lines_until(own[name], parting)), durable=True)
        else:
            own[name].unlink(missing_ok=True)


def _is_in(folder: Path, checkpoints: Path) -> bool:
    return folder.parent.resolve() == checkpoints.resolve()


def _is_copy(folder: Path, other: Path) -> bool:
    """Whether two checkpoints have the same manifest, which has the hash of each file."""
    manifests = [path / checkpoint.MANIFEST for path in (folder, other)]
    return all(path.is_file() for path in manifests) and filecmp.cmp(*manifests, shallow=False)


def _find_rows(run_dir: Path, folder: Path, state: Mapping) -> Path | None:
    """Returns the file of the rows that led to a checkpoint.

    It may be metrics.jsonl of the run or of the run that the checkpoint is in, or a file that was put aside.
    """
    homes = [run_dir / "checkpoints", Path(os.path.abspath(folder)).parent, folder.resolve().parent]
    files = [run_dir / "metrics.jsonl"]
    for home in homes:
        files += [home.parent / "metrics.jsonl", *sorted(home.glob("aside_*_metrics.jsonl"))]
    return next((file for file in files if _led_to(file, state)), None)


def _lines_until(file: Path, step: int) -> list[bytes]:
    """Returns the lines of a file that are rows of steps up to `step`."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if (parse_object(line) or {}).get("step", math.inf) <= step]


def _led_to(file: Path, state: Mapping) -> bool:
    """Whether the rows of a file led to a checkpoint, by the hash that `Metrics.state` returned."""
    lines = _lines_until(file, state["step"])
    if "branch" in state:
        return hashlib.sha256(b"".join(lines)).hexdigest() == state["branch"]
    return len(lines) == state["rows"].get("metrics") and _fits(file, [json.loads(line) for line in lines], state)


def _fits(file: Path, rows: Sequence[Mapping], state: Mapping) -> bool:
    """Whether rows led to a checkpoint of a version before 0.2, which stored no hash of them.

    The losses of the last steps must be equal. The last update of the checkpoint has not affected any loss yet, so the
    next checkpoint after these rows must also have the same settings.
    """
    losses = [row.get("loss") for row in rows if row.get("spike") != "skip"]
    pairs = list(zip(reversed(losses), reversed(state["losses"]), strict=False))
    prefix = file.name.removesuffix("metrics.jsonl")
    home = file.parent if prefix else file.parent / "checkpoints"
    states = [parse_object(path.read_bytes()) or {} for path in home.glob(f"{prefix}step_*/state.json")]
    later = [each for each in states if each.get("step", 0) >= state["step"]]
    settings = min(later, key=lambda each: each["step"])["settings"] if later else {}
    is_alike = all(settings.get(key) == state["settings"][key] for key in bound_settings(state["settings"]))
    return bool(pairs) and all(ours == theirs for ours, theirs in pairs) and bool(later) and is_alike


def _first_parting(run_dir: Path, folder: Path) -> int:
    """Returns the last step whose row a checkpoint without rows of its own shares with the run.

    A checkpoint that was put aside in this run shares the rows up to the first step that the user went back to. Returns
    0 if the checkpoint may be from another run.
    """
    checkpoints = run_dir / "checkpoints"
    # `since` begins at the first start that named a checkpoint. A later start at step 0 was a new run.
    since = list(itertools.dropwhile(lambda start: not start.get("resume_from"), read_history(run_dir)))
    named = [Path(start["resume_from"]) for start in since if start.get("resume_from")]
    is_of_run = folder.name.startswith("aside_") and all(_is_in(path, checkpoints) for path in (folder, *named))
    return min((start["from_step"] for start in since), default=0) if is_of_run else 0


def _parting(before: Path, now: Path) -> int:
    """Returns the last step that two files of rows share; rows of different executions differ in their seconds."""
    pairs = zip(read_json_lines(before), read_json_lines(now), strict=False)
    shared = [row for row, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return shared[-1].get("step", 0) if shared else 0
