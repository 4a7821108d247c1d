"""Being asked to stop."""

import signal


class StopSignal:
    """Remembers a first Ctrl-C or SIGTERM, so that the step in hand is finished and saved; a second one is not held."""

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
