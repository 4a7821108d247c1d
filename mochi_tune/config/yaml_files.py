"""Checks all configuration files of a run before Hydra composes them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mochi_tune.config.references import check_references
from mochi_tune.config.settings import GROUPS, known_keys
from mochi_tune.errors import ConfigError

MAX_YAML_DEPTH = 20
# The name of a file in `defaults`, with its group. None contains "..", "@" or a reference, or is one of Hydra's own.
_PLAIN_NAME = re.compile(r"/?(?!hydra(?:/|$))\w[\w .+-]*(?:/\w[\w .+-]*)*")


def check_yaml(path: Path) -> Any:
    """Refuses YAML that is dangerous in a file from an untrusted source, and text that YAML would change silently.

    Dangerous are references other than to settings, such as ${oc.env:HOME}; aliases, with which a few lines expand to
    billions of values; deep nesting; numbers of thousands of digits; and Hydra's own settings, which load code. YAML
    changes text without quotes that reads as a number: a name of 007 would be 7.

    Returns:
        The content of the file.
    """
    import yaml

    depth = 0
    try:
        content = path.read_text(encoding="utf-8")
        for event in yaml.parse(content):
            line = f"{path} line {event.start_mark.line + 1}"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
                raise ConfigError(f"{line}: aliases (*name) and deep nesting are not allowed: write the value itself.")
            text = event.value if isinstance(event, yaml.ScalarEvent) else ""
            check_references(text, line)
            if text == "???" and event.style is None:
                raise ConfigError(f"{line}: ??? is not a value: write one, or leave the setting out.")
        settings = yaml.safe_load(content)
        _check_texts(path, yaml.compose(content), "" if "@package _global_" in content else _group_of(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path} is not YAML: {describe_yaml_error(error)}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if isinstance(settings, dict) and "hydra" in settings:
        raise ConfigError(f"{path}: hydra is not a setting; --help all lists them.")
    return settings


def read_plain_yaml(text: str) -> Any:
    """Returns the content of a YAML text without aliases, with which a few lines expand to billions of values.

    Raises:
        YAMLError: it is not YAML, or has an alias.
    """
    import yaml

    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
        raise yaml.YAMLError("aliases (*name) are not allowed")
    return yaml.safe_load(text)


def describe_yaml_error(error: Any) -> str:
    """Returns the line and the reason of an error of PyYAML."""
    return f"line {error.problem_mark.line + 1}: {error.problem}" if error.problem_mark else str(error.problem)


def included_names(path: Path, content: Any) -> Iterator[str]:
    """Yields the names in the `defaults` of a configuration file, such as "base" or "model/tiny".

    Raises:
        ConfigError: `defaults` is not a list, or a name is not a plain one. Hydra takes others, such as base.yaml,
            model@train: tiny or the content of a variable, but the file that it reads then would not be checked.
    """
    entries = content.get("defaults") if isinstance(content, dict) else None
    if not isinstance(entries, list | None):
        raise ConfigError(f"{path}: defaults must be a list, got {entries}: write defaults: [base, _self_].")
    for entry in entries or ():
        for key, value in entry.items() if isinstance(entry, dict) else [("", entry)]:
            group = re.sub(r"^((override|optional) +)*", "", str(key))
            for each in value if isinstance(value, list) else [value]:
                name = f"{group}/{each}" if key else str(each)
                # Hydra reads nothing for null.
                if each is None or (key == "" and each == "_self_"):
                    continue
                if name == "run_schema":
                    raise ConfigError(
                        f"{path} is a base.yaml of mochi-tune 0.1.0, which hides the packaged one: move what you "
                        "changed in it into your own file, and delete it."
                    )
                if not _PLAIN_NAME.fullmatch(name) or re.search(r"(?i)\.ya?ml$", name):
                    raise ConfigError(
                        f"{path}: {name} in defaults is not possible: write the plain name of a file, such as base or "
                        "model: tiny."
                    )
                yield name


def included_files(names: Iterable[str], parent: str, folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yields the files of some names, each with its group, "" for none.

    Args:
        names: names, see `included_names`. One that starts with "/" does not depend on `parent`.
        parent: group of the file that includes them.
        folders: folders to search. A file hides those of its name in later folders, which are checked all the same.
    """
    for name in names:
        whole = name.removeprefix("/") if name.startswith("/") or not parent else f"{parent}/{name}"
        for file in (folder / f"{whole}.yaml" for folder in folders):
            if file.is_file():
                yield file, whole.rpartition("/")[0]


def _group_of(path: Path) -> str:
    return f"{path.parent.name}." if path.parent.name in GROUPS else ""


def _check_texts(path: Path, node: Any, key: str) -> None:
    """Refuses text without quotes that YAML reads as a number and that would be written differently."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = f"{key}{name.value}"
            _check_texts(path, value, f"{inner}." if isinstance(value, yaml.MappingNode) else inner)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_texts(path, value, key)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and re.match(r"[-+.\d]", node.value):
        setting = known_keys().get(key)
        if setting is not None and setting.takes_text and (number := _as_number(node.value)) is not None:
            line = node.start_mark.line + 1
            raise ConfigError(
                f"{path} line {line}: {node.value} is read as the number {number}: put the text in quotes, "
                f'"{node.value}".'
            )


def _as_number(text: str) -> int | float | None:
    """Returns the number that a text without quotes is read as, if it would be written differently; else None."""
    from omegaconf import OmegaConf

    value = OmegaConf.create(f"- {text}")[0]
    return value if isinstance(value, int | float) and str(value) != text else None
