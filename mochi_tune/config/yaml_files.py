"""Checks all configuration files of a run before Hydra composes them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mochi_tune.config.settings import GROUPS, known_keys
from mochi_tune.errors import ConfigError

MAX_YAML_DEPTH = 20


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
            # After an odd number of backslashes it is text.
            if found := re.search(r"(?<!\\)(?:\\\\)*(\$\{\s*[\w.]+\s*:)", text):
                raise ConfigError(
                    f"{line}: {found[1]}...}} is not allowed: only settings can be referred to, as ${{name}}."
                )
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


def describe_yaml_error(error: Any) -> str:
    """Returns the line and the reason of an error of PyYAML."""
    return f"line {error.problem_mark.line + 1}: {error.problem}" if error.problem_mark else str(error.problem)


def included_files(content: Any, groups: Mapping[str, str], folders: Sequence[Path]) -> Iterator[Path]:
    """Yields the files in the `defaults` of a configuration file, and those of chosen groups.

    Args:
        content: content of the file.
        groups: the chosen file of each group.
        folders: folders to search, in order.
    """
    names = [f"{group}/{name}" for group, name in groups.items()]
    entries = content.get("defaults") if isinstance(content, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, str):
            names.append(entry.lstrip("/"))
        for key, value in entry.items() if isinstance(entry, dict) else ():
            group = str(key).split()[-1].partition("@")[0].lstrip("/")
            names += [f"{group}/{each}" for each in (value if isinstance(value, list) else [value])]
    for name in names:
        found = (folder / f"{name}.yaml" for folder in folders)
        if file := next((file for file in found if file.is_file()), None):
            yield file


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
