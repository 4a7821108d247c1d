"""A run under way: what is trained, how far it is, and what is written of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mochi_tune.adapters.files import Adapter
from mochi_tune.errors import TrainingError
from mochi_tune.parallel.processes import is_first
from mochi_tune.training import checkpoint
from mochi_tune.training.accelerator import DataParallel, Zero
from mochi_tune.training.ema import Average
from mochi_tune.training.guards import SpikeGuard, is_finite, write_bundle
from mochi_tune.training.loader import Clips
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.saves import Saves, Snapshot


@dataclass
class Run:
    """What every rank holds of a run; the first one also writes.

    Attributes:
        engine: the model with its adapter, and its optimizer.
        clips: that are trained on.
        numbers: of this rank's micro-batches in each step.
        average: of the adapter, or None.
        guard: against sudden losses.
        done: the last step that is done.
        saved: the last step that is saved.
        metrics: rows of numbers; the first rank's.
        saves: checkpoints; the first rank's.
        adapter: builds the adapter of parameters for a step.
        identity: what makes the run this run, and what it is made by.
    """

    engine: DataParallel | Zero
    clips: Clips
    numbers: list[int]
    average: Average | None
    guard: SpikeGuard
    done: int
    saved: int
    metrics: Metrics | None
    saves: Saves | None
    adapter: Callable[[Mapping[str, Tensor], int], Adapter]
    identity: dict = field(default_factory=dict)

    def shown(self) -> Mapping[str, Tensor] | None:
        """Returns the weights that are validated, rendered and given out; None for those that are trained."""
        return self.average.tensors if self.average is not None else self.engine.shown_weights()

    def save(self) -> None:
        """Writes a checkpoint of the last step that is done, unless there is one; all ranks call it."""
        if self.saved == self.done:
            return
        tensors, shown, (state, groups) = self.engine.weights(), self.shown(), self.engine.optimizer_state()
        if self.saves is not None:
            rest = {"groups": groups, "losses": self.guard.losses, "rows": self.metrics.num_rows()}
            averaged = None if shown is None else self.adapter(shown, self.done)
            whole = {"step": self.done, **self.identity, **rest}
            self.saves.save(Snapshot(self.done, self.adapter(tensors, self.done), averaged, state, whole))
        self.saved = self.done

    def verdict(self, loss: float, grad_norm: float) -> str:
        """Returns what is to become of a step: "" if it is to be made, "not finite", or a policy of spikes."""
        return self.guard.verdict(loss) if is_finite(loss, grad_norm) else "not finite"

    def end_step(self, loss: float, verdict: str) -> None:
        """Makes the update, or leaves it out."""
        if verdict == "skip":
            self.engine.discard()
        else:
            self.engine.update()
            self.guard.made(loss)
            if self.average is not None:
                self.average.update(self.engine.weights(), self.done + 1)
        self.done += 1

    def refuse_step(self, verdict: str, row: dict, run_dir: Path, config: str) -> None:
        """Ends the run before an update that would harm it, with all that is needed to look into it; all ranks call it.

        Raises:
            TrainingError: on the first rank, for all.
        """
        weights = self.engine.weights()
        self.save()
        if not is_first():
            return
        way = (
            "resume=force and train.spike_policy=skip"
            if verdict == "stop"
            else ("an older checkpoint by resume_from, resume=force and a lower train.learning_rate")
        )
        excess = "" if verdict == "not finite" else f", a loss of {self.guard.excess(row['loss']):.0f} times the usual"
        bundle = write_bundle(run_dir / "bundles", {**row, "why": verdict}, weights, config)
        samples = ", ".join(f"{c} (sigma {s:.3f})" for c, s in zip(row["clips"], row["sigmas"], strict=True))
        last = checkpoint.last_checkpoint(run_dir / "checkpoints")
        raise TrainingError(
            f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}{excess}, on {samples}; the "
            f"update was not made and {last}: `mochi-tune replay {bundle}` tells which sample it was. The same command "
            f"comes here again; {way} go past it, or a lower train.learning_rate in another run_dir."
        )


def merged(everyones: list[dict[int, tuple[float, list[str], list[float]]]]) -> tuple[float, list[str], list[float]]:
    """Returns the mean loss, the clips and the sigmas of a step, in the order of its samples.

    Args:
        everyones: of each rank, by the number of a micro-batch: its loss, its clips and its sigmas. Ranks that share a
            micro-batch have the same.
    """
    parts = [part for _, part in sorted({n: part for one in everyones for n, part in one.items()}.items())]
    loss = sum(value for value, _, _ in parts) / len(parts)
    return loss, [c for _, clips, _ in parts for c in clips], [round(s, 6) for _, _, sigmas in parts for s in sigmas]
