"""Going back to a checkpoint that the user names: the rows, checkpoints and videos that belong to it, and no others.

Steps alone would not tell two branches of a run apart, or two runs: each has a step 8, with another loss.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mochi_tune.files import copy_atomic, read_json_lines
from mochi_tune.training import checkpoint
from mochi_tune.training.eval_files import find_eval_videos, prompt_file
from mochi_tune.training.metrics import FILES


def has_led_to(rows: Sequence[dict], state: dict) -> bool:
    """Whether the rows of metrics.jsonl up to a checkpoint's step have the last losses that the checkpoint saved."""
    losses = [row.get("loss") for row in rows if row.get("step", 0) <= state["step"] and row.get("spike") != "skip"]
    saved = state["losses"]
    shorter = min(len(losses), len(saved))
    return losses[len(losses) - shorter :] == saved[len(saved) - shorter :]


def next_number(checkpoints: Path) -> int:
    """Returns a number under which nothing has been put aside yet."""
    number = 0
    while any(checkpoints.glob(f"aside_{number}_*")):
        number += 1
    return number


def put_aside(path: Path, number: int) -> Path:
    """Renames a file or a folder, so that it is no longer of the run; returns the new path."""
    target = path.with_name(f"aside_{number}_{path.name}")
    os.rename(path, target)
    return target


def enter_branch(run_dir: Path, folder: Path, state: dict, number: int, log: Callable[[str], None]) -> None:
    """Gives a run the rows that led to a checkpoint, and takes the rows, checkpoints and videos of another branch.

    The rows that the run has are copied to checkpoints/aside_N_metrics.jsonl and aside_N_validation.jsonl first, where
    going back to a checkpoint of theirs finds them.

    Args:
        run_dir: of the run.
        folder: the checkpoint that is gone back to, of this run or of another one.
        state: its state.json.
        number: under which this is put aside.
        log: takes lines for the user.
    """
    checkpoints, own = run_dir / "checkpoints", run_dir / "metrics.jsonl"
    rows = read_json_lines(own)
    if not rows:
        return
    is_same = has_led_to(rows, state)
    if is_same and rows[-1].get("step", 0) <= state["step"]:
        return
    checkpoints.mkdir(exist_ok=True)
    for name in FILES:
        if (file := run_dir / f"{name}.jsonl").exists():
            copy_atomic(file, checkpoints / f"aside_{number}_{name}.jsonl")
    if is_same:
        return
    candidates = [*sorted(checkpoints.glob("aside_*_metrics.jsonl")), folder.parent.parent / "metrics.jsonl"]
    found = next((path for path in candidates if path.exists() and has_led_to(read_json_lines(path), state)), None)
    for name in FILES:
        kept = found and found.with_name(found.name.replace("metrics", name))
        if kept and kept.exists():
            copy_atomic(kept, run_dir / f"{name}.jsonl")
        else:
            (run_dir / f"{name}.jsonl").unlink(missing_ok=True)
    back = f"those of {found} are taken" if found else "none are taken, as its own are not there"
    log(f"the rows of {own} did not lead to {folder} and are put aside as {number}: {back}")
    _put_others_aside(run_dir, rows, read_json_lines(own), folder, number, log)


def _put_others_aside(
    run_dir: Path, before: Sequence[dict], now: Sequence[dict], folder: Path, number: int, log: Callable[[str], None]
) -> None:
    losses = [{row.get("step"): row.get("loss") for row in rows} for rows in (before, now)]
    # The last step with the same loss in both may have made another update; those before it did not.
    parting = max((step for step, loss in losses[0].items() if step and losses[1].get(step) == loss), default=0)
    for path in checkpoint.find_checkpoints(run_dir / "checkpoints"):
        if checkpoint.step_of(path) >= parting and path.resolve() != folder.resolve():
            log(f"put aside: {put_aside(path, number)}")
    for step, _, video in find_eval_videos(run_dir):
        if step >= max(1, parting):
            for file in (video, prompt_file(video)):
                if file.exists():
                    put_aside(file, number)
