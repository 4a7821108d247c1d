"""The short help of a verb, and the check of the form of its arguments."""

import itertools
import shlex
from collections.abc import Sequence
from typing import get_origin

from mochi_tune.errors import ConfigError

# The most important settings of each verb, and an example.
SHORT = {
    "plan": (
        "model memory data.num_frames data.height data.width data.buckets lora.rank train.batch_size train.steps "
        "train.recompute",
        "mochi-tune plan conf=my_lora card=4090 memory=auto",
    ),
    "inspect": (
        "model data.videos data.sources data.num_frames data.height data.width data.buckets data.clips "
        "data.caption_prefix data.frame_rate",
        "mochi-tune inspect conf=my_lora data.num_frames=37",
    ),
    "prepare": (
        "model data.videos data.cache data.num_frames data.height data.width data.buckets data.clips "
        "data.caption_prefix memory",
        "mochi-tune prepare conf=my_lora data.num_frames=37",
    ),
    "train": (
        "model memory run_dir lora.rank lora.alpha train.steps train.batch_size train.learning_rate "
        "train.checkpoint_every train.sample_prompts parallel.num_processes",
        "mochi-tune train conf=my_lora train.steps=2000 lora.rank=32 lora.alpha=32",
    ),
    "sample": (
        "sample.prompt sample.prompts sample.adapter sample.adapter_strength sample.seeds sample.steps "
        "sample.guidance sample.num_frames sample.out memory",
        'mochi-tune sample conf=my_lora prompt="a teacup shatters" seeds=0,1',
    ),
}


# Keys of a verb that are not settings.
OWN = {"plan": ("card", "card_gib"), "inspect": ("out",)}


# The meaning of the settings that choose a packaged file.
MEANINGS = {
    "model": "the base; tiny and toy are small, embedded and run on any machine",
    "memory": "GPU memory that the run must fit; auto: what is free on this GPU",
}


def _full_key(verb: str, key: str) -> str:
    """Returns the setting that a key without its section means for a verb; the key itself if it means none."""
    from mochi_tune.config.explain import SYNONYMS
    from mochi_tune.config.settings import known_keys

    if key in OWN.get(verb, ()) or key in known_keys() or (verb == "sample" and f"sample.{key}" in known_keys()):
        return key
    # A word for two settings, or for a value, does not mean a single setting.
    meant = SYNONYMS.get(key) or [name for name in known_keys() if name.rpartition(".")[2] == key]
    names = [f"{verb}.{key}", *(meant if len(meant) == 1 else [])]
    return next((name for name in names if name in known_keys()), key)


def _hint(verb: str, key: str, value: str) -> str:
    """Returns the end of the error for a key and a value that are not written key=value: what to write instead."""
    from mochi_tune.config.explain import nearest
    from mochi_tune.config.settings import GROUPS, known_keys

    full = _full_key(verb, key)
    setting = known_keys().get(f"sample.{full}" if verb == "sample" and full not in known_keys() else full)
    if setting is None and full not in ("conf", *GROUPS, *OWN.get(verb, ())):
        return f"{key} is not a setting{nearest(key, [*known_keys(), *GROUPS])}"
    # The name and the value may be those of another trainer.
    fits = setting is None or not setting.choices or value in setting.choices
    if setting is not None and get_origin(setting.type) is list and not setting.takes_numbers:
        fits = value.startswith("[")
    return f"settings are written key=value; did you mean {shlex.quote(f'{full}={value}' if fits and value else full)}?"


def _is_setting(verb: str, word: str) -> bool:
    from mochi_tune.config.explain import SYNONYMS
    from mochi_tune.config.settings import known_keys

    name = word.lstrip("-")
    return (
        name in known_keys()
        or name in OWN.get(verb, ())
        or word.startswith("-")
        or name in SYNONYMS
        or any(key.split(".")[-1] == name for key in known_keys())
    )


