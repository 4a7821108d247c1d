"""Being asked to stop, or to save."""

import faulthandler
import signal
from collections.abc import Callable
from typing import Any


class Interrupted(Exception):
    """Raised between two pieces of a long work that is broken off because the run was asked to stop."""


class StopSignal:
    """Remembers a first Ctrl-C or SIGTERM, so that the work in hand is finished and saved; a second one is not held."""

    def __init__(self) -> None:
        self.received = 0
        self._former = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number: int, _frame: object) -> None:
        self.received = number
        self.release()

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives both signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)


class Signals(StopSignal):
    """Remembers also that SIGUSR1 asked for a save, as often as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self._save = False
        self._former_save = signal.signal(signal.SIGUSR1, self._receive_save)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        signal.signal(signal.SIGUSR1, self._former_save)

    def _receive_save(self, _number: int, _frame: object) -> None:
        self._save = True

    def take(self) -> tuple[int, int]:
        """Returns the signal that asks for a stop, 0 for none, and whether a save was asked for since the last time."""
        save, self._save = self._save, False
        return self.received, int(save)


class Attention:
    """What every rank looks at, together, between two pieces of work: has anyone been asked to save or to stop?"""

    def __init__(
        self, signals: Signals, gathered: Callable[[Any], list[Any]], save: Callable[[], None], watchdog_seconds: float
    ) -> None:
        """Prepares it.

        Args:
            signals: of this process.
            gathered: gives what every rank has given, on every rank.
            save: saves the step that the run stands at, unless it is saved already; all ranks call it.
            watchdog_seconds: a piece of work that takes longer is taken for hung: where it hangs is written to stderr.
                0: no work is.
        """
        self.signals = signals
        self.gathered = gathered
        self.save = save
        self.watchdog_seconds = watchdog_seconds

    def agreed(self, mine: Any = None) -> tuple[int, bool, list[Any]]:
        """Returns the signal that stops the run, whether to save, and what every rank has given as `mine`."""
        if self.watchdog_seconds:
            faulthandler.dump_traceback_later(self.watchdog_seconds)
        everyones = self.gathered((*self.signals.take(), mine))
        return (
            max(stop for stop, _, _ in everyones),
            any(save for _, save, _ in everyones),
            [each for _, _, each in everyones],
        )

    def __call__(self) -> None:
        """Saves if anyone was asked to.

        Raises:
            Interrupted: anyone was asked to stop.
        """
        stop, save, _ = self.agreed()
        if stop:
            raise Interrupted
        if save:
            self.save()
