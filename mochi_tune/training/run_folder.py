"""The run folder: its lock, and resuming: from which checkpoint a run goes on, and whether it is the same run."""

import errno
import fcntl
import filecmp
import json
import os
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mochi_tune.config.settings import resume_rule
from mochi_tune.errors import CheckpointError, TrainingError
from mochi_tune.files import copy_atomic, read_json, read_json_lines, remove_temporary_files
from mochi_tune.training import checkpoint


class RunLock:
    """Locks a run folder for this process.

    The operating system holds the lock and drops it when the process ends, however it ends. The file names the owner.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"

    def __enter__(self) -> "RunLock":
        self._file = open(self.path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            owner = self._file.read().strip()
            self._file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise TrainingError(
                    f"{self.path.parent} is on a file system without locks ({error.strerror}), and two trainers in one "
                    "run folder would ruin each other's run: use a run_dir on another one."
                ) from None
            raise TrainingError(
                f"{self.path.parent} is being trained by {_described(owner)}: wait for it, or use another run_dir."
            ) from None
        self._file.truncate(0)
        self._file.write(json.dumps(this_process()))
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def this_process() -> dict[str, object]:
    """Returns the host, the process number and the start time (UTC) of this process, which together are unique."""
    import datetime

    import psutil

    started = datetime.datetime.fromtimestamp(psutil.Process().create_time(), datetime.UTC)
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started.isoformat(timespec="seconds")}


def _described(owner: str) -> str:
    try:
        who = json.loads(owner)
        return f"process {who['pid']} of host {who['host']}, started {who['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts: at a checkpoint, or at step 0.

    Attributes:
        step: the last finished step.
        folder: of the checkpoint; None at step 0.
        state: the checkpoint's state.json.
        notes: lines for the user.
        changed: settings that differ and were forced.
    """

    step: int = 0
    folder: Path | None = None
    state: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def find_resume_point(
    run_dir: Path,
    identity: dict,
    mode: str,
    resume_from: Path | None,
    environment: Mapping[str, object],
    agreed: Collection[tuple[int, list[str]]] = (),
) -> ResumePoint:
    """Finds the checkpoint to resume from and checks that it belongs to the same run; changes nothing on the disk.

    Args:
        run_dir: of the run.
        identity: settings, cache, base and draws of this command's run.
        mode: "auto" or "force"; "force" resumes in spite of other settings.
        resume_from: a checkpoint that the user names; None for the newest valid one.
        environment: what this process computes with, see `describe_environment`.
        agreed: steps and the changes that were forced there before; they need not be forced again.

    Raises:
        TrainingError: it is another run, or one whose checkpoints are gone.
        CheckpointError: the named checkpoint, or every one, is damaged, or something is missing from it.
    """
    folder, wrong = named_checkpoint(resume_from) if resume_from else checkpoint.newest_valid(run_dir / "checkpoints")
    if folder is None:
        if wrong:
            raise CheckpointError(
                f"{run_dir} has no checkpoint to go on from: {'; '.join(wrong)}: use another run_dir, "
                f"or remove {run_dir / 'checkpoints'} and the adapter to begin anew."
            )
        if (run_dir / "adapter.safetensors").exists():
            raise TrainingError(f"{run_dir} has an adapter and no checkpoint to go on from: use another run_dir.")
        return ResumePoint()
    state = read_json(folder / "state.json")
    needed = ("step", "settings", "cache", "base", "draws", "groups", "rows", "losses")
    if missing := [key for key in needed if key not in state]:
        raise CheckpointError(f"{folder / 'state.json'} has no {', '.join(missing)}: a run cannot go on without.")
    try:
        changed, notes = differences(run_dir, state, identity, mode, agreed)
    except TrainingError as error:
        raise TrainingError("; ".join([*wrong, str(error)])) from None
    before = state.get("environment", environment)
    differing = [key for key, now in environment.items() if before.get(key) != now]
    if others := [f"{key} was {before.get(key)}, is {environment[key]}" for key in differing]:
        notes.append(f"{'; '.join(others)}: the same samples in the same order, but no longer the same bits")
    return ResumePoint(
        state["step"], folder, state, [f"{text}: the one before is taken" for text in wrong] + notes, changed
    )


def named_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """Returns the checkpoint that a user names, and no damage.

    Raises:
        CheckpointError: it is damaged.
    """
    if not (folder / checkpoint.MANIFEST).exists():
        near = [*checkpoint.find_checkpoints(folder / "checkpoints"), *checkpoint.find_checkpoints(folder.parent)]
        there = f"use one of {', '.join(map(str, near))}" if near else "name a folder RUN_DIR/checkpoints/step_NNNNNN"
        raise CheckpointError(f"resume_from={folder} is no checkpoint: {there}.")
    if damage := checkpoint.damage_of(folder):
        raise CheckpointError(f"{damage}: name another one in resume_from, or leave it out for the newest whole one.")
    return folder, []


