"""Loading and checking the settings of a run: one file describes one LoRA for all verbs."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mochi_tune.config.checks import check_config
from mochi_tune.config.lora import PATTERN_KEYS, PATTERN_TYPES, read_patterns
from mochi_tune.config.schema import MemoryConfig, RunConfig, SampleConfig, known_keys
from mochi_tune.errors import ConfigError

if TYPE_CHECKING:
    pass


# Keys of `sample` that stand at the top level on its command line.
SAMPLE_ALIASES = tuple(entry.name for entry in fields(SampleConfig))
# What a preset sets.
PRESET_KEYS = ("steps", "guidance", "threshold", "linear_steps", "sigmas")
MAX_YAML_DEPTH = 20
GROUPS = ("model", "lora", "memory", "parallel")
TYPE_NAMES = {
    int: "a whole number",
    int | None: "a whole number or null",
    float: "a number",
    float | None: "a number or null",
    bool: "true or false",
    str: "text",
    list[str]: 'a list, ["a", "b"]',
    list[float] | None: "a list of numbers, [1, 0.5, 0], or null",
    list[int] | None: "a list of whole numbers, [0, 1, 2], or null",
    **PATTERN_TYPES,
}


def packaged_folder() -> Path:
    """Returns the folder of the packaged configuration files."""
    from mochi_tune import conf

    return Path(conf.__path__[0])


def load_config(name: str, overrides: list[str]) -> RunConfig:
    """Composes conf/NAME.yaml, or the packaged one, or a path, with `key=value` overrides into typed settings.

    Raises:
        ConfigError: there is no such file, a key is unknown, or a value does not fit.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = find_config(name)
    _check_yaml(path)
    overrides = [check_override(override) for override in overrides]
    given = [override.partition("=") for override in overrides]
    patterns = {key: read_patterns(key, value) for key, _, value in given if key in PATTERN_KEYS}
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    searchpath = f"hydra.searchpath=[{_quote(f'file://{packaged_folder()}')}]"
    try:
        with initialize_config_dir(str(path.parent.resolve()), version_base="1.3"):
            others = ["".join(parts) for parts in given if parts[0] not in PATTERN_KEYS]
            composed = compose(path.stem, overrides=[searchpath, *others])
        typed = OmegaConf.merge(OmegaConf.structured(RunConfig), composed)
        for key, mapping in patterns.items():
            OmegaConf.update(typed, key, mapping, merge=False)
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            raise ConfigError(f"{path} sets no {', '.join(missing)}: begin it with `defaults: [base, _self_]`.")
        config = OmegaConf.to_object(typed)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_explain(error, path, overrides)) from None
    check_config(config)
    return config


def _check_yaml(path: Path) -> None:
    """Refuses what no setting needs and a file from elsewhere could use, before anything is made of the file.

    Those are references to other things than settings, such as ${oc.env:HOME}; aliases, of which a few lines make
    billions of values; deep nesting; numbers of thousands of digits; and Hydra's own settings, which load code.
    """
    import yaml

    depth = 0
    try:
        content = path.read_text(encoding="utf-8")
        for event in yaml.parse(content):
            line = f"{path} line {event.start_mark.line + 1}"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
                raise ConfigError(f"{line}: aliases (*name) and deep nesting are not read: write the value itself.")
            text = event.value if isinstance(event, yaml.ScalarEvent) else ""
            if found := re.search(r"\$\{\s*[\w.]+\s*:", text):
                raise ConfigError(f"{line}: {found[0]}...}} is not read, only settings can be referred to, ${{name}}.")
        settings = yaml.safe_load(content)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path} is not YAML: line {error.problem_mark.line + 1}: {error.problem}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if isinstance(settings, dict) and "hydra" in settings:
        raise ConfigError(f"{path}: hydra is not a setting; --help lists them.")


def memory_preset(name: str) -> MemoryConfig:
    """Returns the settings of a packaged conf/memory/NAME.yaml, without Hydra.

    Raises:
        ConfigError: there is none of that name.
    """
    from yaml import safe_load

    folder = packaged_folder() / "memory"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"memory={name} does not exist: use one of {', '.join(known)}.")
    return MemoryConfig(**safe_load((folder / f"{name}.yaml").read_text())["memory"])


