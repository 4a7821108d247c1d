"""What a newcomer meets first: a verb's short help, and the command that was meant."""

import itertools
import shlex
from collections.abc import Sequence

from mochi_tune.errors import ConfigError

# The settings of each verb that a first run may want, and an example.
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
        "model memory run_dir lora.rank train.steps train.batch_size train.learning_rate train.checkpoint_every "
        "train.sample_prompts parallel.num_processes",
        "mochi-tune train conf=my_lora train.steps=2000 lora.rank=32",
    ),
    "sample": (
        "sample.prompt sample.prompts sample.adapter sample.adapter_strength sample.seeds sample.steps "
        "sample.guidance sample.num_frames sample.out memory",
        'mochi-tune sample conf=my_lora prompt="a teacup shatters" seeds=0,1',
    ),
}


def _full_key(verb: str, key: str) -> str:
    """Returns the setting that a word without its section means for a verb; the word itself where it means none."""
    from mochi_tune.config.explain import SYNONYMS
    from mochi_tune.config.settings import known_keys

    if key in known_keys() or (verb == "sample" and f"sample.{key}" in known_keys()):
        return key
    return next((name for name in (f"{verb}.{key}", *SYNONYMS.get(key, [])) if name in known_keys()), key)


def _is_setting(verb: str, word: str) -> bool:
    from mochi_tune.config.explain import SYNONYMS
    from mochi_tune.config.settings import known_keys

    name = word.lstrip("-")
    own = verb == "plan" and name in ("card", "card_gib")
    return own or word.startswith("-") or name in SYNONYMS or any(key.split(".")[-1] == name for key in known_keys())


def short_help(verb: str) -> str:
    """Returns the ten settings of a verb that matter first, and an example."""
    from mochi_tune.config.docs import packaged_files
    from mochi_tune.config.explain import as_yaml, describe_type
    from mochi_tune.config.settings import known_keys

    keys, example = SHORT[verb]
    lines = [f"For example: {example}", ""]
    groups = packaged_files()
    for key in keys.split():
        if key in groups:
            lines += [f"  {f'{key}=NAME':<44} one of {', '.join(groups[key])}"]
            continue
        setting = known_keys()[key]
        shown = key.removeprefix("sample.") if verb == "sample" else key
        lines += [f"  {f'{shown}={as_yaml(setting.default)}':<44} {describe_type(setting)}", f"      {setting.meaning}"]
    return "\n".join([*lines, "", f"`mochi-tune {verb} --help all` lists every setting.", ""])


def check_form(verb: str, arguments: Sequence[str]) -> None:
    """Refuses words that are no key=value, and names the command that was meant.

    Args:
        verb: of the command.
        arguments: behind it.

    Raises:
        ConfigError: such a word.
    """
    has_conf = any(argument.startswith("conf=") for argument in arguments)
    for number, argument in enumerate(arguments):
        if argument == "--cfg" or ("=" in argument and not argument.startswith("-")):
            continue
        key, equals, value = argument.lstrip("-").partition("=")
        key = _full_key(verb, key)
        before = arguments[number - 1] if number else ""
        follower = arguments[number + 1] if number + 1 < len(arguments) else ""
        if "=" in before and not before.startswith("-") and not _is_setting(verb, argument):
            words = itertools.takewhile(lambda word: "=" not in word and not word.startswith("-"), arguments[number:])
            name, _, value = " ".join([before, *words]).partition("=")
            raise ConfigError(f'{argument!r} stands alone: put quotes around a value with spaces, {name}="{value}".')
        if equals and key:
            meant, what = f"{key}={value}", "is not an option"
        elif follower and "=" not in follower and not follower.startswith("-"):
            meant, what = f"{key}={follower}", "has no value"
        elif argument.startswith("-"):
            raise ConfigError(f"{argument} is not an option: use --help or --cfg; settings are written key=value.")
        elif not has_conf:
            meant, what = f"conf={argument}", "is not a setting"
        elif verb == "sample":
            meant, what = f"prompt={argument}", "is not a setting"
        else:
            continue
        raise ConfigError(f"{argument!r} {what}: settings are written key=value; did you mean {shlex.quote(meant)}?")
