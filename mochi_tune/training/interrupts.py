"""Signals that ask a program to stop, or to save."""

import signal


class Interrupted(Exception):
    """Raised between two pieces of long work, to end it because the program was asked to stop."""


class StopSignal:
    """Records the first SIGINT or SIGTERM, so that work under way can end in order; a second one ends the program."""

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
        """Restores the former handlers of both signals."""
        for number, handler in self._former.items():
            signal.signal(number, handler)


class StopAndSaveSignals(StopSignal):
    """Records also each SIGUSR1, which asks for a save."""

    def __init__(self) -> None:
        super().__init__()
        self._save_requested = False
        self._former_save = signal.signal(signal.SIGUSR1, self._receive_save)

    def __enter__(self) -> "StopAndSaveSignals":
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        signal.signal(signal.SIGUSR1, self._former_save)

    def _receive_save(self, _number: int, _frame: object) -> None:
        self._save_requested = True

    def take(self) -> tuple[int, bool]:
        """Returns the signal that asks for a stop (0: none), and whether a save was asked for since the last call."""
        requested, self._save_requested = self._save_requested, False
        return self.received, requested
