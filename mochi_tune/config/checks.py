"""What no single type can check of the settings: ranges, choices, and how they fit together."""

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mochi_tune.config.lora import check_lora
from mochi_tune.config.schema import RunConfig, flat_settings, sample_size, setting
from mochi_tune.errors import ConfigError

if TYPE_CHECKING:
    from mochi_tune.sampling.sampler import SamplerSettings


def check_config(config: RunConfig) -> None:
    """Checks what no single type can: ranges, choices, and how settings fit together.

    Raises:
        ConfigError: a setting is out of its range; the text says which, got and allowed.
    """
    from mochi_tune.models.latents import check_geometry
    from mochi_tune.parallel.memory import RESIDENCIES
    from mochi_tune.training.accelerator import STRATEGIES
    from mochi_tune.training.guards import SPIKE_POLICIES
    from mochi_tune.training.objective import LOSS_WEIGHTINGS, OBJECTIVES, SIGMA_DISTRIBUTIONS
    from mochi_tune.training.optim import OPTIMIZERS, check_optimizer
    from mochi_tune.training.run_folder import MODES
    from mochi_tune.training.schedule import SCHEDULES

    check_geometry(config.data.num_frames, config.data.height, config.data.width)
    size = sample_size(config)
    check_geometry(*size)
    choices = {
        "device": (config.device, ("auto", "cpu", "cuda")),
        "model.dtype": (config.model.dtype, ("bf16", "fp32")),
        "train.objective": (config.train.objective, OBJECTIVES),
        "train.sigma_distribution": (config.train.sigma_distribution, SIGMA_DISTRIBUTIONS),
        "train.loss_weighting": (config.train.loss_weighting, LOSS_WEIGHTINGS),
        "train.optimizer": (config.train.optimizer, OPTIMIZERS),
        "train.schedule": (config.train.schedule, SCHEDULES),
        "resume": (config.resume, MODES),
        "data.damaged": (config.data.damaged, ("strict", "quarantine")),
        "train.spike_policy": (config.train.spike_policy, SPIKE_POLICIES),
        "parallel.strategy": (config.parallel.strategy, STRATEGIES),
        "memory.dit": (config.memory.dit, RESIDENCIES),
        "sample.compare": (config.sample.compare, (None, "base")),
        "log.wandb": (config.log.wandb, ("disabled", "offline", "online")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            possible = ["null" if one is None else one for one in allowed]
            raise ConfigError(f"{key}={value} is not possible: use {' or '.join(possible)}.")
    for key, value in flat_settings(config).items():
        if "\0" in str(value):
            raise ConfigError(f"{key}={value!a} is not possible: it must be text without NUL.")
    for key in ("name", "run_dir", "data.videos", "data.cache", "model.weights", "log.project"):
        if not setting(config, key).strip():
            raise ConfigError(f"{key} is empty: name one.")
    if len(config.log.project) > 128 or set(config.log.project) & set("/\\#?%:"):
        raise ConfigError(
            f"log.project={config.log.project} is not possible: up to 128 characters, none of / \\ # ? % :"
        )
    at_least_one = (
        "train.steps",
        "train.batch_size",
        "train.accumulation_steps",
        "train.keep_checkpoints",
        "lora.rank",
        "parallel.num_processes",
        "parallel.data",
        "parallel.guidance",
        "parallel.context",
    )
    positive = ("train.learning_rate", "train.max_grad_norm", "lora.alpha", "data.decode_timeout_seconds")
    positive += ("parallel.timeout_seconds", "train.learning_rate_b_ratio", "train.sigma_std", "train.sigma_shift")
    not_negative = ("train.warmup_steps", "train.weight_decay", "train.checkpoint_every", "train.validate_every")
    not_negative += ("train.validation_clips", "train.sample_every", "train.keep_every")
    for keys, allowed, fits in (
        (at_least_one, "at least 1", lambda v: v >= 1),
        (positive, "above 0 and finite", lambda v: 0 < v < float("inf")),
        (not_negative, "0 or more and finite", lambda v: 0 <= v < float("inf")),
        (("seed",), "from 0 to below 2**63", lambda v: 0 <= v < 2**63),
        (("train.caption_dropout", "lora.dropout", "train.ema_decay"), "from 0 to below 1", lambda v: 0 <= v < 1),
        (("train.decay_share",), "above 0 and at most 1", lambda v: 0 < v <= 1),
        (("train.spike_factor",), "above 1", lambda v: v > 1),
        (("train.sigma_mean",), "finite", lambda v: abs(v) < float("inf")),
    ):
        for key in keys:
            value = setting(config, key)
            if value is not None and not fits(value):
                raise ConfigError(f"{key}={value} is not possible: it must be {allowed}.")
    check_lora(config)
    check_unused(config)
    train = config.train
    check_optimizer(
        train.optimizer, config.parallel.strategy, train.schedule, train.learning_rate, train.learning_rate_b_ratio
    )
    if train.optimizer == "muon" and config.lora.dora:
        raise ConfigError("train.optimizer=muon takes matrices only, and lora.dora=true trains vectors: use adamw.")
    sampler_settings(config)


def check_unused(config: RunConfig) -> None:
    """Refuses a setting of the training that the choice it belongs to, which is another one, would not read.

    Raises:
        ConfigError: there is one.
    """
    for key, owner, choice in (
        ("train.sigma_mean", "train.sigma_distribution", "logit_normal"),
        ("train.sigma_std", "train.sigma_distribution", "logit_normal"),
        ("train.sigma_shift", "train.sigma_distribution", "shifted"),
        ("train.decay_share", "train.schedule", "wsd"),
    ):
        value, chosen = setting(config, key), setting(config, owner)
        if chosen != choice and value != setting(RunConfig(), key):
            raise ConfigError(
                f"{key}={value} does nothing with {owner}={chosen}: use {owner}={choice}, or leave it out."
            )


def sampler_settings(config: RunConfig) -> "SamplerSettings":
    """Returns the preset's settings with the sample's own in their place.

    Raises:
        ConfigError: the schedule is impossible.
    """
    from mochi_tune.sampling.sampler import PRESETS

    if config.sample.preset not in PRESETS:
        raise ConfigError(f"sample.preset={config.sample.preset} is not possible: use {' or '.join(PRESETS)}.")
    own = {key: getattr(config.sample, key) for key in ("steps", "guidance", "threshold", "linear_steps")}
    settings = replace(PRESETS[config.sample.preset], **{key: value for key, value in own.items() if value is not None})
    if own["steps"] is not None and own["linear_steps"] is None:
        # A preset's linear steps belong to the preset's number of steps.
        settings = replace(settings, linear_steps=None)
    if config.sample.sigmas is not None:
        sigmas = tuple(config.sample.sigmas)
        if len(sigmas) < 2 or (sigmas[0], sigmas[-1]) != (1, 0) or any(a <= b for a, b in itertools.pairwise(sigmas)):
            raise ConfigError(f"sample.sigmas={list(sigmas)} is no schedule: give falling numbers from 1 to 0.")
        if own["steps"] not in (None, len(sigmas) - 1):
            raise ConfigError(
                f"sample.steps={own['steps']} does not fit sample.sigmas of {len(sigmas) - 1} steps: leave steps out."
            )
        settings = replace(settings, steps=len(sigmas) - 1, linear_steps=None, own_sigmas=sigmas)
    settings = replace(settings, guidance=_guidance(settings.guidance, settings.steps))
    if settings.steps < 1:
        raise ConfigError(f"sample.steps={settings.steps} is not possible: it must be at least 1.")
    if not 0 < settings.threshold < 1:
        raise ConfigError(f"sample.threshold={settings.threshold} is not possible: it must lie between 0 and 1.")
    if settings.linear_steps is not None and not 1 <= settings.linear_steps < settings.steps:
        raise ConfigError(
            f"sample.linear_steps={settings.linear_steps} does not fit sample.steps={settings.steps}: "
            f"use 1 to {settings.steps - 1}, or leave it out for half of them."
        )
    return settings


def _guidance(value: Any, steps: int) -> float | tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int | float) or not 0 <= each < float("inf"):
            raise ConfigError(f"sample.guidance={each} is not possible: it must be a number, 0 or more and finite.")
    if not isinstance(value, list):
        return float(value)
    if len(values) != steps:
        raise ConfigError(
            f"sample.guidance has {len(values)} numbers for {steps} steps: give one, or one for each step."
        )
    return tuple(map(float, values))
