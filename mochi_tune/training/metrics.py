"""Where a run's numbers go: metrics.jsonl and validation.jsonl always, W&B when asked."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from mochi_tune.errors import ConfigError, TrainingError
from mochi_tune.flow import histogram


class Metrics:
    """Appends one JSON object a step, and takes back the ones after the checkpoint that a run resumes from."""

    def __init__(self, run_dir: Path, last_step: int) -> None:
        self.paths = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "validation")}
        self.tracker = None
        for path in self.paths.values():
            _cut_after(path, last_step)
        self.files = {name: open(path, "a", buffering=1) for name, path in self.paths.items()}  # noqa: SIM115

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()
        if self.tracker:
            self.tracker.finish()

    def start_wandb(self, mode: str, project: str, name: str, run_dir: Path, config: dict) -> None:
        """Starts or resumes a W&B run; mode is online or offline.

        Raises:
            ConfigError: W&B refuses, for want of a login for example.
        """
        import wandb

        run_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        try:
            self.tracker = wandb.init(
                project=project, name=name, id=run_id, resume="allow", mode=mode, dir=run_dir, config=config
            )
        except wandb.Error as error:
            raise ConfigError(f"log.wandb={mode}: {error}: run `wandb login`, or use log.wandb=offline.") from None

    def log(self, row: Mapping) -> None:
        """Writes a training step's row: step, loss, grad_norm, lr, seconds and what it was made of."""
        self._write("metrics", row)

    def is_validated(self, step: int) -> bool:
        """Whether the validation of a step is written already."""
        rows = self.paths["validation"].read_text().splitlines()
        return any(json.loads(row)["step"] == step for row in rows)

    def log_validation(self, row: Mapping) -> None:
        """Writes a validation's row: step, validation_loss."""
        self._write("validation", row)

    def flush_to_disk(self) -> None:
        """Waits until all rows are on the disk."""
        for file in self.files.values():
            os.fsync(file.fileno())

    def rows(self, name: str) -> list[dict]:
        """Returns the rows of "metrics" or "validation"."""
        return [json.loads(line) for line in self.paths[name].read_text().splitlines()]

    def num_rows(self) -> dict[str, int]:
        """Returns how many rows there are of each kind."""
        return {name: len(self.rows(name)) for name in self.paths}

    def best_validated(self, steps: Collection[int]) -> int | None:
        """Returns the one of these steps that has the lowest validation loss, None if none was validated."""
        losses = {row["step"]: row["validation_loss"] for row in self.rows("validation") if row["step"] in steps}
        return min(losses, key=losses.get, default=None)

    def sigma_histogram(self) -> list[int]:
        """Returns how many samples so far were drawn in each tenth of the noise levels."""
        drawn = [sigma for row in self.rows("metrics") for sigma in row["sigmas"]]
        return histogram(torch.tensor(drawn)) if drawn else [0] * 10

    def _write(self, name: str, row: Mapping) -> None:
        self.files[name].write(json.dumps(row) + "\n")
        if self.tracker:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            self.tracker.log({f"{name}/{key}": value for key, value in numbers.items()}, step=row["step"])


def _cut_after(path: Path, last_step: int) -> None:
    """Drops the rows after a step, and a last line that a killed run left unfinished.

    Raises:
        TrainingError: another line is no row.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise TrainingError(
                f"{path}: line {number} is no row of a run: repair it, or use another run_dir."
            ) from None
        if step <= last_step:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
