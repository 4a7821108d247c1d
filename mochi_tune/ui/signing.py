"""The signature of a job, by which the page recognises jobs that its user has started.

The records of jobs lie in the folder of the page, which may come from somebody else.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from mochi_tune.errors import ConfigError
from mochi_tune.files import fsync, lock_file

# Path of the user's key in the home folder.
KEY = ".local/state/mochi_tune/key"
KEY_BYTES = 32


def read_key() -> bytes:
    """Returns the key of this user, and makes it if there is none.

    Raises:
        ConfigError: the home folder cannot be written.
    """
    try:
        path = Path.home() / KEY
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # From the beginning, no other user can read it.
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            # Two processes may make it at once.
            lock_file(file, fcntl.LOCK_EX)
            key = file.read()
            # A disk that lost power may leave zeros.
            if len(key) != KEY_BYTES or not any(key):
                key = secrets.token_bytes(KEY_BYTES)
                file.seek(0)
                file.truncate()
                file.write(key)
                file.flush()
                # A key that is lost would make strangers of the jobs that it signed.
                os.fsync(file.fileno())
                fsync(path.parent)
            return key
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"~/{KEY}, the key by which the page recognises its own jobs, cannot be made or read: {error}: set HOME to "
            "a folder of yours."
        ) from None


def sign(number: int, verb: str, arguments: Sequence[str]) -> str:
    """Returns the signature of a job as hex.

    Raises:
        ConfigError: as `read_key`.
    """
    text = json.dumps([number, verb, list(arguments)])
    return hmac.new(read_key(), text.encode(), hashlib.sha256).hexdigest()
