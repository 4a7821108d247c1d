"""Guards against steps that would ruin the adapter: numbers that are not finite, and spikes of the loss."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from mochi_tune.config.load import run_config_yaml
from mochi_tune.errors import TrainingError
from mochi_tune.files import fsync, save_tensors, write_atomic, write_json
from mochi_tune.training import checkpoint
from mochi_tune.training.preflight import TrainPlan
from mochi_tune.training.step_result import StepResult

# Maximum and minimum number of earlier steps whose median loss a loss is compared with.
WINDOW, FEWEST = 50, 10


@dataclass
class SpikeGuard:
    """Detects a loss that is far above the median of earlier losses; depends only on the losses of the run.

    Attributes:
        policy: a value of `train.spike_policy`: what to do with a spike.
        factor: the multiple of the median above which a loss is a spike.
        losses: losses of the last steps with an update; checkpoints store them.
    """

    policy: str
    factor: float
    losses: list[float] = field(default_factory=list)

    def verdict(self, loss: float) -> str:
        """Returns the policy for a step with this loss, or "" if it is not a spike."""
        is_spike = len(self.losses) >= FEWEST and loss > self.factor * statistics.median(self.losses)
        return self.policy if is_spike and self.policy != "off" else ""

    def excess(self, loss: float) -> float:
        """Returns a loss as a multiple of the median of the earlier losses."""
        return loss / statistics.median(self.losses)

    def made(self, loss: float) -> None:
        """Adds the loss of a step with an update."""
        self.losses = [*self.losses, loss][-WINDOW:]


def is_finite(*values: float) -> bool:
    """Whether all numbers are finite."""
    return all(map(math.isfinite, values))


def refuse_step(
    plan: TrainPlan, step: StepResult, verdict: str, excess: float, attention: str | None, adapter: Mapping[str, Tensor]
) -> NoReturn:
    """Writes a bundle for `replay` and raises the error of a step whose update would harm the adapter.

    Args:
        plan: the plan of the run.
        step: the step.
        verdict: "not finite" or "stop".
        excess: for "stop", the loss as a multiple of the usual loss.
        attention: the attention kernel, or None if torch chose it.
        adapter: the parameters of the adapter before the step, by name.
    """
    run_dir = Path(plan.config.run_dir)
    facts = {
        **step.numbers, "clips": step.clips, "sigmas": step.sigmas, "why": verdict, "seed": plan.config.seed,
        "draws": asdict(plan.draws), "attention": attention, "host_modulation": plan.has_host_modulation,
        "identity": plan.identity,
    }  # fmt: skip
    bundle = write_bundle(run_dir / "bundles", facts, adapter, run_config_yaml(plan.config))
    last = checkpoint.last_checkpoint(run_dir / "checkpoints")
    raise TrainingError(refusal(step, verdict, excess, attention, bundle, last))


def refusal(step: StepResult, verdict: str, excess: float, attention: str | None, bundle: Path, last: str) -> str:
    """Returns the error of a step whose update would harm the adapter.

    Args:
        step: the step.
        verdict: "not finite" or "stop".
        excess: for "stop", the loss as a multiple of the usual loss.
        attention: the attention kernel, or None if torch chose it.
        bundle: the folder that `write_bundle` returned.
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
    """Writes everything that `mochi-tune replay` needs to compute one step again; returns the folder of the bundle.

    Args:
        folder: the folder of all bundles of the run.
        facts: step, loss, gradient norm, clips and sigmas, and how the run computed them.
        adapter: the parameters of the adapter before the step, by name.
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