def find_config(name: str) -> Path:
    """Returns the file that a conf=NAME stands for.

    Raises:
        ConfigError: there is none; the nearest name is given.
    """
    local = Path("conf")
    for path in (local / f"{name}.yaml", packaged_folder() / f"{name}.yaml", Path(name)):
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            return path
    known = sorted({p.stem for folder in (local, packaged_folder()) for p in folder.glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"; did you mean conf={near[0]}?" if near else f": use one of {', '.join(known)} or the path of a .yaml file."
    )
    raise ConfigError(f"conf={name} is neither conf/{name}.yaml here, nor a packaged file, nor a path{hint}")


def check_override(override: str) -> str:
    """Checks one `key=value` and quotes its value where it is text, so that prompts and paths need no quoting.

    Raises:
        ConfigError: no `=`, or an unknown key; the nearest real one is given.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is no setting: settings are written key=value, for example train.steps=500.")
    keys = known_keys()
    if key not in keys and key not in GROUPS:
        raise ConfigError(f"{key} is not a setting{nearest(key, [*keys, *GROUPS])}")
    if key in GROUPS:
        options = sorted(p.stem for folder in (Path("conf"), packaged_folder()) for p in (folder / key).glob("*.yaml"))
        if value not in options:
            raise ConfigError(f"{key}={value} does not exist: use one of {', '.join(sorted(set(options)))}.")
        return override
    is_text = keys[key] in (str, str | None) or (keys[key] is Any and not re.match(r"[\[\d.+-]", value))
    if key in ("sample.prompt", "sample.negative_prompt"):
        # A prompt says what it says: ${...} in it is no reference to a setting.
        value = value.replace("${", "\\${")
    if is_text and value != "null":
        value = _quote(value)
    return f"{key}={value}"


def nearest(key: str, known: Iterable[str]) -> str:
    """Returns a hint at the known key that is most like `key`, or at where to find them all."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near = near or [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    return f"; did you mean {near[0]}?" if near else "; --help lists them."


def _quote(text: str) -> str:
    # A backslash is special to Hydra only in front of a quote.
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def _explain(error: BaseException, path: Path, overrides: list[str]) -> str:
    """Turns an error of Hydra, OmegaConf or YAML into one line that names the key and says what it takes."""
    from yaml import MarkedYAMLError

    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    if isinstance(chain[-1], MarkedYAMLError) and chain[-1].problem_mark:
        return f"{path} is not YAML: line {chain[-1].problem_mark.line + 1}: {chain[-1].problem}."
    text = next((str(e) for e in reversed(chain) if "full_key:" in str(e)), str(error)).strip()
    keys = known_keys()
    full_key = re.search(r"full_key: (\S+)", text)
    key = full_key[1] if full_key else None
    # Where it is a pattern that is named, its setting is what is known.
    key = next((known for known in PATTERN_KEYS if key and key.startswith(known)), key)
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", text)
    if unknown:
        key = key or unknown[1]
        return f"{path}: {key} is not a setting{nearest(key, keys)}"
    given = next((o for o in overrides if key and o.partition("=")[0] == key), None)
    if key in keys:
        got = re.search(r"Value '(.*?)' of", text)
        given = given or f"{path}: {key}{'=' + got[1] if got else ''}"
        return f"{given} does not fit: it takes {TYPE_NAMES.get(keys[key], 'another value')}."
    section = re.search(r"not a subclass of (\w+)Config", text)
    if section:
        name = section[1].lower()
        return (
            f"{path}: {name} is a section: choose its file by {name}=NAME, or by `override {name}: NAME` in defaults."
        )
    return f"{path}: {text.splitlines()[0].rstrip('.')}: `mochi-tune train --help` shows every setting."


def config_yaml(config: RunConfig) -> str:
    """Returns the resolved settings as YAML; a path that `conf=` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def weights_folder(config: RunConfig) -> Path:
    """Returns the folder of the weights; "package:NAME" stands for one that is shipped with mochi-tune."""
    kind, colon, name = config.model.weights.partition(":")
    if kind == "package" and colon:
        from mochi_tune import assets

        return Path(assets.__path__[0]) / name
    return Path(config.model.weights).expanduser()
