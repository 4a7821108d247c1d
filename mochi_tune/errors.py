"""Errors that a user can cause, and functions that format their messages.

Each message is one line that says what is wrong, what was given, what is allowed and what to do.
"""

import codecs
from collections.abc import Iterable

# Tabs and all characters that end a line.
_BREAKS = "\t\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"

# Number of leading bytes that `name_stand_in` needs.
STAND_IN_BYTES = 256


class MochiTuneError(Exception):
    """An error that a user can cause; the command line prints its one line without a traceback and exits with 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(MochiTuneError):
    """A setting is unknown, has the wrong type or does not fit another one."""


class DataError(MochiTuneError):
    """A video, a caption or a cache cannot be used."""


class CheckpointError(MochiTuneError):
    """Weights, an adapter or a checkpoint are missing, damaged or made for another model."""


class TrainingError(MochiTuneError):
    """A run cannot continue: its loss is not a number, or it would resume as a different run."""


class ParallelError(MochiTuneError):
    """A number of processes, or a division of the work between them, is not possible."""


def printable(text: str) -> str:
    """Returns a text from elsewhere as one line that is safe to print to a terminal.

    Control characters are escaped, as "\\x1b", and so are unusual spaces, as "\\u202f".
    """
    return "".join(c if c.isprintable() else " " if c in _BREAKS else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """Returns the message of another library's error in one line of at most 200 characters.

    The advice of HTTP libraries is left out; an error without a message gives the name of its class.
    """
    text = " ".join(str(error).split()).partition(" For more information")[0]
    return text[:200] or type(error).__name__


def some(items: Iterable[str], separator: str = ", ", limit: int = 4) -> str:
    """Joins the first `limit` items for a message and counts the rest."""
    items = list(items)
    text = printable(separator.join(items[:limit]))
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def counted(number: int, noun: str) -> str:
    """Returns "1 clip", "2 clips" and the like."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_bytes(num_bytes: int) -> str:
    """Returns a size in GiB, MiB or kB, with its unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes / 1000:.3g} kB"


def name_stand_in(start: bytes) -> str:
    """Recognises what a failed download leaves instead of a file: a web page or a Git LFS pointer.

    Args:
        start: the first STAND_IN_BYTES of the file.

    Returns:
        What the file is, with an article, or "" if it is neither.
    """
    text = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "a web page, such as a login or an error page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which `git lfs pull` replaces by the file"
    return ""


def find_lone_surrogate(text: str) -> str | None:
    """Returns the first lone surrogate of a text, escaped, or None; JSON can hold one, but no encoding can."""
    return next((f"\\u{ord(c):04x}" for c in text if "\ud800" <= c <= "\udfff"), None)
