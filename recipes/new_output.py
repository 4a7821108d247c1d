"""Checks of the files and folders that recipes write and never overwrite."""

from pathlib import Path

from mochi_tune.errors import ConfigError
from mochi_tune.files import remove_left_behind


def check_new(out: Path, hint: str = "") -> None:
    """Refuses an output that exists; removes what killed processes left of a new one.

    Args:
        out: file or folder to be written.
        hint: sentence to add to the message.

    Raises:
        ConfigError: `out` exists, or is a link.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"out={out} exists and is never overwritten: choose another name or remove it.{hint}")
    remove_left_behind(out.parent, out.name)


def check_new_file(out: Path, suffix: str) -> None:
    """Refuses an output file that exists or does not end in `suffix`.

    Raises:
        ConfigError: `out` is such a file.
    """
    if out.suffix != suffix:
        raise ConfigError(f"out={out} must end in {suffix}: use {out.stem or 'adapter'}{suffix}.")
    check_new(out)


def make_parent(out: Path) -> None:
    """Makes the folder of an output file.

    Raises:
        ConfigError: the folder cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out}: its folder cannot be made ({error.strerror}): choose another one.") from error
