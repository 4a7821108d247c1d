"""Has a function wait until a test lets it go on."""

import importlib
import itertools
import os
import time
from collections.abc import Sequence


def hold(place: str, hold_at: Sequence[int], log: str) -> None:
    """Has a function of a module wait in some of its calls; what it does stays what it is.

    Args:
        place: "module:function"; modules that have imported it by name already keep the one that does not wait.
        hold_at: the numbers of these calls, from 1; the n-th of them waits until the file LOG.release_n exists.
        log: of the process, see helpers_process.Program.
    """
    module_name, _, name = place.partition(":")
    module = importlib.import_module(module_name)
    function, calls, holds = getattr(module, name), itertools.count(1), itertools.count(1)

    def held(*arguments, **options):
        if next(calls) in hold_at:
            release = f"{log}.release_{next(holds)}"
            os.write(2, f"held: {name}\n".encode())
            while not os.path.exists(release):
                time.sleep(0.005)
        return function(*arguments, **options)

    setattr(module, name, held)
