"""Reads the sizes of models from the configuration files of a weights folder."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mochi_tune.errors import CheckpointError
from mochi_tune.files import read_json
from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.latents import VAE_MEAN, VAE_STD
from mochi_tune.models.vae import DecoderConfig, EncoderConfig

# Maximum of the numbers in a configuration.
_MOST = 100_000


def read_official_config(path: Path, part: str) -> Any:
    """Reads the sizes of a part from dit_config.json or vae_config.json; full size if there is no such file.

    Args:
        path: the file.
        part: "dit", "encoder" or "decoder".

    Returns:
        A DiTConfig, an EncoderConfig or a DecoderConfig.

    Raises:
        CheckpointError: the file is not JSON, or has an unknown key, or a value of the wrong type or not supported.
    """
    spec = _PARTS[part]
    if not path.exists():
        return spec.config()
    values = read_config(path)
    if part != "dit":
        values = values.get(part)
        if not isinstance(values, dict):
            raise CheckpointError(f'{path} has no "{part}" object: it must hold "encoder" and "decoder".')
    defaults = {field.name: field.default for field in fields(spec.config)}
    sizes = {}
    for key, value in values.items():
        if key in spec.fixed:
            supported = spec.fixed[key]
            if any(v != supported for v in (value if isinstance(value, list) else [value])):
                raise CheckpointError(f"{path}: {key}={value!r} is not Mochi's, which has {supported!r}.")
        elif key in defaults:
            sizes[key] = _checked(path, key, value, defaults[key])
        elif key not in spec.ignored:
            raise CheckpointError(f"{path}: unknown key {key}; known are {', '.join([*defaults, *spec.fixed])}.")
    return spec.config(**sizes)


def read_diffusers_config(path: Path, part: str) -> Any:
    """Reads the sizes of a part from the config.json of diffusers, otherwise as `read_official_config`."""
    spec = _PARTS[part]
    values = read_config(path)
    if values.get("_class_name", spec.class_name) != spec.class_name:
        raise CheckpointError(f"{path} describes a {values['_class_name']}, not Mochi's {spec.class_name}.")
    for key, supported in spec.diffusers_fixed.items():
        if key in values and values[key] != supported:
            raise CheckpointError(f"{path}: {key}={values[key]!r} is not Mochi's, which has {supported!r}.")
    try:
        return spec.from_diffusers(values)
    except KeyError as error:
        raise CheckpointError(f"{path} has no {error}: it must be that of a {spec.class_name}.") from error
    except (TypeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is not that of a {spec.class_name} ({error}).") from error


def read_config(path: Path) -> dict[str, Any]:
    """Reads a configuration file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: fetch it again.")
    return read_json(path)


def _dit_config(values: dict[str, Any]) -> DiTConfig:
    return DiTConfig(
        depth=values["num_layers"],
        patch_size=values["patch_size"],
        num_heads=values["num_attention_heads"],
        hidden_size_x=values["num_attention_heads"] * values["attention_head_dim"],
        hidden_size_y=values["pooled_projection_dim"],
        in_channels=values["in_channels"],
        t5_feat_dim=values["text_embed_dim"],
    )


def _encoder_config(values: dict[str, Any]) -> EncoderConfig:
    channels = values["encoder_block_out_channels"]
    return EncoderConfig(
        in_channels=values["in_channels"],
        base_channels=channels[0],
        channel_multipliers=tuple(c // channels[0] for c in channels),
        num_res_blocks=tuple(values["layers_per_block"]),
        latent_dim=values["latent_channels"],
        temporal_reductions=tuple(values["temporal_expansions"]),
        spatial_reductions=tuple(values["spatial_expansions"]),
        has_attentions=tuple(values["add_attention_block"]),
    )


def _decoder_config(values: dict[str, Any]) -> DecoderConfig:
    channels = values["decoder_block_out_channels"]
    return DecoderConfig(
        out_channels=values["out_channels"],
        base_channels=channels[0],
        channel_multipliers=tuple(c // channels[0] for c in channels),
        num_res_blocks=tuple(values["layers_per_block"]),
        latent_dim=values["latent_channels"],
        temporal_expansions=tuple(values["temporal_expansions"]),
        spatial_expansions=tuple(values["spatial_expansions"]),
    )


def _checked(path: Path, key: str, value: Any, default: Any) -> Any:
    """Returns a value of a configuration with the type of its default."""
    if any(type(v) is int and not 0 <= v <= _MOST for v in _listed(value)):
        raise CheckpointError(f"{path}: {key}={value!r} does not fit; numbers there are 0 to {_MOST}.")
    if isinstance(default, tuple):
        if isinstance(value, list) and all(type(v) is type(default[0]) for v in value):
            return tuple(value)
    elif type(value) is type(default) or (isinstance(default, float) and type(value) is int):
        return type(default)(value)
    raise CheckpointError(f"{path}: {key}={value!r} does not fit; it is like {default!r}.")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class _Part:
    config: type
    class_name: str
    from_diffusers: Callable[[dict[str, Any]], Any]
    # Keys of an official configuration besides the sizes, with the only value that the model supports.
    fixed: dict[str, Any]
    # The same for diffusers' configuration.
    diffusers_fixed: dict[str, Any]
    # Keys of an official configuration that have no effect.
    ignored: tuple[str, ...] = ()


_VAE_FIXED = {
    "act_fn": "silu",
    "scaling_factor": 1.0,
    "latents_mean": list(VAE_MEAN),
    "latents_std": list(VAE_STD),
}
_PARTS = {
    "dit": _Part(
        DiTConfig,
        "MochiTransformer3DModel",
        _dit_config,
        fixed={"qk_norm": True},
        diffusers_fixed={"qk_norm": "rms_norm", "activation_fn": "swiglu"},
        ignored=("t5_token_length", "rope_theta"),
    ),
    "encoder": _Part(
        EncoderConfig,
        "AutoencoderKLMochi",
        _encoder_config,
        fixed={
            "prune_bottlenecks": False,
            "affine": True,
            "bias": True,
            "input_is_conv_1x1": True,
            "padding_mode": "replicate",
        },
        diffusers_fixed=_VAE_FIXED,
    ),
    "decoder": _Part(
        DecoderConfig,
        "AutoencoderKLMochi",
        _decoder_config,
        fixed={
            "has_attention": False,
            "output_norm": False,
            "nonlinearity": "silu",
            "output_nonlinearity": "silu",
            "causal": True,
        },
        diffusers_fixed=_VAE_FIXED,
    ),
}
