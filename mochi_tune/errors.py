"""Mistakes that a user can make. Each is one line: what, got, allowed, do this; and what such lines are made of."""

from collections.abc import Iterable

# Tabs, and what may end a line.
BREAKS = "\t\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"


class MochiTuneError(Exception):
    """A user's mistake in one line; the command line prints it without a traceback and exits with 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(MochiTuneError):
    """A setting that is unknown, of the wrong type, or does not fit another one."""


class DataError(MochiTuneError):
    """A video, a caption or a cache that cannot be used."""


class CheckpointError(MochiTuneError):
    """Weights, an adapter or a checkpoint that is missing, damaged or made for another model."""


class TrainingError(MochiTuneError):
    """A run that must not go on: its loss is no number, or it would resume as another run."""


class ParallelError(MochiTuneError):
    """A number of processes, or a division of the work between them, that cannot be."""


def printable(text: str) -> str:
    """Returns a text of a foreign file in a line, as a terminal may have it.

    Escape sequences are written out, as "\\x1b", and spaces that look like the common one, as "\\u202f".
    """
    return "".join(c if c.isprintable() else " " if c in BREAKS else ascii(c)[1:-1] for c in text)


def some(items: Iterable[str], separator: str = ", ", limit: int = 4) -> str:
    """Joins the first items for a message of one line, and counts the rest."""
    items = list(items)
    text = printable(separator.join(items[:limit]))
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def counted(number: int, noun: str) -> str:
    """Returns "1 clip", "2 clips" and the like."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
