"""Guards that stop a step before it ruins the adapter: numbers that are not finite, and sudden losses."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mochi_tune.files import fsync, save_tensors, write_atomic, write_json
from mochi_tune.training.step_result import StepResult

SPIKE_POLICIES = ("off", "warn", "skip", "stop")
# A loss is compared with the median of so many steps before it, at least of so many.
WINDOW, FEWEST = 50, 10


@dataclass
class SpikeGuard:
    """Detects a loss that is far above the median of those before; depends on nothing but the run's losses.

    Attributes:
        policy: one of SPIKE_POLICIES: what to do with such a step.
        factor: the multiple of the median above which a loss is a spike.
        losses: of the last steps that were made; a checkpoint saves them.
    """

    policy: str
    factor: float
    losses: list[float] = field(default_factory=list)

    def verdict(self, loss: float) -> str:
        """Returns the policy for a step of this loss, "" for an ordinary step."""
        is_spike = len(self.losses) >= FEWEST and loss > self.factor * statistics.median(self.losses)
        return self.policy if is_spike and self.policy != "off" else ""

    def excess(self, loss: float) -> float:
        """Returns a loss as a multiple of the median of those before."""
        return loss / statistics.median(self.losses)

    def made(self, loss: float) -> None:
        """Adds the loss of a step that was made."""
        self.losses = [*self.losses, loss][-WINDOW:]


def is_finite(*values: float) -> bool:
    """Whether all numbers are finite."""
    return all(map(math.isfinite, values))


def refusal(step: StepResult, verdict: str, excess: float, attention: str | None, bundle: Path, last: str) -> str:
    """Returns the error of a step whose update would harm the adapter.

    Args:
        step: the step.
        verdict: "not finite" or "stop".
        excess: the loss as a multiple of the usual one, for "stop".
        attention: the kernel that computed the attention, if the run chose one.
        bundle: what `write_bundle` returned.
        last: text that names the last checkpoint.
    """
    usual, way_on = "", "an older checkpoint by resume_from, resume=force and a lower train.learning_rate"
    if verdict == "stop":
        usual = f", a loss of {excess:,.1f} times the usual"
        way_on = "resume=force and train.spike_policy=skip"
    drawn = zip(step.clips, step.sigmas, strict=True)
    samples = ", ".join(f"{clip} (sigma {sigma:.3f})" for clip, sigma in drawn)
    return (
        f"step {step.step}: loss {step.loss}, gradient norm {step.grad_norm}{usual}, on {samples}"
        f"{f', attention by {attention}' if attention else ''}; the "
        f"update was not made and {last}: `mochi-tune replay {bundle}` tells which sample it was. The same command "
        f"comes here again; {way_on} go past it, or a lower train.learning_rate in another run_dir."
    )


def write_bundle(folder: Path, facts: Mapping, adapter: Mapping[str, Tensor], config: str) -> Path:
    """Writes what `mochi-tune replay` needs to compute one step again; returns its folder.

    Args:
        folder: holds the run's bundles.
        facts: step, loss, gradient norm, clips and sigmas, and how the run computed.
        adapter: its parameters before the step, by name.
        config: the settings as YAML.
    """
    bundle = folder / f"step_{facts['step']:06d}"
    bundle.mkdir(parents=True, exist_ok=True)
    save_tensors(bundle / "adapter.safetensors", adapter)
    write_atomic(bundle / "config.yaml", config.encode())
    write_json(bundle / "step.json", dict(facts))
    for path in bundle.iterdir():
        fsync(path)
    return bundle
