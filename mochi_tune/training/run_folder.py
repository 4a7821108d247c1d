"""Whether a run folder holds a run that goes on, from where, and whether that is the run that is asked for."""

import filecmp
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mochi_tune.config.settings import resume_rule
from mochi_tune.errors import CheckpointError, TrainingError
from mochi_tune.training import checkpoint


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or at none.

    Attributes:
        step: the last one that is done.
        folder: of the checkpoint, None at the very beginning.
        state: what the checkpoint's state.json tells.
        notes: lines for the user.
        changed: settings that differ and were forced.
    """

    step: int = 0
    folder: Path | None = None
    state: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def find_start(
    run_dir: Path,
    identity: dict,
    mode: str,
    resume_from: Path | None,
    made_by: Mapping[str, object],
    agreed: Collection[tuple[int, list[str]]] = (),
) -> Start:
    """Finds the checkpoint to go on from and makes sure that it is of the same run; changes nothing on the disk.

    Args:
        run_dir: of the run.
        identity: settings, cache, base and draws of the run that is asked for.
        mode: "auto" or "force", which goes on in spite of other settings.
        resume_from: a checkpoint that the user names; None for the newest whole one.
        made_by: what this process computes with, see `saves.made_by`.
        agreed: steps and the changes that were forced there before; they need not be forced again.

    Raises:
        TrainingError: it is another run, or one whose checkpoints are gone.
        CheckpointError: the named checkpoint, or every one, is damaged, or something is missing from it.
    """
    folder, wrong = named(resume_from) if resume_from else checkpoint.newest_whole(run_dir / "checkpoints")
    if folder is None:
        if wrong:
            raise CheckpointError(
                f"{run_dir} has no checkpoint to go on from: {'; '.join(wrong)}: use another run_dir, "
                f"or remove {run_dir / 'checkpoints'} and the adapter to begin anew."
            )
        if (run_dir / "adapter.safetensors").exists():
            raise TrainingError(f"{run_dir} has an adapter and no checkpoint to go on from: use another run_dir.")
        return Start()
    state = checkpoint.read_json(folder / "state.json")
    needed = ("step", "settings", "cache", "base", "draws", "groups", "rows", "losses", "made_by")
    if missing := [key for key in needed if key not in state]:
        raise CheckpointError(f"{folder / 'state.json'} has no {', '.join(missing)}: a run cannot go on without.")
    try:
        changed, notes = differences(run_dir, state, identity, mode, agreed)
    except TrainingError as error:
        raise TrainingError("; ".join([*wrong, str(error)])) from None
    if others := [f"{key} was {state['made_by'].get(key)}, is {now}" for key, now in made_by.items()
                  if state["made_by"].get(key) != now]:  # fmt: skip
        notes.append(f"{'; '.join(others)}: the same samples in the same order, but no longer the same bits")
    return Start(state["step"], folder, state, [f"{text}: the one before is taken" for text in wrong] + notes, changed)


def named(folder: Path) -> tuple[Path, list[str]]:
    """Returns the checkpoint that a user names.

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
    """Returns what is forced to be another, and lines that tell of what has changed.

    Raises:
        TrainingError: something that decides what is learnt has changed, and is not forced or cannot be.
    """
    before, now = state["settings"], identity["settings"]
    differing = [key for key in now if before.get(key) != now[key]]
    texts = {key: f"{key} was {before.get(key)}, is {now[key]}" for key in differing}
    others = {part: f"the {part} is another one" for part in ("cache", "base") if state[part] != identity[part]}
    if state["draws"] != identity["draws"] and before.get("seed") == now["seed"]:
        others["draws"] = f"this torch draws other random numbers than {state['made_by'].get('torch')} did"
    decisive = bound(differing)
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
    notes = [f"since step {state['step']} {text}" for key, text in texts.items() if not key.startswith(_UNTOLD)]
    notes += [f"since step {state['step']} {text}" for text in others.values()]
    if before.get("train.steps") != now["train.steps"] and now.get("train.schedule", "cosine") != "constant":
        notes.append("the learning rate's schedule is stretched to the new number of steps from here")
    return changed, notes


# Where things are and how they are told of is nobody's concern.
_UNTOLD = ("name", "run_dir", "resume", "sample.", "log.", "data.videos", "data.cache")


def bound(settings: dict | list[str]) -> list[str]:
    """Returns the settings that decide what is learnt."""
    return [key for key in settings if resume_rule(key) != "free"]


def take_back(run_dir: Path, start: Start, tell: Callable[[str], None]) -> None:
    """Makes the run folder what it was at the step that the run goes on from.

    Checkpoints of later steps, which are damaged or were passed over by name, are put aside under another name. Eval
    videos of later steps go; they are rendered again.
    """
    checkpoints = run_dir / "checkpoints"
    if checkpoints.is_dir():
        if stale := checkpoint.clear_leftovers(checkpoints):
            tell(f"removed what a broken off save had left: {', '.join(stale)}")
        kept = [path for path in checkpoint.find_checkpoints(checkpoints) if checkpoint.step_of(path) <= start.step]
        for path in sorted(checkpoints.glob("step_*")):
            if path not in kept:
                tell(f"put aside: {_put_aside(path)}")
    for video in run_dir.glob("samples/step_*"):
        number = video.name.split("_")[1]
        if not number.isdigit() or int(number) > start.step or start.folder is None:
            video.unlink()
    own = run_dir / "adapter.safetensors"
    if start.folder is not None:
        published = checkpoint.published_file(start.folder)
        if not own.exists() or not filecmp.cmp(published, own, shallow=False):
            # A run that was killed right after a save has not put its adapter here yet.
            checkpoint.replace_file(published, own)
    else:
        (run_dir / "validation.jsonl").unlink(missing_ok=True)


def _put_aside(path: Path) -> Path:
    number = 0
    while (target := path.with_name(f"aside_{number}_{path.name}")).exists():
        number += 1
    os.rename(path, target)
    return target
