"""Parses the values of verbs that have no configuration file; what does not fit is a ConfigError that names its key."""

import math
import re
from pathlib import Path

from mochi_tune.errors import ConfigError


def whole_number(key: str, text: str, lowest: int) -> int:
    """Returns a whole number of at least `lowest`."""
    if not text.isdecimal() or int(text) < lowest:
        raise ConfigError(f"{key}={text} does not fit: it takes a whole number of at least {lowest}.")
    return int(text)


def positive_number(key: str, text: str) -> float:
    """Returns a finite number above 0."""
    value = _read_number(text)
    if not 0 < value < math.inf:
        raise ConfigError(f"{key}={text} does not fit: it takes a number above 0.")
    return value


def number(key: str, text: str, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """Returns a finite number from `lowest` to `highest`."""
    value = _read_number(text)
    if not lowest <= value <= highest or math.isinf(value):
        limits = f" of at least {lowest:g}" if math.isinf(highest) else f" from {lowest:g} to {highest:g}"
        raise ConfigError(
            f"{key}={text} does not fit: it takes a number{' such as 0.8' if math.isinf(lowest) else limits}."
        )
    return value


def true_or_false(key: str, text: str) -> bool:
    """Returns whether the text is "true"; it must be "true" or "false"."""
    if text not in ("true", "false"):
        raise ConfigError(f"{key}={text} is not possible: use true or false.")
    return text == "true"


def hub_address(text: str) -> str | None:
    """Returns the address of another hub; None for an empty text."""
    if text and not re.fullmatch(r"https?://[^\s/]\S*", text):
        raise ConfigError(f"endpoint={text} is not an address: use one like https://huggingface.co.")
    return text or None


def user_path(text: str) -> Path:
    """Returns a path, with ~ as the home folder."""
    return Path(text).expanduser()


def _read_number(text: str) -> float:
    """Returns the number that a text is; NaN, which is in no range, where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
