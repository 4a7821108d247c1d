"""Checkpoints: everything that a run needs to go on as if it had not stopped, or nothing at all.

A checkpoint is a folder that appears whole: it is written under a temporary name, synced, given a manifest with the
sha256 of each file, and renamed. Only then are older ones removed. Files are safetensors and JSON; nothing is pickled.
Random numbers and the order of clips are functions of (seed, step), so the step is all that there is to save of them.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mochi_tune.errors import CheckpointError
from mochi_tune.files import file_sha256, sync

MANIFEST = "manifest.json"


@contextlib.contextmanager
def new_checkpoint(folder: Path, step: int, keep: int) -> Iterator[Path]:
    """Gives an empty folder to fill, and makes it folder/step_NNNNNN when the block ends; keeps the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp_*"):
        shutil.rmtree(stale)
    temporary = folder / f".tmp_{step:06d}"
    temporary.mkdir()
    yield temporary
    files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
    write_json(temporary / MANIFEST, {"step": step, "sha256": files})
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    final = folder / f"step_{step:06d}"
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync(folder)
    for old in find_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def find_checkpoints(folder: Path) -> list[Path]:
    """Returns the whole checkpoints of a run, oldest first."""
    found = [path.parent for path in folder.glob(f"step_*/{MANIFEST}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def check_checkpoint(folder: Path) -> None:
    """Compares every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: a file is missing, added or altered.
    """
    expected = read_json(folder / MANIFEST).get("sha256", {})
    found = {path.name: file_sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {', '.join(wrong)} is not what was saved; "
            "remove that folder to go on from the one before."
        )


def save_optimizer(path: Path, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes an optimizer's state, by parameter and entry, as flat tensors, "NAME/exp_avg" and so on."""
    save_tensors(path, {f"{name}/{key}": value for name, entries in state.items() for key, value in entries.items()})


def load_optimizer(path: Path) -> dict[str, dict[str, Tensor]]:
    """Reads what `save_optimizer` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        name, _, entry = key.rpartition("/")
        state.setdefault(name, {})[entry] = tensor
    return state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a whole safetensors file to the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def write_json(path: Path, value: object) -> None:
    """Writes a value as readable JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing or no JSON.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object.")
    return value


def replace_file(source: Path, target: Path) -> None:
    """Copies a file over another so that a reader sees the old or the new one, never a part."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    sync(temporary)
    os.replace(temporary, target)
    sync(target.parent)
