"""Checks of combinations of settings, which the schema of a single setting cannot express."""

from mochi_tune.config.sample import sample_size
from mochi_tune.config.schema import LoraConfig, ParallelConfig, RunConfig, TrainConfig
from mochi_tune.config.settings import known_keys, value_of
from mochi_tune.errors import ConfigError


def check_config(config: RunConfig) -> None:
    """Checks that settings fit together.

    Raises:
        ConfigError: two settings contradict each other; the error names them and what to use.
    """
    # These import torch, which --help does not need.
    from mochi_tune.config.sources import read_sources, share_of_buckets
    from mochi_tune.models.latents import check_geometry

    read_sources(config.data)
    share_of_buckets(config.data)
    check_geometry(*sample_size(config.sample, config.data))
    _check_unused(config)
    if config.data.caption_variants > 1 and config.data.tag_dropout == 0:
        raise ConfigError(
            f"data.caption_variants={config.data.caption_variants} does nothing with data.tag_dropout=0: set "
            "data.tag_dropout above 0, or leave it out."
        )
    _check_optimizer(config.train, config.parallel, config.lora)
    _check_recompute(config)
    _check_precision(config)
    _check_engine(config.parallel)
    if config.lora.dora and config.parallel.strategy == "zero3":
        raise ConfigError(
            "lora.dora=true measures complete rows of the base, which parallel.strategy=zero3 splits: "
            "use parallel.strategy=zero2."
        )


def _check_recompute(config: RunConfig) -> None:
    """Refuses a recompute policy that does not fit the other settings."""
    recompute = config.train.recompute
    if recompute == "attention" and config.parallel.strategy == "zero3":
        raise ConfigError(
            "train.recompute=attention keeps the outputs of attention, which parallel.strategy=zero3 cannot tell from "
            "gathered weights: use train.recompute=block or none, or leave it out."
        )
    if recompute == "none" and config.memory.activations == "offload":
        raise ConfigError(
            "memory.activations=offload keeps the inputs of blocks in host memory, and train.recompute=none keeps all "
            "activations of each block on the device: leave one of them out."
        )


def _check_precision(config: RunConfig) -> None:
    """Refuses a precision that does not fit the other settings."""
    precision = config.model.precision
    if precision == "bf16" and config.model.dtype != "bf16":
        raise ConfigError(f"model.precision=bf16 contradicts model.dtype={config.model.dtype}: use model.dtype=bf16.")
    if precision in (None, "bf16"):
        return
    if config.lora.dora:
        raise ConfigError(
            f"lora.dora=true measures rows of the base, which model.precision={precision} rounds: leave one out."
        )
    if config.parallel.strategy == "zero3":
        raise ConfigError(
            f"parallel.strategy=zero3 splits matrices that model.precision={precision} needs in one piece: "
            "use parallel.strategy=data or zero2."
        )


def _check_engine(parallel: ParallelConfig) -> None:
    """Refuses settings of Ray that contradict each other."""
    if parallel.engine == "ray" and parallel.shard is not None:
        raise ConfigError(f"parallel.shard={parallel.shard} and parallel.engine=ray are both given: leave one out.")
    if parallel.engine != "ray" and parallel.ray_address is not None:
        raise ConfigError(
            f"parallel.ray_address={parallel.ray_address} does nothing with parallel.engine={parallel.engine}: use "
            "parallel.engine=ray, or leave it out."
        )


def _check_unused(config: RunConfig) -> None:
    """Refuses settings that the chosen options ignore."""
    for key, owner, choice in (
        ("train.sigma_mean", "train.sigma_distribution", "logit_normal"),
        ("train.sigma_std", "train.sigma_distribution", "logit_normal"),
        ("train.sigma_shift", "train.sigma_distribution", "shifted"),
        ("train.decay_share", "train.schedule", "wsd"),
    ):
        value, chosen = value_of(config, key), value_of(config, owner)
        if chosen != choice and value != known_keys()[key].default:
            raise ConfigError(
                f"{key}={value} does nothing with {owner}={chosen}: use {owner}={choice}, or leave it out."
            )

    train = config.train
    if train.keep_best and not (train.validate_every and train.validation_clips):
        nothing = "validate_every" if not train.validate_every else "validation_clips"
        raise ConfigError(
            f"train.keep_best=true does nothing with train.{nothing}=0, as there is no validation: set it above 0, or "
            "leave keep_best out."
        )


def _check_optimizer(train: TrainConfig, parallel: ParallelConfig, lora: LoraConfig) -> None:
    """Refuses an optimizer that does not fit the other settings of the training."""
    if parallel.strategy != "data" and train.optimizer != "adamw":
        # ZeRO gives the optimizer flat shards, without matrices, so that sums cover only a part of the parameters.
        raise ConfigError(
            f"train.optimizer={train.optimizer} does not fit parallel.strategy={parallel.strategy}, which shards the "
            "optimizer: use train.optimizer=adamw, or parallel.strategy=data."
        )
    if train.optimizer == "prodigy" and train.learning_rate < 0.1:
        raise ConfigError(
            f"train.learning_rate={train.learning_rate} does not fit train.optimizer=prodigy, which finds the rate "
            "itself and takes this as a factor on it: use train.learning_rate=1."
        )
    if train.optimizer == "prodigy" and train.learning_rate_b_ratio != 1:
        raise ConfigError(
            f"train.learning_rate_b_ratio={train.learning_rate_b_ratio} does not fit train.optimizer=prodigy, which "
            "has one rate for all matrices: use 1, or another optimizer."
        )
    if train.optimizer == "schedule_free" and train.schedule != "constant":
        raise ConfigError(
            f"train.schedule={train.schedule} does not fit train.optimizer=schedule_free, which averages instead of "
            "following a schedule: use train.schedule=constant."
        )
    if train.optimizer == "muon" and lora.dora:
        raise ConfigError("train.optimizer=muon takes matrices only, and lora.dora=true trains vectors: use adamw.")
