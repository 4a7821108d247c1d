"""What stops a step before it ruins the adapter: numbers that are not finite, and sudden losses."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mochi_tune.files import fsync, save_tensors, write_json

SPIKE_POLICIES = ("off", "warn", "skip", "stop")
# Steps whose median a loss is compared with, and how many there must be.
WINDOW, FEWEST = 50, 10


@dataclass
class SpikeGuard:
    """Tells a loss that is far above the median of those before; a function of the run's losses alone.

    Attributes:
        policy: one of SPIKE_POLICIES, what becomes of such a step.
        factor: how many times the median is too much.
        losses: the last ones of steps that were made; they belong to a checkpoint.
    """

    policy: str
    factor: float
    losses: list[float] = field(default_factory=list)

    def verdict(self, loss: float) -> str:
        """Returns what is to be done with a step of this loss: "" or a policy."""
        is_spike = len(self.losses) >= FEWEST and loss > self.factor * statistics.median(self.losses)
        return self.policy if is_spike and self.policy != "off" else ""

    def excess(self, loss: float) -> float:
        """Returns a loss in medians of those before."""
        return loss / statistics.median(self.losses)

    def made(self, loss: float) -> None:
        """Takes in the loss of a step that was made."""
        self.losses = [*self.losses, loss][-WINDOW:]


def is_finite(*values: float) -> bool:
    """Whether all numbers are finite."""
    return all(map(math.isfinite, values))


def write_bundle(folder: Path, facts: Mapping, adapter: Mapping[str, Tensor], config: str) -> Path:
    """Writes what `mochi-tune replay` needs to make one step again; returns its folder.

    Args:
        folder: of the run's bundles.
        facts: step, loss, gradient norm, clips and sigmas.
        adapter: as it is before the step, by parameter.
        config: the settings as YAML.
    """
    bundle = folder / f"step_{facts['step']:06d}"
    bundle.mkdir(parents=True, exist_ok=True)
    save_tensors(bundle / "adapter.safetensors", adapter)
    (bundle / "config.yaml").write_text(config)
    write_json(bundle / "step.json", dict(facts))
    for path in bundle.iterdir():
        fsync(path)
    return bundle
