"""Turns errors of the schema into one line: the setting, its value, what is allowed, and what to do."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mochi_tune.config.schema import SourceConfig
from mochi_tune.config.settings import GROUPS, Setting, known_keys, sections
from mochi_tune.config.values import SEED_LIMIT

TYPE_NAMES = {
    int: "a whole number",
    int | None: "a whole number or null",
    float: "a number",
    float | None: "a number or null",
    bool: "true or false",
    bool | None: "true, false or null",
    str: "text",
    str | None: "text or null",
    list[str]: 'a list, ["a", "b"]',
    str | list[str] | None: 'text, a list, ["a", "b"], or null',
    float | list[float]: "a number, or a list of numbers, [1, 0.5]",
    float | list[float] | None: "a number, a list of numbers, [1, 0.5], or null",
    list[float] | None: "a list of numbers, [1, 0.5, 0], or null",
    list[float] | list[list[float]] | None: "a list of numbers, [1, 0.5], one such list for each adapter, or null",
    dict[str, float] | list[dict[str, float]]: "numbers by block, {0-15: 0.5}, or a list of these for each adapter",
    list[int] | None: "a list of whole numbers, [0, 1, 2], or null",
    list[int] | Literal["all"] | None: "all, a list of whole numbers, [100, 200], or null",
    Literal["auto"]
    | list[list[int]]
    | None: "auto, a list of [frames, height, width], [[37, 480, 848], [1, 480, 848]], or null",
    list[SourceConfig]: f"a list of folders, each with {', '.join(SourceConfig.model_fields)}: "
    "[{folder: cats, repeats: 2}, {folder: dogs}]",
    dict[str, int]: r"whole numbers by pattern, {'blocks\.0\..*': 8}",
    dict[str, float]: r"numbers by pattern, {'blocks\.0\..*': 0.5}",
}
# Names of other trainers for the length of a run in epochs.
EPOCHS = ("epochs", "num_epochs", "num_train_epochs", "max_train_epochs")
# Names of other trainers -> our settings, with a value where the name implies one.
SYNONYMS = {
    "lr": ["train.learning_rate"],
    "learning-rate": ["train.learning_rate"],
    "rate": ["train.learning_rate"],
    "max_steps": ["train.steps"],
    "max_train_steps": ["train.steps"],
    "steps": ["train.steps"],
    "num_steps": ["train.steps"],
    "batch": ["train.batch_size"],
    "train_batch_size": ["train.batch_size"],
    "gradient_accumulation_steps": ["train.accumulation_steps"],
    "grad_accum": ["train.accumulation_steps"],
    "scheduler": ["train.schedule"],
    "lr_scheduler": ["train.schedule"],
    "warmup": ["train.warmup_steps"],
    "network_dim": ["lora.rank"],
    "r": ["lora.rank"],
    "dim": ["lora.rank"],
    "network_alpha": ["lora.alpha"],
    "lora_alpha": ["lora.alpha"],
    "target_modules": ["lora.targets"],
    "network_weights": ["lora.init_from"],
    "resolution": ["data.height", "data.width"],
    "size": ["data.height", "data.width"],
    "frames": ["data.num_frames"],
    "frame_extraction": ["data.clips"],
    "dataset": ["data.videos"],
    "train_data_dir": ["data.videos"],
    "data": ["data.videos"],
    "data_dir": ["data.videos"],
    "data_root": ["data.videos"],
    "instance_data_root": ["data.videos"],
    "dataset_config": ["data.sources"],
    "num_repeats": ["data.sources"],
    "trigger": ["data.caption_prefix"],
    "trigger_word": ["data.caption_prefix"],
    "id_token": ["data.caption_prefix"],
    "output_dir": ["run_dir"],
    "out_dir": ["run_dir"],
    "checkpoint_dir": ["run_dir"],
    "init_checkpoint_path": ["model.weights"],
    "qkv_proj_lora_rank": ["lora.rank"],
    "mixed_precision": ["model.dtype"],
    "fp8_base": ["model.precision=fp8"],
    "blocks_to_swap": ["memory=16gb"],
    "gradient_checkpointing": ["train.recompute=block for true, train.recompute=none for false"],
    "activation_checkpointing": ["train.recompute=block for true, train.recompute=none for false"],
    "optimizer_args": ["train.weight_decay"],
    "grad_clip": ["train.max_grad_norm"],
    "max_norm": ["train.max_grad_norm"],
    "save_every": ["train.checkpoint_every"],
    "save_interval": ["train.checkpoint_every"],
    "save_every_n_steps": ["train.checkpoint_every"],
    "save_every_n_epochs": ["train.checkpoint_every"],
    "checkpointing_steps": ["train.checkpoint_every"],
    "validation_steps": ["train.validate_every"],
    "validation_prompts": ["train.sample_prompts"],
    "sample_every_n_steps": ["train.sample_every"],
    "timestep_sampling": ["train.sigma_distribution"],
    "weighting_scheme": ["train.sigma_distribution"],
    "discrete_flow_shift": ["train.sigma_shift"],
    "report_to": ["log.wandb, log.tensorboard or log.trackio"],
    "gpus": ["parallel.num_processes"],
    "num_gpus": ["parallel.num_processes"],
    "cfg": ["sample.guidance"],
    "cfg_scale": ["sample.guidance"],
    "guidance_scale": ["sample.guidance"],
    "num_inference_steps": ["sample.steps"],
    "lora": ["sample.adapter"],
    "lora_path": ["sample.adapter"],
    "lora_scale": ["sample.adapter_strength"],
}
# Settings of other trainers for what `prepare` always does.
UNNEEDED = ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs")
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
# Kinds of errors, the most informative first: a setting of several types has several errors.
ORDER = ("extra_forbidden", "invalid_key", "missing", *OUT_OF_RANGE, "literal_error", "not_possible", "empty")


def explain(error: ValidationError, source: str, given: Mapping[str, str], section: str = "") -> str:
    """Turns the most informative error of pydantic into one line that names the setting and its allowed values.

    Args:
        error: error of `RunConfig` or of one of its sections.
        source: file of the settings.
        given: dotted key -> its text on the command line.
        section: name of the section, if it was validated alone.
    """
    details = min(error.errors(), key=_urgency)
    path = ([section] if section else []) + [str(part) for part in details["loc"]]
    dotted = ".".join(path)
    if dotted.startswith("data.sources."):
        # The rest of the path is within one source.
        return _explain_source(path[2], path[3:], details)
    if details["type"] == "missing":
        missing = [".".join(map(str, each["loc"])) for each in error.errors() if each["type"] == "missing"]
        return f"{source} sets no {', '.join(missing)}: put base into its defaults, `defaults: [base, _self_]`."
    if details["type"] in ("extra_forbidden", "invalid_key"):
        below = f"; write it as {dotted.replace('.', ': {')}: ...}}." if dotted in known_keys() else ""
        return f"{source}: {dotted} is not a setting{below or nearest(dotted, known_keys())}"
    if dotted in sections():
        return f"{source}: {explain_section(dotted)}"
    key = next(key for num_parts in (2, 1) if (key := ".".join(path[:num_parts])) in known_keys())
    where = "" if key in given else f"{source}: "
    return where + _explain_value(known_keys()[key], details, path[key.count(".") + 1 :], given.get(key))


def _explain_source(number: str, inner: list[str], details: ErrorDetails) -> str:
    """Explains an error at `inner` in an entry of data.sources."""
    where, name = f"data.sources[{number}]", ".".join(inner[:1])
    if details["type"] in ("missing", "empty"):
        return f"{where} names no folder: write {{folder: NAME, ...}}."
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, SourceConfig.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": it takes {', '.join(SourceConfig.model_fields)}."
        return f"{where}: {name} is not known{hint}"
    if not inner:
        return does_not_fit(f"{where}={as_yaml(details['input'])}", "data.sources")
    rule = details["msg"].removeprefix("Input should be ").replace("greater than", "above")
    rule = "true or false" if details["type"].startswith("bool") else rule
    return f"{where}: {name}={as_yaml(details['input'])} is not possible: it must be {rule}."


def does_not_fit(what: str, key: str) -> str:
    """Returns the line for a value of the wrong type.

    Args:
        what: the setting and its value.
        key: key of the setting.
    """
    # To YAML, 47:0 is one word.
    hint = ", with a space after each colon" if "{" in what and re.search(r":[-+.\d]", what) else ""
    return f"{what} does not fit: it takes {TYPE_NAMES[known_keys()[key].type]}{hint}."


def _urgency(details: ErrorDetails) -> int:
    return ORDER.index(details["type"]) if details["type"] in ORDER else len(ORDER)


def explain_section(name: str) -> str:
    """Returns the line for a section whose value is not a mapping of settings."""
    if name in GROUPS:
        return f"{name} is a section: choose its file by {name}=NAME, or by `override {name}: NAME` in defaults."
    return f"{name} is a section: write its settings below it, one per line."


def explain_missing(group: str, name: str, known: Sequence[str]) -> str:
    """Returns the line for a name in `defaults` that no file has; `known` are the files of its group, "" for none."""
    what = f"{group}: {name}" if group else name
    if near := difflib.get_close_matches(name, known, n=1):
        return f"{what} in defaults does not exist; did you mean {near[0]}?"
    return f"{what} in defaults does not exist: use one of {', '.join(known or GROUPS)}."


def _explain_value(setting: Setting, details: ErrorDetails, inner: list[str], given: str | None) -> str:
    """Explains an error of a value, or of its part at `inner`."""
    kind, value, key = details["type"], details["input"], setting.key
    if kind in OUT_OF_RANGE and "whole" not in TYPE_NAMES[setting.type]:
        value = float(value)
    got = f"{key}={as_yaml(value)}"
    if isinstance(setting.default, dict) and inner:
        got = f"{key}: {value!r}" if inner[-1] == "[key]" else f"{key}: {inner[0]!r}: {as_yaml(value)}"
    elif inner and inner[-1].isdecimal():
        got = f"{key}[{inner[-1]}]={as_yaml(value)}"
    if kind in OUT_OF_RANGE:
        return f"{got} is not possible: it must be {describe_limits(setting)}."
    if kind == "literal_error" and setting.choices:
        return f"{got} is not possible: use {describe_choices(setting)}."
    if kind == "not_possible":
        return f"{got} is not possible: it must be {details['msg']}."
    if kind == "empty":
        where = got.rpartition("=")[0]
        if inner and isinstance(setting.default, list):
            return f"{where} is empty: write one, or leave it out."
        return f"{where} is empty: name {'one' if setting.type is str else 'one, or null'}."
    return does_not_fit(got if given is None else f"{key}={given}", key)


def describe_type(setting: Setting) -> str:
    """Returns the allowed values of a setting: its choices, or its type and limits."""
    if setting.choices:
        return describe_choices(setting)
    limits = describe_limits(setting)
    return TYPE_NAMES[setting.type] + (f", {limits}" if limits not in ("", "finite") else "")


def describe_choices(setting: Setting) -> str:
    """Returns the choices of a setting as text."""
    return " or ".join("null" if choice is None else choice for choice in setting.choices)


def describe_limits(setting: Setting) -> str:
    """Returns the range of a number, such as "from 0 to below 1"; "" for any number."""
    limits = {name: "2**63" if limit == SEED_LIMIT else limit for name, limit in setting.limits.items()}
    is_finite = limits.get("allow_inf_nan") is False
    upper = f"below {limits['lt']}" if "lt" in limits else f"at most {limits['le']}" if "le" in limits else ""
    if upper:
        if "gt" in limits:
            return f"above {limits['gt']} and {upper}"
        return f"from {limits['ge']} to {upper.removeprefix('at most ')}" if "ge" in limits else upper
    lower = ""
    if "gt" in limits:
        lower = f"above {limits['gt']}"
    elif "ge" in limits:
        lower = "0 or more" if limits["ge"] == 0 else f"at least {limits['ge']}"
    return " and ".join(filter(None, (lower, "finite" if is_finite else "")))


def as_yaml(value: Any) -> str:
    """Returns a value as YAML: null, true, text without quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {as_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    return str(value) if str(value).isprintable() else ascii(value)


def _sections_of(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def nearest(key: str, known: Iterable[str]) -> str:
    """Returns a hint: the known key most similar to `key`, or where all are listed."""
    known = list(known)
    section, _, word = key.rpartition(".")
    # In a section of ours, a setting of that section may be meant.
    if word in SYNONYMS and (section not in sections() or section in ("", *_sections_of(SYNONYMS[word]))):
        return f"; did you mean {' and '.join(SYNONYMS[word])}?"
    if word in UNNEEDED:
        return "; leave it out: `prepare` caches latents and captions."
    if word == "base_weights":
        return "; merge the adapters into the DiT by `mochi-tune lora bake`, and set model.transformer to its folder."
    if word in EPOCHS:
        return "; set train.steps: the epochs times the clips, divided by the samples of a step."
    if not section and (same := [k for k in known if k.rpartition(".")[2] == key]):
        return f"; did you mean {' or '.join(same)}?"
    # In a file, sections are keys too.
    own_sections = {} if section else dict.fromkeys(k.partition(".")[0] for k in known if "." in k)
    own_sections.pop(key, None)
    near = difflib.get_close_matches(key, [*known, *own_sections], n=1, cutoff=0.7)
    near = near or [k for k in known if k.rpartition(".")[2] == word][:1]
    if not near and not section:
        words = difflib.get_close_matches(key, {k.rpartition(".")[2] for k in known}, n=1, cutoff=0.8)
        near = [k for k in known if k.rpartition(".")[2] in words]
    return f"; did you mean {' or '.join(near)}?" if near else "; --help all lists them."
