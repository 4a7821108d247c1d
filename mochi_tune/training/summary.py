"""The lines that `train` prints before its first step: device, estimates, and warnings about settings."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mochi_tune.adapters.lora import LayerSettings, settings_metadata
from mochi_tune.errors import counted
from mochi_tune.parallel.forecast import GIB, in_words, known_card
from mochi_tune.training.memory_plan import MemoryPlan, describe, held_by
from mochi_tune.training.preflight import TrainPlan, step_seconds
from mochi_tune.training.preflight_clips import bucket_shares

if TYPE_CHECKING:
    from mochi_tune.config.schema import TrainConfig

# Highest usual learning rate for a LoRA, by optimizer. Prodigy finds its own rate, which this multiplies.
USUAL_RATES = {
    "adamw": 1e-3, "adamw_8bit": 1e-3, "adafactor": 1e-3, "prodigy": 1.0, "muon": 2e-2, "schedule_free": 2.5e-3,
}  # fmt: skip
# A warning is printed for a learning rate above this multiple of the usual one.
FAR = 5


def opening_lines(plan: TrainPlan, step: int) -> list[str]:
    """Returns lines about the run and its estimated memory and time; every process calls this to plan memory together.

    Args:
        plan: the plan of the run.
        step: the last finished step.
    """
    config, train = plan.config, plan.config.train
    environment, left = plan.environment, train.steps - step
    count = f", {environment['processes']} processes ({environment['strategy']})" if plan.layout.num_ranks > 1 else ""
    if plan.layout.context > 1:
        count += f", {plan.layout.context} of them share a sample{plan.layout.split_in_words}"
    precision = plan.precision if config.model.precision else config.model.dtype
    num_samples = train.batch_size * plan.draws.num_micro_batches
    num_epochs = f"{left * num_samples / plan.order.epoch_length:.3g}"
    sizes = Counter(str(row.bucket) for row in plan.dataset.cache.rows)
    largest = f"{', '.join(sizes)}" if len(sizes) <= 2 else f"{len(sizes)} sizes"
    return [
        f"device: {environment['device']}{count}; {config.model.name} in {precision}",
        f"adapter: {_size(plan.layers, config.lora.dora)}, {plan.adapter_bytes // 4:,} parameters in "
        f"{counted(len(plan.layers), 'layer')}",
        f"data: {counted(len(plan.training_clips), 'clip')} to train on, {largest}; "
        f"{counted(left, 'step')} of {counted(num_samples, 'sample')}: {num_epochs} "
        f"{'epoch' if num_epochs == '1' else 'epochs'}",
        *([f"eval videos: {', '.join(map(repr, train.sample_prompts))}"] if plan.renders_videos else []),
        *_forecast(plan, plan.memory, left),
        *doubtful_settings(train, num_samples),
    ]


def _size(layers: Mapping[str, LayerSettings], is_dora: bool) -> str:
    """Returns the kind, rank, alpha and scale of an adapter; "4,8" if layers differ."""
    stated = settings_metadata(layers)
    scales = ",".join(f"{scale:.3g}" for scale in sorted({each.plain_alpha / each.rank for each in layers.values()}))
    scale = f"{'rsLoRA, ' if 'rslora' in stated else ''}scale {scales}"
    return f"{'DoRA' if is_dora else 'LoRA'} of rank {stated['rank']}, alpha {stated['alpha']} ({scale})"


def _forecast(plan: TrainPlan, memory: MemoryPlan, num_steps: int) -> list[str]:
    """Returns lines with the estimated memory and time, which are only known for GPUs."""
    if plan.device.type != "cuda":
        return ["memory and time are not estimated for a CPU: the first steps show the time"]
    card = known_card(torch.cuda.get_device_name(plan.device))
    total = torch.cuda.get_device_properties(plan.device).total_memory / GIB
    lines = [f"estimated memory: {describe(held_by(plan.step, memory))}, which has {total:.1f} GiB"]
    if card is None:
        return [*lines, "estimated time: not known for this GPU, the first steps show it"]
    shares = bucket_shares(plan.order, plan.dataset.cache)
    seconds = step_seconds(plan.config, plan.step, shares, memory.recompute, card, memory.is_streamed)
    about = f"about {in_words(seconds * num_steps)}, {seconds:.2g} s a step, without evaluations"
    return [*lines, f"estimated time: {about}"]


def doubtful_settings(train: "TrainConfig", num_samples: int) -> list[str]:
    """Returns a line for each setting that has no effect or that is likely to harm the training."""
    lines = []
    if train.warmup_steps >= train.steps:
        # At least one step of warm-up if the run has several steps.
        shorter = max(train.steps // 10, min(train.steps - 1, 1))
        lines.append(
            f"warning: train.warmup_steps={train.warmup_steps} is not below train.steps={train.steps}: the learning "
            f"rate never reaches its peak; use train.warmup_steps={shorter}, or train.steps above {train.warmup_steps}"
        )
    usual = USUAL_RATES[train.optimizer]
    if train.learning_rate > FAR * usual:
        lines.append(
            f"warning: train.learning_rate={train.learning_rate:g} is far above the usual range of "
            f"{train.optimizer}, up to {usual:g}: the loss may grow instead of fall"
        )
    if train.sigma_stratified and num_samples == 1:
        lines.append(
            "warning: train.sigma_stratified=true does nothing with one sample a step: raise train.batch_size or "
            "train.accumulation_steps, or leave it out"
        )
    if train.spike_policy == "off" and train.spike_factor != type(train)().spike_factor:
        lines.append(
            f"warning: train.spike_factor={train.spike_factor:g} does nothing with train.spike_policy=off: choose a "
            "policy, or leave it out"
        )
    return lines
