"""Going back to a checkpoint that the user names: the rows, checkpoints and videos that belong to it, and no others.

What is given up at a going back is put aside under a number, with a copy of its rows. A checkpoint has the hash of the
rows that led to it, which have their seconds and thus are of one execution alone.
"""

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from mochi_tune.files import copy_atomic, parse_object, read_json_lines
from mochi_tune.training import checkpoint
from mochi_tune.training.eval_files import find_eval_videos, prompt_file
from mochi_tune.training.metrics import FILES


def next_number(checkpoints: Path) -> int:
    """Returns a number under which nothing has been put aside yet."""
    return next(number for number in itertools.count() if not any(checkpoints.glob(f"aside_{number}_*")))


def put_aside(path: Path, number: int) -> Path:
    """Renames a file or a folder, so that it is no longer of the run; returns the new path."""
    target = path.with_name(f"aside_{number}_{path.name}")
    os.rename(path, target)
    return target


def put_videos_aside(run_dir: Path, after: int, number: int) -> None:
    """Puts the eval videos of later steps aside, with their prompts."""
    for step, _, video in find_eval_videos(run_dir):
        if step > after:
            for file in (video, prompt_file(video)):
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
    rows, source = read_json_lines(own["metrics"]), _find_rows(run_dir, folder, state)
    # One of the run whose rows were edited since, or which an earlier version saved, is its own all the same.
    is_in_place = folder.name.startswith("step_") and folder.parent.resolve() == checkpoints.resolve()
    is_own = source == own["metrics"] or (source is None and is_in_place)
    if rows and (not is_own or rows[-1].get("step", 0) > state["step"]):
        checkpoints.mkdir(exist_ok=True)
        for name, file in own.items():
            if file.exists():
                copy_atomic(file, checkpoints / f"aside_{number}_{name}.jsonl")
    if is_own:
        return
    if rows:
        found = f"those of {source} are taken" if source else "its own are not there"
        log(f"{folder} is of another branch; rows put aside as aside_{number}_metrics.jsonl: {found}")
    parting = _parting(own["metrics"], source) if source else 0
    for path in checkpoint.find_checkpoints(checkpoints):
        if checkpoint.step_of(path) > parting and path.resolve() != folder.resolve():
            log(f"put aside: {put_aside(path, number)}")
    put_videos_aside(run_dir, parting, number)
    for name in reversed(FILES):
        theirs = source and source.with_name(source.name.replace("metrics", name))
        if theirs and theirs.exists():
            copy_atomic(theirs, own[name])
        else:
            own[name].unlink(missing_ok=True)


def _find_rows(run_dir: Path, folder: Path, state: Mapping) -> Path | None:
    """Returns the file of the rows that led to a checkpoint: the run's, or one beside the checkpoint or put aside."""
    homes = [run_dir / "checkpoints", Path(os.path.abspath(folder)).parent, folder.resolve().parent]
    files = [run_dir / "metrics.jsonl"]
    for home in homes:
        files += [home.parent / "metrics.jsonl", *sorted(home.glob("aside_*_metrics.jsonl"))]
    return next(
        (file for file in files if "branch" in state and _branch_of(file, state["step"]) == state["branch"]), None
    )


def _branch_of(file: Path, step: int) -> str:
    """Returns the hash of the rows of a file up to a step, as `Metrics.state` has it."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if (parse_object(line) or {}).get("step", math.inf) <= step]
    return hashlib.sha256(b"".join(kept)).hexdigest()


def _parting(before: Path, now: Path) -> int:
    """Returns the last step that two files of rows share: with its seconds, a row is of one execution alone."""
    pairs = zip(read_json_lines(before), read_json_lines(now), strict=False)
    shared = [row for row, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return shared[-1].get("step", 0) if shared else 0