def _can_have_spaces(verb: str, argument: str) -> bool:
    """Whether the value of a key=value may be a part of one with spaces, such as a prompt or [1, 0.5]."""
    from mochi_tune.config.settings import known_keys

    key, _, value = argument.partition("=")
    if value.endswith(",") or (value.startswith(("[", "{")) and not value.endswith(("]", "}"))):
        return True
    setting = known_keys().get(f"sample.{key}" if verb == "sample" and key not in known_keys() else key)
    return key in OWN.get(verb, ()) or (setting is not None and setting.takes_text and not setting.choices)


def short_help(verb: str) -> str:
    """Returns the most important settings of a verb, and an example."""
    from mochi_tune.config.docs import packaged_files
    from mochi_tune.config.explain import as_yaml, describe_type
    from mochi_tune.config.load import packaged_folder
    from mochi_tune.config.settings import known_keys
    from mochi_tune.config.yaml_files import check_yaml

    keys, example = SHORT[verb]
    lines = [f"For example: {example}", ""]
    groups, chosen = packaged_files(), check_yaml(packaged_folder() / "base.yaml")["defaults"]
    defaults = {group: name for each in chosen if isinstance(each, dict) for group, name in each.items()}
    for key in keys.split():
        if key in groups:
            lines += [f"  {f'{key}={defaults[key]}':<44} {' or '.join(groups[key])}", f"      {MEANINGS[key]}"]
            continue
        setting = known_keys()[key]
        shown = key.removeprefix("sample.") if verb == "sample" else key
        lines += [f"  {f'{shown}={as_yaml(setting.default)}':<44} {describe_type(setting)}", f"      {setting.meaning}"]
    return "\n".join([*lines, "", f"`mochi-tune {verb} --help all` lists every setting.", ""])


def check_form(verb: str, arguments: Sequence[str]) -> None:
    """Refuses arguments that are not key=value, and suggests what to write instead.

    Args:
        verb: the verb of the command.
        arguments: the arguments after it.

    Raises:
        ConfigError: an argument is not key=value.
    """
    has_conf = any(argument.startswith("conf=") for argument in arguments)
    for number, argument in enumerate(arguments):
        if argument == "--cfg" or ("=" in argument and not argument.startswith("-")):
            continue
        key, equals, value = argument.lstrip("-").partition("=")
        before = arguments[number - 1] if number else ""
        follower = arguments[number + 1] if number + 1 < len(arguments) else ""
        words = itertools.takewhile(lambda word: "=" not in word and not word.startswith("-"), arguments[number:])
        if "=" not in argument and follower.startswith("="):
            rest = itertools.takewhile(lambda word: "=" not in word, arguments[number + 2 :])
            value = " ".join(filter(None, [follower[1:], *rest]))
            raise ConfigError(f"{argument!r} has a space before its =: {_hint(verb, key, value)}")
        if before.find("=") == len(before) - 1 > 0 and not argument.startswith("-"):
            raise ConfigError(f"{before!r} has a space behind it: {_hint(verb, before[:-1], ' '.join(words))}")
        if "=" in before and _can_have_spaces(verb, before) and not _is_setting(verb, argument):
            name, _, value = " ".join([before, *words]).partition("=")
            raise ConfigError(f'{argument!r} stands alone: put quotes around a value with spaces, {name}="{value}".')
        has_follower = follower and "=" not in follower and not follower.startswith("-")
        if equals and key:
            raise ConfigError(f"{argument!r} is not an option: {_hint(verb, key, value)}")
        if has_follower and _is_setting(verb, argument):
            raise ConfigError(f"{argument!r} has no value: {_hint(verb, key, follower)}")
        if argument.startswith("-"):
            from mochi_tune.config.explain import EPOCHS, SYNONYMS, UNNEEDED

            if key in (*SYNONYMS, *UNNEEDED, *EPOCHS):
                raise ConfigError(f"{argument} is not an option: {_hint(verb, key, '')}")
            raise ConfigError(f"{argument} is not an option: use --help or --cfg; settings are written key=value.")
        if not has_conf:
            meant = f"conf={argument}"
        elif verb == "sample":
            meant = f"prompt={' '.join(words)}"
        else:
            continue
        meant = shlex.quote(meant)
        raise ConfigError(f"{argument!r} is not a setting: settings are written key=value; did you mean {meant}?")
