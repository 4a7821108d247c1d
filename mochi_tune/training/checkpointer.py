"""Writes the checkpoints of a run, removes old ones, and continues if a save fails."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mochi_tune.adapters.files import Adapter, save_adapter
from mochi_tune.errors import TrainingError
from mochi_tune.files import copy_atomic, parse_object, write_json
from mochi_tune.training import checkpoint
from mochi_tune.training.metrics import Metrics


@dataclass(frozen=True)
class Snapshot:
    """Everything that a checkpoint holds, on the CPU.

    Attributes:
        step: the last finished step.
        adapter: the trained one.
        averaged: the adapter to use, where it is not the trained one, else None.
        optimizer: state by parameter.
        state: all other state, as JSON values.
    """

    step: int
    adapter: Adapter
    averaged: Adapter | None
    optimizer: Mapping[str, Mapping[str, Tensor]]
    state: dict


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept.

    Attributes:
        newest: this many of the newest ones.
        every: those of each so many steps; 0: none.
        best: whether the one with the lowest validation loss.
    """

    newest: int
    every: int
    best: bool


class Checkpointer:
    """Writes the checkpoints of a run folder; the main process has one."""

    def __init__(self, run_dir: Path, metrics: Metrics, retention: Retention, log: Callable[[str], None]) -> None:
        """Prepares to save.

        Args:
            run_dir: of the run.
            metrics: synced to the disk before each checkpoint, which records how many rows there are.
            retention: which checkpoints are kept.
            log: writes a line for the user.
        """
        self.run_dir = run_dir
        self.metrics = metrics
        self.retention = retention
        self.log = log
        # The last save that failed, if no later one succeeded.
        self.failed: tuple[Snapshot, OSError] | None = None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.run_dir / "checkpoints"

    def save(self, snapshot: Snapshot, is_best: bool = False) -> bool:
        """Writes a checkpoint, then the run's adapter, and removes old checkpoints; returns whether that succeeded.

        A full or read-only disk does not end the run: the old checkpoints stay, and the next save tries again.

        Args:
            snapshot: of the last finished step.
            is_best: whether it is saved for its validation loss alone.
        """
        # Read by `_remove_old`, of a later process too.
        mark = {"best": True} if is_best else {}
        try:
            # A resumed run finds the rows of all steps up to its checkpoint.
            self.metrics.flush_to_disk()
            with checkpoint.new_checkpoint(self.folder, snapshot.step) as new:
                save_adapter(new / "adapter.safetensors", snapshot.adapter)
                if snapshot.averaged is not None:
                    save_adapter(new / "averaged.safetensors", snapshot.averaged)
                checkpoint.save_optimizer(new / "optimizer.safetensors", snapshot.optimizer)
                write_json(new / "state.json", {**snapshot.state, **mark})
            copy_atomic(
                checkpoint.published_file(self.folder / f"step_{snapshot.step:06d}"),
                self.run_dir / "adapter.safetensors",
            )
        except OSError as error:
            self.failed = snapshot, error
            last = checkpoint.last_checkpoint(self.folder)
            self.log(f"step {snapshot.step} could not be saved ({error}); {last}; the run goes on")
            return False
        self.failed = None
        try:
            self._remove_old()
        except OSError as error:
            self.log(f"step {snapshot.step} is saved, but old checkpoints could not be removed ({error})")
        return True

    def check_saved(self, step: int) -> None:
        """Checks that the last step of a run is saved, and tries once more if it was not.

        Raises:
            TrainingError: it cannot be saved.
        """
        if self.failed is not None and not self.save(self.failed[0]):
            last = checkpoint.last_checkpoint(self.folder)
            raise TrainingError(
                f"step {step} could not be saved ({self.failed[1]}); {last}: make room, and the same command goes on "
                "from there."
            )

    def _remove_old(self) -> None:
        found = checkpoint.find_checkpoints(self.folder)
        steps, keep = [checkpoint.step_of(path) for path in found], self.retention
        best = self.metrics.best_validated(steps) if keep.best else None
        # One that was saved for its validation loss alone takes no place of the newest ones.
        in_turn = [step for step, path in zip(steps, found, strict=True) if not _is_best_alone(path)]
        kept = checkpoint.steps_to_keep(in_turn, keep.newest, keep.every, best)
        checkpoint.remove_checkpoints(self.folder, kept | {step for step in steps if step == best})


def _is_best_alone(folder: Path) -> bool:
    """Whether a checkpoint was saved for its validation loss alone; one of a version that does not say so was not."""
    path = folder / "state.json"
    try:
        state = parse_object(path.read_bytes())
    except OSError:
        # A resume reports a checkpoint that cannot be read.
        return False
    return state is not None and "best" in state


def check_free_space(run_dir: Path, num_bytes: int) -> None:
    """Reserves the space of a checkpoint and releases it, so that a full disk is found before training starts.

    Raises:
        OSError: the disk is full or read-only, or a quota is used up.
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


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
