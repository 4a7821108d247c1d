"""Writes the checkpoints of a run and removes old ones. A failed save does not end the run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mochi_tune.adapters.files import Adapter, save_adapter
from mochi_tune.errors import TrainingError
from mochi_tune.files import copy_atomic, parse_object, temporary_file, write_json
from mochi_tune.training import checkpoint
from mochi_tune.training.metrics import Metrics


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, on the CPU.

    Attributes:
        step: the last finished step.
        adapter: the trained adapter.
        averaged: the adapter for inference, if it differs from the trained one.
        optimizer: the state of the optimizer by parameter.
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
        newest: number of the newest checkpoints to keep.
        every: interval in steps of the checkpoints to keep for good; 0 for none.
        best: whether to keep the checkpoint with the lowest validation loss.
    """

    newest: int
    every: int
    best: bool


class Checkpointer:
    """Writes the checkpoints of a run folder; only the main process has one."""

    def __init__(self, run_dir: Path, metrics: Metrics, retention: Retention, log: Callable[[str], None]) -> None:
        """Prepares to save.

        Args:
            run_dir: the run folder.
            metrics: the metrics of the run, which are synced to disk before each checkpoint.
            retention: which checkpoints to keep.
            log: prints a line.
        """
        self.run_dir = run_dir
        self.metrics = metrics
        self.retention = retention
        self.log = log
        # The last failed save, until a later one succeeds.
        self.failed: tuple[Snapshot, OSError] | None = None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.run_dir / "checkpoints"

    def save(self, snapshot: Snapshot, is_best: bool = False) -> bool:
        """Writes a checkpoint and the adapter of the run, and removes old checkpoints.

        A full or read-only disk does not end the run: the old checkpoints stay, and the next save tries again.

        Args:
            snapshot: the state after the last finished step.
            is_best: whether the step is saved only because of its validation loss.

        Returns:
            Whether the checkpoint and the adapter were written.
        """
        # `_remove_old` reads this, also in a resumed run.
        mark = {"best": True} if is_best else {}
        if self._try_to_save(snapshot, mark):
            return True
        assert self.failed is not None
        last = checkpoint.last_checkpoint(self.folder)
        self.log(f"{self._failure(snapshot.step)}; {last}; the run goes on")
        return False

    def check_saved(self, step: int) -> None:
        """Checks that the last step of the run is saved, and tries to save it again if it is not.

        Raises:
            TrainingError: the step cannot be saved.
        """
        if self.failed is not None and not self._try_to_save(self.failed[0], {}):
            last = checkpoint.last_checkpoint(self.folder)
            raise TrainingError(f"{self._failure(step)}; {last}: make room, and the same command goes on from there.")

    def _try_to_save(self, snapshot: Snapshot, mark: dict[str, bool]) -> bool:
        try:
            # A resumed run needs the rows of all steps up to its checkpoint.
            self.metrics.flush_to_disk()
            # If only the copy of the adapter failed before, a kill during a second save could lose the first one.
            failed_step = None if self.failed is None else self.failed[0].step
            if failed_step != snapshot.step or not self._is_written(snapshot.step):
                self._write(snapshot, mark)
            # Before the adapter is copied: the old checkpoints may take the room that the copy needs.
            self._try_to_remove_old(snapshot.step)
            copy_atomic(
                checkpoint.published_file(self.folder / f"step_{snapshot.step:06d}"),
                self.run_dir / "adapter.safetensors",
            )
        except OSError as error:
            self.failed = snapshot, error
            return False
        self.failed = None
        return True

    def _write(self, snapshot: Snapshot, mark: dict[str, bool]) -> None:
        with checkpoint.new_checkpoint(self.folder, snapshot.step) as new:
            save_adapter(new / "adapter.safetensors", snapshot.adapter)
            if snapshot.averaged is not None:
                save_adapter(new / "averaged.safetensors", snapshot.averaged)
            checkpoint.save_optimizer(new / "optimizer.safetensors", snapshot.optimizer)
            write_json(new / "state.json", {**snapshot.state, **mark})

    def _is_written(self, step: int) -> bool:
        return (self.folder / f"step_{step:06d}" / checkpoint.MANIFEST).exists()

    def _failure(self, step: int) -> str:
        assert self.failed is not None
        is_copy = self._is_written(step)
        what = f"the adapter of step {step} could not be copied" if is_copy else f"step {step} could not be saved"
        return f"{what} ({self.failed[1]})"

    def _try_to_remove_old(self, step: int) -> None:
        try:
            self._remove_old()
        except OSError as error:
            self.log(f"step {step} is saved, but old checkpoints could not be removed ({error})")

    def _remove_old(self) -> None:
        found = checkpoint.find_checkpoints(self.folder)
        steps, keep = [checkpoint.step_of(path) for path in found], self.retention
        best = self.metrics.best_validated(steps) if keep.best else None
        # A checkpoint that was saved only for its validation loss does not count as one of the newest.
        in_turn = [step for step, path in zip(steps, found, strict=True) if not _is_best_alone(path)]
        kept = checkpoint.steps_to_keep(in_turn, keep.newest, keep.every, best)
        checkpoint.remove_checkpoints(self.folder, kept | {step for step in steps if step == best})


def _is_best_alone(folder: Path) -> bool:
    """Whether a checkpoint was saved only for its validation loss; False for checkpoints of older versions."""
    path = folder / "state.json"
    try:
        state = parse_object(path.read_bytes())
    except OSError:
        # If the run resumes from a checkpoint that cannot be read, the resume reports it.
        return False
    return state is not None and "best" in state


def check_free_space(run_dir: Path, num_bytes: int) -> None:
    """Reserves the space of a checkpoint and releases it, so that a full disk is reported before training starts.

    Raises:
        OSError: the disk is full or read-only, or a quota is exhausted.
    """
    try:
        # If the process is killed, the next start removes the file.
        with temporary_file(run_dir / "room_probe") as probe, open(probe, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; a checkpoint takes {num_bytes / 2**20:.0f} MiB", str(run_dir)
        ) from None


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of tensors on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
