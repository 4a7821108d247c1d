"""Progress: a bar on a terminal, plain lines elsewhere."""

import io
import os
import pty
import sys
import termios
from types import SimpleNamespace

from mochi_tune.training import progress
from mochi_tune.training.progress import NUM_LINES, Progress
from mochi_tune.training.step_result import StepResult


def walk(first: int, last: int, num_steps: int, is_main: bool = True) -> None:
    with Progress(num_steps, first, is_main) as progress:
        for step in range(first + 1, last + 1):
            progress.show(StepResult(step, 0.5, 1.25, 2e-4, [], [], 0, False), 0.75)


def test_without_a_terminal_there_are_plain_lines_and_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", text := io.StringIO())
    walk(0, 1000, 1000)
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("step 1/1000: loss 0.5000, norm 1.250, lr 2.0e-04, 0.75 s/step, ")
    assert (
        lines[0].endswith(" left") and lines[-1] == "step 1000/1000: loss 0.5000, norm 1.250, lr 2.0e-04, 0.75 s/step"
    )
    assert [line.split("/")[0] for line in lines[1:]] == [f"step {step}" for step in range(10, 1001, 1000 // NUM_LINES)]
    assert "\r" not in text.getvalue() and "%" not in text.getvalue()


def test_a_resumed_run_tells_of_its_first_step_and_of_the_last(monkeypatch):
    monkeypatch.setattr(sys, "stderr", text := io.StringIO())
    walk(503, 507, 1000)
    walk(203, 207, 207)
    assert [line.split(":")[0] for line in text.getvalue().splitlines()] == [
        "step 504/1000", "step 204/207", "step 206/207", "step 207/207",
    ]  # fmt: skip


def test_the_time_left_is_that_of_steps_since_the_resume(monkeypatch):
    monkeypatch.setattr(sys, "stderr", text := io.StringIO())
    seconds = iter([1000.0, 1060.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    walk(500, 501, 1000)
    # 499 minutes for 499 steps.
    assert text.getvalue().endswith(", 8.3 hours left\n")


def test_on_a_terminal_there_is_a_bar_and_no_lines(monkeypatch):
    master, slave = pty.openpty()
    # A new pseudo-terminal has size 0.
    termios.tcsetwinsize(slave, (24, 120))
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        walk(0, 5, 5)
        terminal.flush()
        shown = ""
        while "5/5" not in shown:
            # Reads what was written so far, in parts.
            shown += screen.read(1 << 16).decode()
        monkeypatch.undo()
    assert "train:" in shown and "5/5" in shown and "loss 0.5000" in shown and "step 1/5" not in shown


def test_other_processes_write_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", text := io.StringIO())
    walk(0, 5, 5, is_main=False)
    assert text.getvalue() == ""
