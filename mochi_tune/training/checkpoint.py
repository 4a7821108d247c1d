"""Checkpoints: everything that a run needs to resume as if it had not stopped.

A checkpoint is a folder. It is written under a temporary name, gets a manifest with the sha256 of each file, and is
synced and renamed, so that it is complete or absent. Older checkpoints are removed only after that, and are renamed
before their files are deleted. All files are safetensors and JSON; nothing is pickled. Random numbers and the order of
clips are functions of (seed, step, sample), so a checkpoint stores only the seed, the step and a hash that identifies
the random numbers of this version of torch.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from mochi_tune.errors import CheckpointError
from mochi_tune.files import file_sha256, fsync, load_tensors, read_json, save_tensors, write_json

MANIFEST = "manifest.json"
# Patterns of the folders that an interrupted save or removal leaves.
LEFTOVERS = (".tmp_*", ".trash_*")


@contextlib.contextmanager
def new_checkpoint(folder: Path, step: int) -> Iterator[Path]:
    """Yields an empty folder to fill, and renames it to folder/step_NNNNNN when the block ends without an error.

    Raises:
        OSError: the disk is full or refuses to write. The new folder is removed, and the old checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    temporary, final = folder / f".tmp_{step:06d}", folder / f"step_{step:06d}"
    temporary.mkdir()
    try:
        yield temporary
        files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, manifest_of(step, files))
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        if final.exists():
            os.rename(final, folder / f".trash_{step:06d}")
        os.rename(temporary, final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    clear_leftovers(folder)


def manifest_of(step: int, files: Mapping[str, str]) -> dict:
    """Returns the manifest of a checkpoint: its step, the sha256 of each file by name, and a checksum of both."""
    content = json.dumps([step, sorted(files.items())]).encode()
    return {"step": step, "sha256": dict(files), "sum": hashlib.sha256(content).hexdigest()}


def clear_leftovers(folder: Path) -> list[str]:
    """Removes the folders that an interrupted save or removal left; returns their names."""
    stale = [path for pattern in LEFTOVERS for path in folder.glob(pattern)]
    for path in stale:
        if path.is_symlink():
            # A checkpoint may be a link to an archive; only the link is removed.
            path.unlink()
        else:
            shutil.rmtree(path)
    return sorted(path.name for path in stale)


def remove_checkpoints(folder: Path, keep: Collection[int]) -> None:
    """Removes the checkpoints of all other steps. Each one is renamed first, so that none is ever incomplete.

    Copies that the user gave another name stay.
    """
    for path in find_checkpoints(folder):
        if (step := step_of(path)) not in keep and path.name == f"step_{step:06d}":
            os.rename(path, folder / f".trash_{step:06d}")
    clear_leftovers(folder)


def steps_to_keep(steps: Collection[int], newest: int, every: int, best: int | None) -> set[int]:
    """Returns the steps whose checkpoints stay.

    Args:
        steps: steps of all checkpoints.
        newest: number of the newest ones to keep.
        every: keep each step that is a multiple of this; 0 for none.
        best: the best step, which stays too.
    """
    recent = sorted(steps)[-newest:]
    return {step for step in steps if step in recent or step == best or (every and step % every == 0)}


def step_of(checkpoint: Path) -> int:
    """Returns the step in the manifest of a checkpoint, whatever the name of its folder.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    step = read_json(checkpoint / MANIFEST).get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{checkpoint / MANIFEST} has no step.")
    return step


def find_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run that have a manifest, sorted by step; does not check their other files."""
    found = []
    for path in folder.glob("step_*"):
        with contextlib.suppress(CheckpointError):
            found.append((step_of(path), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(folder: Path) -> str:
    """Returns a text that names the last checkpoint of a run."""
    found = find_checkpoints(folder)
    return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest undamaged checkpoint, and a text for each newer one that is damaged.

    Checkpoints without a readable manifest, whose step is unknown, also have a text.
    """
    found = find_checkpoints(folder)
    wrong = [f"{path} has no readable {MANIFEST}" for path in sorted(folder.glob("step_*")) if path not in found]
    for path in reversed(found):
        if not (damage := damage_of(path)):
            return path, wrong
        wrong.append(damage)
    return None, wrong


def damage_of(checkpoint: Path) -> str:
    """Compares every file of a checkpoint with its manifest; returns a text that names damaged files, or "".

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    manifest = read_json(checkpoint / MANIFEST)
    step, expected = manifest.get("step"), manifest.get("sha256")
    # A manifest of another form cannot be computed again, so it is damaged.
    if not isinstance(step, int) or not isinstance(expected, dict):
        return f"{checkpoint} is damaged: {MANIFEST!r} is not what was saved"
    if not all(isinstance(value, str) for value in expected.values()) or manifest != manifest_of(step, expected):
        return f"{checkpoint} is damaged: {MANIFEST!r} is not what was saved"
    found = {p.name: file_sha256(p) if p.is_file() else None for p in checkpoint.iterdir() if p.name != MANIFEST}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{checkpoint} is damaged: {', '.join(map(repr, wrong))} is not what was saved" if wrong else ""


def published_file(checkpoint: Path) -> Path:
    """Returns the adapter file of a checkpoint for inference: the average if the run keeps one."""
    averaged = checkpoint / "averaged.safetensors"
    return averaged if averaged.exists() else checkpoint / "adapter.safetensors"


def load_adapter_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the trained tensors of a checkpoint's adapter, by the names of `lora_parameters`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return {name: tensor for name, tensor in load_tensors(path).items() if not name.endswith(".alpha")}


def save_optimizer(path: Path, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes the state of an optimizer as tensors named "PARAMETER/exp_avg" and so on."""
    save_tensors(path, {f"{name}/{key}": value for name, entries in state.items() for key, value in entries.items()})


def load_optimizer(path: Path) -> dict[str, dict[str, Tensor]]:
    """Reads the file that `save_optimizer` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        name, _, entry = key.rpartition("/")
        state.setdefault(name, {})[entry] = tensor
    return state
