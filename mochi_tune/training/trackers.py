"""W&B, TensorBoard and trackio, each in a process of its own that follows the run's JSONL files.

The files are the record; a tracker reads them and sends their numbers on. So the trainer never waits for one, and what
befalls one (an outage, a hang, a full disk) befalls that process alone. It ends when the trainer does, as a pipe
between them then closes. This is the trainer's side; tracker_process.py is what runs there.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from mochi_tune.errors import ConfigError
from mochi_tune.training.metrics import write_line
from mochi_tune.training.tracker_process import REASON, kill_all

# How long the trainer leaves a tracker that has failed alone before it starts it again.
RETRY_SECONDS = 600
WANDB_LOGIN = "import wandb; wandb.setup(wandb.Settings(silent=True)); wandb.login(verify=False)"


def check_trackers(*, wandb: str = "disabled", tensorboard: bool = False, trackio: bool = False, **_: object) -> None:
    """Checks what a tracker needs on this machine, without a network.

    Args:
        wandb: disabled, offline or online.
        tensorboard: whether it is used.
        trackio: whether it is used.

    Raises:
        ConfigError: its package is not installed, or W&B knows no login.
    """
    for kind, value in _wanted(wandb, tensorboard, trackio).items():
        if importlib.util.find_spec(kind) is None:
            package = "'mochi-tune[trackio]'" if kind == "trackio" else kind
            raise ConfigError(f"log.{kind}={value} needs a package that is not installed: run pip install {package}.")
    if wandb == "online":
        # W&B looks for a login in several places. Without a terminal it does not ask for one.
        command, options = [sys.executable, "-c", WANDB_LOGIN], {"stdin": subprocess.DEVNULL, "start_new_session": True}
        done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2].partition(": ")[2].rstrip(".")
            raise ConfigError(f"log.wandb=online: {reason}: run `wandb login`, or use log.wandb=offline.")


class Trackers:
    """The trackers of a run, seen from its trainer: none of the calls waits for one or raises for one, but `close`.

    `close`, which the end of the context calls, waits a bounded time for the last rows to be taken.
    """

    def __init__(
        self,
        run_dir: Path,
        last_step: int,
        name: str,
        settings: Mapping[str, object],
        *,
        wandb: str = "disabled",
        tensorboard: bool = False,
        trackio: bool = False,
        project: str = "mochi-tune",
        close_seconds: float = 20.0,
    ) -> None:
        """Starts a process for each, once the run's JSONL files are open.

        Args:
            run_dir: the run's folder.
            last_step: of the checkpoint that the run goes on from; 0 begins a new run in every tracker.
            name: the run's name there.
            settings: of the run, to be shown there.
            wandb: disabled, offline or online.
            tensorboard: whether to write event files to run_dir/trackers/tensorboard.
            trackio: whether to log to trackio.
            project: the project's name in W&B and trackio.
            close_seconds: how long the end waits for all of them together.
        """
        self.run_dir, self.close_seconds = run_dir, close_seconds
        self.running: dict[str, subprocess.Popen] = {}
        self._failed_at: dict[str, float] = {}
        options = {
            # A new run is another one to the trackers than what was in this folder before.
            "begun": secrets.token_hex(8) if last_step == 0 else None,
            **{"name": name, "project": project, "wandb": wandb, "close_seconds": close_seconds},
            # An argument of a process is 128 KiB long at most.
            "settings": {key: _short(value) for key, value in settings.items()},
        }
        program = [sys.executable, "-m", "mochi_tune.training.tracker_process", os.fspath(run_dir.absolute())]
        wanted = _wanted(wandb, tensorboard, trackio)
        self._commands = {kind: [*program, kind, json.dumps(options, default=str)] for kind in wanted}
        for kind in self._commands:
            self._start(kind)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Says in a line that a tracker has failed, and starts it again ten minutes later; microseconds otherwise."""
        for kind in self._commands:
            if kind not in self.running:
                if time.monotonic() - self._failed_at[kind] >= RETRY_SECONDS:
                    self._start(kind)
            elif self.running[kind].poll() is not None:
                self._fail(kind, self._reason(kind))

    def close(self) -> None:
        """Lets the trackers take the last rows and end; one that takes too long is ended, and a line says so."""
        self.check()
        for process in self.running.values():
            process.stdin.close()
        started, has_told = time.monotonic(), False
        while busy := [kind for kind, process in self.running.items() if process.poll() is None]:
            waited = time.monotonic() - started
            if waited > self.close_seconds:
                break
            if waited > 5 and not has_told:
                write_line(f"waiting up to {self.close_seconds:g} s for {' and '.join(busy)} to take the last rows")
                has_told = True
            time.sleep(0.05)
        for kind in list(self.running):
            if kind in busy:
                kill_all(psutil.Process(self.running[kind].pid))
                with contextlib.suppress(subprocess.TimeoutExpired):  # A process in a dead disk's hands stays.
                    self.running[kind].wait(1)
                self._fail(kind, f"it did not take the last rows within {self.close_seconds:g} s")
            elif self.running[kind].returncode:
                self._fail(kind, self._reason(kind))
        self.running.clear()
        self._commands.clear()

    def _start(self, kind: str) -> None:
        try:
            self._log(kind).parent.mkdir(exist_ok=True)
            self._log(kind).write_bytes(b"")
            with open(self._log(kind), "ab") as log:
                # In a session of its own: a Ctrl-C is for the trainer, which then stops in order.
                self.running[kind] = subprocess.Popen(
                    self._commands[kind], stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            self._fail(kind, str(error))

    def _fail(self, kind: str, reason: str) -> None:
        self.running.pop(kind, None)
        if kind not in self._failed_at:
            rows = self.run_dir / "metrics.jsonl"
            write_line(f"log.{kind} stopped ({reason}): the run goes on without it; its record is {rows}")
        self._failed_at[kind] = time.monotonic()

    def _reason(self, kind: str) -> str:
        with contextlib.suppress(OSError):
            for line in reversed(self._log(kind).read_text(errors="replace").splitlines()):
                if line.startswith(REASON):
                    return line.removeprefix(REASON)
        code = self.running[kind].returncode
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, see {self._log(kind)}"

    def _log(self, kind: str) -> Path:
        return self.run_dir / "trackers" / f"{kind}.log"


def _wanted(wandb: str, tensorboard: bool, trackio: bool) -> dict[str, str]:
    wanted = {"wandb": wandb, "tensorboard": str(tensorboard).lower(), "trackio": str(trackio).lower()}
    return {kind: value for kind, value in wanted.items() if value not in ("disabled", "false")}


def _short(value: object) -> object:
    return value if len(str(value)) <= 200 else f"{str(value)[:200]}..."
