"""Saving a run: when, what of it is kept, and what becomes of a save that the disk refuses."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mochi_tune.adapters.files import Adapter, save_adapter
from mochi_tune.errors import TrainingError
from mochi_tune.files import copy_atomic, read_json_lines, write_json
from mochi_tune.parallel.processes import num_ranks
from mochi_tune.training import checkpoint
from mochi_tune.training.metrics import Metrics


@dataclass(frozen=True)
class Snapshot:
    """A run at one step, whole and on the CPU.

    Attributes:
        step: the last one that is done.
        adapter: as it is trained.
        averaged: as it is to be used where that is another one, else None.
        optimizer: its state by parameter.
        state: everything else, of JSON values.
    """

    step: int
    adapter: Adapter
    averaged: Adapter | None
    optimizer: Mapping[str, Mapping[str, Tensor]]
    state: dict


class Saves:
    """The checkpoints of a run folder; used by the one rank that writes."""

    def __init__(
        self, run_dir: Path, metrics: Metrics, newest: int, every: int, keep_best: bool, tell: Callable[[str], None]
    ) -> None:
        """Prepares to save.

        Args:
            run_dir: of the run.
            metrics: whose rows a checkpoint vouches for.
            newest: checkpoints to keep.
            every: checkpoints of each so many steps are kept too; 0: none.
            keep_best: whether the one with the lowest validation loss is kept too.
            tell: takes a line for the user.
        """
        self.folder = run_dir / "checkpoints"
        self.own = run_dir / "adapter.safetensors"
        self.metrics = metrics
        self.newest, self.every, self.keep_best = newest, every, keep_best
        self.tell = tell
        self.failure: OSError | None = None

    def save(self, snapshot: Snapshot) -> bool:
        """Writes a checkpoint, then the run's adapter, and removes what need not be kept; returns whether it is there.

        A disk that refuses does not end the run: the old checkpoints stay, and the next save tries again.
        """
        try:
            # A checkpoint vouches for the rows of its steps.
            self.metrics.flush_to_disk()
            with checkpoint.new_checkpoint(self.folder, snapshot.step) as new:
                save_adapter(new / "adapter.safetensors", snapshot.adapter)
                if snapshot.averaged is not None:
                    save_adapter(new / "averaged.safetensors", snapshot.averaged)
                checkpoint.save_optimizer(new / "optimizer.safetensors", snapshot.optimizer)
                write_json(new / "state.json", snapshot.state)
            copy_atomic(checkpoint.published_file(self.folder / f"step_{snapshot.step:06d}"), self.own)
            self._remove_old()
        except OSError as error:
            self.failure = error
            last = checkpoint.last_checkpoint(self.folder)
            self.tell(f"step {snapshot.step} could not be saved ({error}); {last}; the run goes on")
            return False
        self.failure = None
        return True

    def check_saved(self, step: int) -> None:
        """Makes sure that the end of a run is saved.

        Raises:
            TrainingError: the last save failed.
        """
        if self.failure is not None:
            last = checkpoint.last_checkpoint(self.folder)
            raise TrainingError(
                f"step {step} could not be saved ({self.failure}); {last}: make room, and the same command goes on "
                "from there."
            )

    def _remove_old(self) -> None:
        steps = [checkpoint.step_of(path) for path in checkpoint.find_checkpoints(self.folder)]
        best = self.metrics.best_validated(steps) if self.keep_best else None
        checkpoint.remove_checkpoints(self.folder, checkpoint.steps_to_keep(steps, self.newest, self.every, best))


def try_room(run_dir: Path, num_bytes: int) -> None:
    """Reserves the room of a checkpoint and gives it back, so that a disk that is too small shows before any training.

    Raises:
        OSError: the disk is full, is read-only, or its owner may not write more.
    """
    probe = run_dir / f".room_probe_{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; a checkpoint takes {num_bytes / 2**20:.0f} MiB", str(run_dir)
        ) from None
    finally:
        probe.unlink(missing_ok=True)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def made_by(strategy: str, device: torch.device) -> dict[str, object]:
    """Returns what the numbers of a run depend on besides its settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"torch": str(torch.__version__), "processes": num_ranks(), "strategy": strategy, "device": name}


def record_start(run_dir: Path, facts: dict) -> None:
    """Adds to run_dir/history.jsonl how and from where this process goes on."""
    with open(run_dir / "history.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\n")


def history(run_dir: Path) -> list[dict]:
    """Returns what `record_start` has written of the run so far; a killed run may have left a part of a line."""
    return read_json_lines(run_dir / "history.jsonl")
