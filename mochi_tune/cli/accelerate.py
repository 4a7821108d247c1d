"""Applies an accelerate config to a training, or refuses it if it contradicts the settings of the run.

`accelerate launch` passes its config to the processes as environment variables.
Source: huggingface/accelerate@v1.15.0 src/accelerate/utils/launch.py (prepare_deepspeed_cmd_env and its neighbours).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mochi_tune.config.checks import check_config
from mochi_tune.config.schema import RunConfig
from mochi_tune.errors import ConfigError
from mochi_tune.files import read_json

# Engines of accelerate that a training does not support.
ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def with_accelerate(config: RunConfig, environment: Mapping[str, str]) -> RunConfig:
    """Returns the settings with the DeepSpeed stage of an accelerate config.

    Raises:
        ConfigError: the config contradicts the settings.
    """
    train, model = config.train, config.model
    for variable, engine in ENGINES.items():
        if _is_true(environment, variable):
            raise ConfigError(
                f"the accelerate config asks for {engine}, which a training does not use: choose DeepSpeed or none by "
                "`accelerate config`, or leave it to parallel=zero2 or parallel=zero3."
            )
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo != "no":
        raise ConfigError(f"the accelerate config has dynamo_backend={dynamo}, which is not used: use no.")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", model.dtype):
        raise ConfigError(
            f"the accelerate config has mixed_precision={precision}, which contradicts model.dtype={model.dtype}: "
            "use no; model.dtype decides the precision."
        )
    for name, key, value in (
        ("gradient_accumulation_steps", "train.accumulation_steps", train.accumulation_steps),
        ("gradient_clipping", "train.max_grad_norm", train.max_grad_norm),
    ):
        asked = environment.get(f"ACCELERATE_{name.upper()}", "none")
        # accelerate passes 1 by default.
        if asked != "1":
            _check_equal(name, asked, key, value)
    if not _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return config
    strategy = _deepspeed_strategy(environment, config)
    if config.parallel.strategy not in ("data", strategy):
        raise ConfigError(
            f"the accelerate config asks for DeepSpeed's stage {strategy.removeprefix('zero')}, which contradicts "
            f"parallel.strategy={config.parallel.strategy}: use parallel={strategy}, or another accelerate config."
        )
    parallel = config.parallel.model_copy(update={"strategy": strategy})
    config = config.model_copy(update={"parallel": parallel})
    check_config(config)
    return config


def _check_equal(name: str, asked: object, key: str, value: float) -> None:
    """Refuses a number of an accelerate config, or of its DeepSpeed file, that differs from the setting."""
    if asked in (None, "none", "auto"):
        return
    try:
        is_equal = float(str(asked)) == value
    except ValueError:
        is_equal = False
    if not is_equal:
        raise ConfigError(
            f"the accelerate config has {name}={asked}, which contradicts {key}={value}: make them equal."
        )


def _check_deepspeed_file(content: dict[str, Any], config: RunConfig) -> None:
    """Refuses values of a DeepSpeed file, apart from its stage, that contradict the settings."""
    train, dtype = config.train, config.model.dtype
    for name, key, value in (
        ("gradient_accumulation_steps", "train.accumulation_steps", train.accumulation_steps),
        ("gradient_clipping", "train.max_grad_norm", train.max_grad_norm),
        ("train_micro_batch_size_per_gpu", "train.batch_size", train.batch_size),
    ):
        _check_equal(name, content.get(name), key, value)
    for name in ("optimizer", "scheduler"):
        if content.get(name) is not None:
            raise ConfigError(
                f"the accelerate config's DeepSpeed file has {name}=..., which is not used: take it out; "
                f"train.{'optimizer' if name == 'optimizer' else 'schedule'} decides."
            )
    for name in ("fp16", "bf16"):
        section = content.get(name)
        is_on = section.get("enabled") if isinstance(section, dict) else section
        if is_on not in (None, False, "auto") and name != dtype:
            raise ConfigError(
                f"the accelerate config's DeepSpeed file enables {name}, which contradicts model.dtype={dtype}: take "
                "it out; model.dtype decides the precision."
            )


def _deepspeed_strategy(environment: Mapping[str, str], config: RunConfig) -> str:
    """Returns the strategy for the DeepSpeed stage of an accelerate config or its DeepSpeed file."""
    zero: dict[str, Any] = {}
    if (file := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        content = read_json(Path(file), ConfigError)
        _check_deepspeed_file(content, config)
        found = content.get("zero_optimization")
        zero = found if isinstance(found, dict) else {}
        stage = str(zero.get("stage", "0"))
    else:
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise ConfigError(
            f"the accelerate config asks for DeepSpeed's stage {stage}: use 2 or 3, or parallel=data, which does what "
            "stage 0 does."
        )
    for what in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        offload = zero.get(f"offload_{what}")
        device = offload.get("device", device) if isinstance(offload, dict) else device
        if device not in ("none", None):
            raise ConfigError(
                f"the accelerate config offloads DeepSpeed's {what}s to {device}, which a training does not do: "
                f"use offload_{what}_device: none."
            )
    return f"zero{stage}"


def _is_true(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "false").lower() in ("true", "1")
