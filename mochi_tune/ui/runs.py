"""Reads run folders for the page: owner, progress, metrics and videos. It never writes to them."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import psutil

from mochi_tune.errors import DataError
from mochi_tune.files import parse_object
from mochi_tune.training.eval_files import find_eval_videos
from mochi_tune.training.metrics import best_validation
from mochi_tune.ui.folder import changed_at, inside
from mochi_tune.ui.rows import NUMBERS, RowReader

# Maximum number of points of a curve, about the number of pixels of a chart.
MAX_POINTS = 600
_ROWS = RowReader()
# Files by which a folder is recognised as a run.
RUN_MARKS = ("metrics.jsonl", ".lock", "history.jsonl")
# `started` in .lock is cut to whole seconds.
LOCK_SECONDS = 1.5


@dataclass(frozen=True)
class Sample:
    """An eval video, with the base model on the left and the LoRA on the right."""

    step: int
    prompt: int
    path: Path


@dataclass(frozen=True)
class RunState:
    """The progress of a run.

    Attributes:
        step: last step in metrics.jsonl; 0 if there is none.
        owner_pid: number of the process of this machine that trains the run; 0 for none.
        checkpoints: steps of the existing checkpoints, in ascending order.
        is_finished: whether the last step of the training is saved.
    """

    step: int
    owner_pid: int
    checkpoints: tuple[int, ...]
    is_finished: bool


def list_runs(folder: Path) -> list[str]:
    """Returns the run folders in `runs`, as paths in the page's folder, the newest first."""
    runs = folder / "runs"
    found = [path for path in runs.iterdir() if path.is_dir() and not path.is_symlink()] if runs.is_dir() else []
    changed = {path: max(map(changed_at, (path / mark for mark in RUN_MARKS))) for path in found}
    newest = sorted((path for path in found if changed[path]), key=lambda path: changed[path], reverse=True)
    return [path.relative_to(folder).as_posix() for path in newest]


def runs_state(folder: Path) -> list[Any]:
    """Returns a state of all runs that changes with anything that the page shows of them."""
    found: list[Any] = []
    for name in list_runs(folder):
        run_dir = folder / name
        numbers = [changed_at(run_dir / file) for file in ("metrics.jsonl", "validation.jsonl")]
        folders = [folder_state(run_dir / file) for file in ("checkpoints", "samples")]
        found.append([name, numbers, owner(run_dir), folders])
    return found


def folder_state(path: Path) -> tuple[int, int]:
    """Returns a state that changes when a file of a folder is added, removed or replaced; (0, 0) for no folder.

    The cost does not depend on the number of files, because each run is polled every two seconds. The state includes
    the number of entries because some disks have coarse timestamps.
    """
    try:
        return path.stat().st_mtime_ns, len(os.listdir(path))
    except OSError:
        return 0, 0


def read_state(run_dir: Path) -> RunState:
    """Reads the progress of a run, and whether a process of this machine trains it, from the page or a terminal."""
    rows = read_rows(run_dir / "metrics.jsonl")
    steps = tuple(_checkpoints(run_dir))
    is_finished = bool(steps) and recorded_settings(run_dir).get("train.steps") == steps[-1]
    return RunState(rows[-1]["step"] if rows else 0, owner(run_dir), steps, is_finished)


def _checkpoints(run_dir: Path) -> dict[int, Path]:
    """Returns the folders of a run's checkpoints by step, in ascending order."""
    found = {path.name.rpartition("_")[2]: path for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir()}
    return dict(sorted((int(step), path) for step, path in found.items() if step.isdecimal()))