def differences(
    run_dir: Path, state: dict, identity: dict, mode: str, agreed: Collection[tuple[int, list[str]]]
) -> tuple[list[str], list[str]]:
    """Returns the forced changes, and lines about all changes for the user.

    Raises:
        TrainingError: a setting that decides what is learnt has changed, and is not forced or cannot be forced.
    """
    before, now = state["settings"], identity["settings"]
    differing = [key for key in now if before.get(key) != now[key]]
    texts = {key: f"{key} was {before.get(key)}, is {now[key]}" for key in differing}
    others = {part: f"the {part} is another one" for part in ("cache", "base") if state[part] != identity[part]}
    if state["draws"] != identity["draws"] and before.get("seed") == now["seed"]:
        others["draws"] = f"this torch draws other random numbers than {state.get('environment', {}).get('torch')} did"
    decisive = bound_settings(differing)
    held = [texts[key] for key in decisive if resume_rule(key) == "held"]
    held += [text for part, text in others.items() if part == "base"]
    changed = [texts[key] for key in decisive] + list(others.values())
    is_forced = mode == "force" or (state["step"], changed) in agreed
    if changed and (held or not is_forced):
        force = "" if held else ", or go on all the same by resume=force, as a run that nobody can repeat"
        raise TrainingError(
            f"{run_dir} cannot go on from step {state['step']}: {'; '.join(held or changed)}: "
            f"put that back, or start another run with run_dir=DIR{force}."
        )
    notes = [f"since step {state['step']} {text}" for key, text in texts.items() if not key.startswith(_UNMENTIONED)]
    notes += [f"since step {state['step']} {text}" for text in others.values()]
    if before.get("train.steps") != now["train.steps"] and now.get("train.schedule", "cosine") != "constant":
        notes.append("the learning rate's schedule is stretched to the new number of steps from here")
    return changed, notes


# Changes of these are not worth a line: they say where things are and how they are reported.
_UNMENTIONED = ("name", "run_dir", "resume", "sample.", "log.", "data.videos", "data.cache")


def bound_settings(settings: dict | list[str]) -> list[str]:
    """Returns the settings that decide what is learnt."""
    return [key for key in settings if resume_rule(key) != "free"]


def rewind(run_dir: Path, start: ResumePoint, log: Callable[[str], None]) -> None:
    """Returns the run folder to its state at the step that the run resumes from.

    Checkpoints of later steps are renamed: they are damaged, or the user named an older one. Eval videos of later
    steps are removed, as they are rendered again.
    """
    checkpoints = run_dir / "checkpoints"
    remove_temporary_files(run_dir)
    if checkpoints.is_dir():
        if stale := checkpoint.clear_leftovers(checkpoints):
            log(f"removed what an interrupted save left: {', '.join(stale)}")
        kept = [path for path in checkpoint.find_checkpoints(checkpoints) if checkpoint.step_of(path) <= start.step]
        for path in sorted(checkpoints.glob("step_*")):
            if path not in kept:
                log(f"put aside: {_put_aside(path)}")
    for video in run_dir.glob("samples/step_*"):
        number = video.name.split("_")[1]
        if not number.isdigit() or int(number) > start.step or start.folder is None:
            video.unlink()
    own = run_dir / "adapter.safetensors"
    if start.folder is not None:
        published = checkpoint.published_file(start.folder)
        if not own.exists() or not filecmp.cmp(published, own, shallow=False):
            # The run was killed right after a save, before it had copied the adapter.
            copy_atomic(published, own)
    else:
        (run_dir / "validation.jsonl").unlink(missing_ok=True)


def _put_aside(path: Path) -> Path:
    number = 0
    while (target := path.with_name(f"aside_{number}_{path.name}")).exists():
        number += 1
    os.rename(path, target)
    return target


def describe_environment(strategy: str, device: torch.device, num_processes: int) -> dict[str, object]:
    """Returns what the numbers of a run depend on besides its settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"torch": str(torch.__version__), "processes": num_processes, "strategy": strategy, "device": name}


def record_start(run_dir: Path, facts: dict) -> None:
    """Appends to run_dir/history.jsonl how and from where this process starts."""
    with open(run_dir / "history.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\n")


def read_history(run_dir: Path) -> list[dict]:
    """Returns what `record_start` wrote so far; a killed process may have left a part of a line."""
    return read_json_lines(run_dir / "history.jsonl")
