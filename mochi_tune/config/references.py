"""References to settings in the texts of a conf, such as `${name}`: which are allowed, and how many."""

import re
from collections.abc import Iterator
from typing import Any

from mochi_tune.config.settings import known_keys
from mochi_tune.errors import ConfigError

# References can lead to texts with further ones. 20 of them expand to at most 3 ** (20 / 3), about 1500, pieces.
MAX_REFERENCES = 20
# After an odd number of backslashes it is text.
_START = re.compile(r"(?<!\\)(?:\\\\)*(\$\{)")
_REFERENCE = re.compile(r"\$\{[ \t]*([\w.]+)[ \t]*\}")


def check_references(text: str, where: str) -> None:
    """Refuses `${...}` other than the name of a setting, such as ${oc.env:HOME}, which reads the environment.

    Args:
        text: text of a setting.
        where: place of the text, for the message.

    Raises:
        ConfigError: a reference is not to a setting.
    """
    for start in _START.finditer(text):
        reference = _REFERENCE.match(text, start.start(1))
        if reference is None or reference[1] not in known_keys():
            shown = text[start.start(1) :].partition("}")
            raise ConfigError(
                f"{where}: {(shown[0] + shown[1])[:60]} is not the name of a setting, as ${{name}} is: write \\${{ "
                "where it is text."
            )


def check_number_of_references(trees: list[Any]) -> None:
    """Refuses settings with so many references that they might expand to billions of texts.

    Args:
        trees: the content of each file, and the given values. Each composition step resolves references, so this
            counts those of settings that another file overrides, too.

    Raises:
        ConfigError: there are more than MAX_REFERENCES.
    """
    number = sum(len(_START.findall(text)) for text in texts_in(trees))
    if number > MAX_REFERENCES:
        raise ConfigError(
            f"the settings and the files that they build on have {number} references such as ${{name}}, the maximum "
            f"is {MAX_REFERENCES}: write the values themselves."
        )


def texts_in(tree: Any) -> Iterator[str]:
    """Yields all texts in lists and mappings."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from texts_in(each)


def escape_references(value: Any) -> Any:
    """Returns a value with ${...} in its texts escaped, so that it does not refer to a setting."""
    if isinstance(value, dict):
        return {key: escape_references(each) for key, each in value.items()}
    if isinstance(value, list):
        return [escape_references(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