def owner(run_dir: Path) -> int:
    """Returns the number of the process of this machine that trains in a run folder; 0 for none.

    That process holds the lock of the folder as long as it has the lock file open. Trying the lock instead would make
    a training fail that starts at that moment.
    """
    path = run_dir / ".lock"
    try:
        who = parse_object(path.read_bytes()) or {}
        pid = int(who["pid"])
        started = datetime.fromisoformat(who["started"]).astimezone(UTC).timestamp()
        if who["host"] != socket.gethostname():
            return 0
        process = psutil.Process(pid)
        try:
            is_owner = os.fspath(path.resolve()) in [file.path for file in process.open_files()]
        except psutil.AccessDenied:
            # A process of another user. The file has whole seconds.
            is_owner = 0 <= process.create_time() - started < LOCK_SECONDS
        return pid if is_owner and process.status() != psutil.STATUS_ZOMBIE else 0
    except (OSError, KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        return 0


def stop_run(run_dir: Path) -> int:
    """Asks the training in a run folder to save and end, by SIGTERM, like Ctrl-C in its terminal.

    Returns:
        The number of the process.

    Raises:
        DataError: no process of this machine trains in the folder, or another user owns it.
    """
    name = run_dir.name
    pid = owner(run_dir)
    if not pid:
        raise DataError(f"{name} is not being trained on this machine: there is nothing to stop.")
    try:
        # If the process has ended and another one has its number, psutil raises NoSuchProcess.
        psutil.Process(pid).terminate()
    except psutil.AccessDenied:
        raise DataError(f"{name} is trained by process {pid} of another user: ask that user to stop it.") from None
    except psutil.NoSuchProcess:
        raise DataError(f"{name} has just ended: there is nothing to stop.") from None
    return pid


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl or validation.jsonl with the keys that the page shows, see `RowReader`."""
    return _ROWS.read(path)


def thin(rows: Sequence[Mapping[str, Any]], most: int = MAX_POINTS) -> list[Mapping[str, Any]]:
    """Returns at most `most` evenly spaced rows, including the first and the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)]


def curves(folder: Path, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Returns the points of the charts: key of NUMBERS -> points with step, value and run.

    Raises:
        DataError: a run is outside of the folder.
    """
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in NUMBERS}
    for name in names:
        for row in thin(read_rows(inside(folder, name) / "metrics.jsonl")):
            for key in NUMBERS:
                if isinstance(row.get(key), int | float) and isfinite(row[key]):
                    found[key].append({"step": row["step"], "value": row[key], "run": Path(name).name})
    return found


def validation_curves(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the points of the validation loss: step, value and line.

    The lines of one run are "mean" and the noise levels. Several runs have one line each, their mean, with the name of
    the run.
    """
    points = []
    for name in names:
        for row in read_rows(inside(folder, name) / "validation.jsonl"):
            title = Path(name).name
            if isfinite(row.get("validation_loss") or float("nan")):
                line = "mean" if len(names) == 1 else title
                points.append({"step": row["step"], "value": row["validation_loss"], "line": line})
            if len(names) == 1:
                bins = row.get("bins") or {}
                points += [{"step": row["step"], "value": v, "line": f"σ {k}"} for k, v in bins.items() if isfinite(v)]
    return points


def best_step(run_dir: Path) -> tuple[int, float] | None:
    """Returns the step of the lowest validation loss, and that; None before there is one."""
    return best_validation(read_rows(run_dir / "validation.jsonl"))


def list_samples(run_dir: Path) -> list[Sample]:
    """Returns the eval videos of a run by step and prompt."""
    return [Sample(*found) for found in find_eval_videos(run_dir)]


def prompts_of(run_dir: Path) -> list[str]:
    """Returns the prompts of the eval videos in the run's newest checkpoint, [] without a checkpoint."""
    return [str(prompt) for prompt in recorded_settings(run_dir).get("train.sample_prompts") or []]


def recorded_settings(run_dir: Path) -> dict[str, Any]:
    """Returns the settings in the run's newest checkpoint by dotted key, {} without a checkpoint."""
    states = [path / "state.json" for path in _checkpoints(run_dir).values()]
    newest = next((path for path in reversed(states) if path.is_file()), None)
    try:
        found = (parse_object(newest.read_bytes()) or {}) if newest else {}
    except OSError:
        # The training has removed it meanwhile, as an old checkpoint.
        found = {}
    settings = found.get("settings")
    return settings if isinstance(settings, dict) else {}
