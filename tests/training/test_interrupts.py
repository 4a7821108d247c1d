"""Signals in the main thread and in others."""

import signal
import threading

from mochi_tune.training.interrupts import StopAndSaveSignals, StopSignal


def test_the_handlers_are_those_of_before_again():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopAndSaveSignals() as signals:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert signals.take() == (signal.SIGTERM, True) and signals.take() == (signal.SIGTERM, False)
    assert [signal.getsignal(number) for number in numbers] == before


def test_another_thread_works_without_signals():
    found = []

    def work() -> None:
        with StopAndSaveSignals() as signals, StopSignal() as stop:
            found.append((signals.take(), stop.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [((0, False), 0)]
