"""Signals that ask a program to stop, or to save."""

import signal
import time

# Slurm and systemd signal every process of a job, and a launcher passes the signal on: it comes twice.
REPEAT_SECONDS = 2.0


class Interrupted(Exception):
    """Raised between two pieces of long work, to end it because the program was asked to stop."""


class StopSignal:
    """Records the first SIGINT or SIGTERM, so that work under way can end in order.

    One that comes more than REPEAT_SECONDS later ends the program.
    """

    def __init__(self) -> None:
        self.received, self._received_at = 0, 0.0
        self._former = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > REPEAT_SECONDS:
            self.release()
            signal.raise_signal(number)

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
