"""Signals that ask a program to stop, or to save."""

import signal
import threading
import time

# Seconds in which a repeated signal is ignored. Slurm and systemd signal every process of a job, and a launcher also
# forwards the signal, so that it arrives twice.
REPEAT_SECONDS = 2.0


class Interrupted(Exception):
    """Ends long work at a safe point after a signal asked the program to stop."""


class StopSignal:
    """Records the first SIGINT or SIGTERM, so that the current work can end in order.

    Another signal more than REPEAT_SECONDS later ends the program. Only the main thread can receive signals: in another
    one, nothing is recorded.
    """

    def __init__(self) -> None:
        self.received, self._received_at = 0, 0.0
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        self._former = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > REPEAT_SECONDS:
            self.release()
            signal.raise_signal(number)

    def received_for(self, seconds: float) -> bool:
        """Whether a signal was received at least so many seconds ago."""
        return self.received > 0 and time.monotonic() - self._received_at >= seconds

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Restores the previous handlers of the signals."""
        for number, handler in self._former.items():
            signal.signal(number, handler)


class StopAndSaveSignals(StopSignal):
    """Also records SIGUSR1, which asks for a save."""

    def __init__(self) -> None:
        super().__init__()
        self._save_requested = False
        if self._former:
            self._former[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._receive_save)

    def __enter__(self) -> "StopAndSaveSignals":
        return self

    def _receive_save(self, _number: int, _frame: object) -> None:
        self._save_requested = True

    def take(self) -> tuple[int, bool]:
        """Returns the signal that asked for a stop (0: none), and whether a save was requested since the last call."""
        requested, self._save_requested = self._save_requested, False
        return self.received, requested
