"""Going back to a checkpoint that the user names: the rows, checkpoints and videos that belong to it, and no others.

A run's own checkpoints, `step_NNNNNN`, are all of one branch: what is given up at a going back is put aside under a
number, with a copy of its rows. Where a checkpoint lies thus says which rows led to it.
"""

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mochi_tune.files import copy_atomic, read_json_lines
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
    rows, theirs = read_json_lines(own["metrics"]), {name: _rows_file(folder, name) for name in FILES}
    is_own = folder.name.startswith("step_") and folder.parent.resolve() == checkpoints.resolve()
    # A copy that was kept elsewhere has no rows beside it.
    is_own = is_own or (not theirs["metrics"].exists() and _end_alike(rows, state))
    if rows and (not is_own or rows[-1].get("step", 0) > state["step"]):
        checkpoints.mkdir(exist_ok=True)
        for name, file in own.items():
            if file.exists():
                copy_atomic(file, checkpoints / f"aside_{number}_{name}.jsonl")
    if is_own:
        return
    if rows:
        found = f"those of {theirs['metrics']} are taken" if theirs["metrics"].exists() else "its own are not there"
        log(f"{folder} is of another branch; rows put aside as aside_{number}_metrics.jsonl: {found}")
    parting = _parting(own["metrics"], theirs["metrics"])
    for path in checkpoint.find_checkpoints(checkpoints):
        if checkpoint.step_of(path) > parting:
            log(f"put aside: {put_aside(path, number)}")
    put_videos_aside(run_dir, parting, number)
    for name in reversed(FILES):
        if theirs[name].exists():
            copy_atomic(theirs[name], own[name])
        else:
            own[name].unlink(missing_ok=True)


def _rows_file(folder: Path, name: str) -> Path:
    """Returns the file of the rows that led to a checkpoint, beside what was put aside with it or in its run's folder.

    A checkpoint may be a link to an archive, or the folder that holds it.
    """
    aside = re.match(r"aside_\d+_", folder.name)
    homes = [Path(os.path.abspath(folder)).parent, folder.resolve().parent]
    files = [home / f"{aside[0]}{name}.jsonl" if aside else home.parent / f"{name}.jsonl" for home in homes]
    return next((file for file in files if file.exists()), files[0])


def _end_alike(rows: Sequence[Mapping], state: Mapping) -> bool:
    """Whether the last update up to a checkpoint's step has the loss that the checkpoint has saved."""
    losses = [row.get("loss") for row in rows if row.get("step", 0) <= state["step"] and row.get("spike") != "skip"]
    return losses[-1:] == state["losses"][-1:] != []


def _parting(before: Path, now: Path) -> int:
    """Returns the last step that two files of rows share: with its seconds, a row is of one execution alone."""
    pairs = zip(read_json_lines(before), read_json_lines(now), strict=False)
    shared = [row for row, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return shared[-1].get("step", 0) if shared else 0
