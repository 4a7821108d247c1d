"""A process that waits for its data when it is asked to stop."""

import signal
from types import SimpleNamespace

import pytest

from mochi_tune.errors import ParallelError
from mochi_tune.training import run
from mochi_tune.training.interrupts import Interrupted, StopAndSaveSignals


@pytest.mark.parametrize(("num_processes", "is_main"), [(1, True), (2, True), (2, False)])
def test_one_of_several_processes_waits_on_so_that_all_save_together(monkeypatch, num_processes, is_main):
    waiting, saves = object.__new__(run.Run), []
    waiting.accelerator = SimpleNamespace(num_processes=num_processes, is_main_process=is_main)
    waiting.optimizer, waiting.save = object.__new__(run.AdapterOptimizer), lambda: saves.append(1)
    with StopAndSaveSignals() as waiting._signals:
        waiting._check_while_waiting()
        signal.raise_signal(signal.SIGTERM)
        if num_processes == 1:
            with pytest.raises(Interrupted):
                waiting._check_while_waiting()
        else:
            waiting._check_while_waiting()
            monkeypatch.setattr(run, "STOP_WAIT_SECONDS", 0.0)
            with pytest.raises(ParallelError, match=r"asked to stop 0 s ago, but the data of the next step has not"):
                waiting._check_while_waiting()
    assert bool(saves) == is_main
