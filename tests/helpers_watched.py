"""Jobs for a child process that is watched: some that misbehave."""

import os
import signal
import time
from pathlib import Path

from mochi_tune.errors import DataError


def count(path: Path, number: int):
    for each in range(number):
        yield {"path": str(path), "number": each}


def fail(path: Path, how: str):
    yield {}
    if how == "data":
        raise DataError(f"{path}: is damaged")
    if how == "disk":
        raise OSError(28, "No space left on device", str(path))
    if how == "bug":
        raise KeyError("unexpected")
    if how == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)
