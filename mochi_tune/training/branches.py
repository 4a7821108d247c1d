"""Going back to a checkpoint that the user names: the rows, checkpoints and videos that belong to it, and no others.

What is given up at a going back is put aside under a number, with a copy of its rows. A checkpoint has the hash of the
rows that led to it, which have their seconds and thus are of one execution alone.
"""

import filecmp
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mochi_tune.files import copy_atomic, parse_object, read_json_lines, write_atomic
from mochi_tune.training import checkpoint
from mochi_tune.training.eval_files import find_eval_videos, prompt_file
from mochi_tune.training.metrics import FILES
from mochi_tune.training.preflight import bound_settings
from mochi_tune.training.run_folder import read_history


def next_number(checkpoints: Path) -> int:
    """Returns a number under which nothing has been put aside yet."""
    return next(number for number in itertools.count() if not any(checkpoints.glob(f"aside_{number}_*")))


def number_of_going_back(run_dir: Path) -> int:
    """Returns the number of a going-back that was broken off before it changed the rows, else a new one."""
    own, number = run_dir / "metrics.jsonl", next_number(run_dir / "checkpoints")
    last = run_dir / "checkpoints" / f"aside_{number - 1}_metrics.jsonl"
    is_begun = own.exists() and last.exists() and filecmp.cmp(own, last, shallow=False)
    return number - 1 if is_begun else number


def put_aside(path: Path, number: int) -> Path:
    """Renames a file or a folder, so that it is no longer of the run; returns the new path, which replaces nothing."""
    targets = (path.with_name(f"aside_{each}_{path.name}") for each in itertools.count(number))
    target = next(target for target in targets if not os.path.lexists(target))
    os.rename(path, target)
    return target


def put_videos_aside(run_dir: Path, after: int, number: int) -> None:
    """Puts the eval videos of later steps aside, with their prompts."""
    for step, _, video in find_eval_videos(run_dir):
        if step > after:
            # Where this is cut off, the video still tells of its prompt.
            for file in (prompt_file(video), video):
                if file.exists():
                    put_aside(file, number)


def enter_branch(run_dir: Path, folder: Path, state: Mapping, number: int, log: Callable[[str], None]) -> None:
    """Gives a run the rows that led to a checkpoint; the rows, checkpoints and videos of another branch are put aside.

    Metrics are replaced last: where this is cut off, the same command does it again.

    Args:
        run_dir: of the run.
        folder: the checkpoint that is gone back to, of this run or of another one.
        state: of the checkpoint, its state.json.
        number: under which this is put aside.
        log: takes lines for the user.
    """
    checkpoints, own = run_dir / "checkpoints", {name: run_dir / f"{name}.jsonl" for name in FILES}
    # One of the run whose rows were edited since, or which an earlier version saved, is its own all the same.
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
            # One that was broken off may have replaced the validation's rows since.
            if file.exists() and not target.exists():
                copy_atomic(file, target)
    if is_own:
        return
    parting = _parting(own["metrics"], source) if source else _first_parting(run_dir, folder)
    if rows:
        found = f"its own are there up to step {parting}" if parting else "its own are not there"
        found = f"those of {source} are taken" if source else found
        log(f"{folder} is of another branch; rows put aside as aside_{number}_metrics.jsonl: {found}")
    for path in checkpoint.find_checkpoints(checkpoints):
        if checkpoint.step_of(path) > parting and path.resolve() != folder.resolve():
            log(f"put aside: {put_aside(path, number)}")
    put_videos_aside(run_dir, parting, number)
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
    """Whether two checkpoints are the same: a manifest has the hash of each file."""
    manifests = [path / checkpoint.MANIFEST for path in (folder, other)]
    return all(path.is_file() for path in manifests) and filecmp.cmp(*manifests, shallow=False)


def _find_rows(run_dir: Path, folder: Path, state: Mapping) -> Path | None:
    """Returns the file of the rows that led to a checkpoint: the run's, or one beside the checkpoint or put aside."""
    homes = [run_dir / "checkpoints", Path(os.path.abspath(folder)).parent, folder.resolve().parent]
    files = [run_dir / "metrics.jsonl"]
    for home in homes:
        files += [home.parent / "metrics.jsonl", *sorted(home.glob("aside_*_metrics.jsonl"))]
    return next((file for file in files if _led_to(file, state)), None)


def _lines_until(file: Path, step: int) -> list[bytes]:
    """Returns the lines of a file that are rows up to a step."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if (parse_object(line) or {}).get("step", math.inf) <= step]


def _led_to(file: Path, state: Mapping) -> bool:
    """Whether the rows of a file led to a checkpoint, by the hash that `Metrics.state` has."""
    lines = _lines_until(file, state["step"])
    if "branch" in state:
        return hashlib.sha256(b"".join(lines)).hexdigest() == state["branch"]
    return len(lines) == state["rows"].get("metrics") and _fits(file, [json.loads(line) for line in lines], state)


def _fits(file: Path, rows: Sequence[Mapping], state: Mapping) -> bool:
    """Whether rows fit a checkpoint of a version before 0.2, which kept no hash of them.

    The losses of its last steps are theirs. What its last update was shows in no loss so far: the settings are those of
    the next checkpoint that these rows led to.
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
    """Returns up to which step a checkpoint that has no rows shares those of the run.

    One that was put aside in this run does so up to the first step that was gone back to; 0 where it may be another's.
    """
    checkpoints = run_dir / "checkpoints"
    # A start at step 0 after that began the run anew.
    since = list(itertools.dropwhile(lambda start: not start.get("resume_from"), read_history(run_dir)))
    named = [Path(start["resume_from"]) for start in since if start.get("resume_from")]
    is_of_run = folder.name.startswith("aside_") and all(_is_in(path, checkpoints) for path in (folder, *named))
    return min((start["from_step"] for start in since), default=0) if is_of_run else 0


def _parting(before: Path, now: Path) -> int:
    """Returns the last step that two files of rows share: with its seconds, a row is of one execution alone."""
    pairs = zip(read_json_lines(before), read_json_lines(now), strict=False)
    shared = [row for row, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return shared[-1].get("step", 0) if shared else 0
