"""W&B, TensorBoard and trackio, as the trainer sees them: a follower process reads the run's JSONL files for them.

The files are the record. The trainer never waits for a tracker, and an outage, a hang or a full disk of one costs the
run a line. The follower ends when the trainer does, as a pipe between them then closes. See follower.py.
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mochi_tune.errors import ConfigError
from mochi_tune.training.follower import kill_all
from mochi_tune.training.metrics import write_line

if TYPE_CHECKING:
    from mochi_tune.config.schema import LogConfig

# How long after its failure a tracker is started again.
RETRY_SECONDS = 600
WANDB_LOGIN = "import wandb; wandb.setup(wandb.Settings(silent=True)); wandb.login(verify=False)"


def check_trackers(log: "LogConfig") -> None:
    """Checks what the trackers need on this machine, without a network.

    Raises:
        ConfigError: a package is not installed, or W&B knows no login.
    """
    for kind, value in _wanted(log).items():
        if importlib.util.find_spec(kind) is None:
            package = "'mochi-tune[trackio]'" if kind == "trackio" else kind
            raise ConfigError(f"log.{kind}={value} needs a package that is not installed: run pip install {package}.")
    if log.wandb == "online":
        # W&B looks for a login in several places. Without a terminal it does not ask for one.
        command = [sys.executable, "-c", WANDB_LOGIN]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, start_new_session=True, capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2].partition(": ")[2].rstrip(".")
            raise ConfigError(f"log.wandb=online: {reason}: run `wandb login`, or use log.wandb=offline.")


class Trackers:
    """The trackers of a run: no call waits for one or raises for one, but `close` waits a bounded time.

    `close`, which the end of the context calls, lets them take the last rows.
    """

    def __init__(
        self,
        run_dir: Path,
        last_step: int,
        name: str,
        settings: Mapping[str, object],
        log: "LogConfig",
        close_seconds: float = 20.0,
    ) -> None:
        """Starts the follower; the run's JSONL files are there already.

        Args:
            run_dir: the run's folder.
            last_step: of the checkpoint that the run goes on from; 0 begins a new run in every tracker.
            name: the run's name in the trackers.
            settings: of the run, which the trackers display.
            log: which trackers, and their project.
            close_seconds: how long the end waits for all of them together.
        """
        self.run_dir, self.close_seconds = run_dir, close_seconds
        self.options = {
            # A new run is another one to the trackers than what was in this folder before.
            "begun": secrets.token_hex(8) if last_step == 0 else None,
            **{"name": name, "project": log.project, "wandb": log.wandb, "close_seconds": close_seconds},
            # An argument of a process is 128 KiB long at most.
            "settings": {key: _short(value) for key, value in settings.items()},
        }
        self._followers: list[_Follower] = []
        self._has_failed: set[str] = set()
        self._retry_at: dict[str, float] = {}
        if wanted := _wanted(log):
            self._start(wanted)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Writes a line if a tracker has failed, and starts it again ten minutes later; takes microseconds."""
        self._read_reports()
        if due := [kind for kind, seconds in self._retry_at.items() if time.monotonic() >= seconds]:
            # The follower goes on with the others, and a process of their own is new for these.
            self._start(due)

    def close(self) -> None:
        """Lets the trackers take the last rows; ends one that takes too long, and writes a line."""
        for follower in self._followers:
            follower.stdin.close()
        started, has_warned = time.monotonic(), False
        while busy := self._read_reports():
            waited = time.monotonic() - started
            if waited > self.close_seconds:
                break
            if waited > 5 and not has_warned:
                write_line(f"waiting up to {self.close_seconds:g} s for {' and '.join(busy)} to take the last rows")
                has_warned = True
            time.sleep(0.05)
        for follower in self._followers:
            kill_all(psutil.Process(follower.process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):  # A process that waits for a dead disk stays.
                follower.process.wait(1)
            for kind in follower.kinds:
                self._fail(kind, f"it did not take the last rows within {self.close_seconds:g} s")
        self._followers.clear()
        self._retry_at.clear()

    def _start(self, kinds: Iterable[str]) -> None:
        kinds = list(kinds)
        for kind in kinds:
            self._retry_at.pop(kind, None)
        try:
            self._followers.append(_Follower(self.run_dir, kinds, self.options))
        except OSError as error:
            for kind in kinds:
                self._fail(kind, str(error))

    def _read_reports(self) -> list[str]:
        """Takes note of the trackers that have failed; returns those that are still at work."""
        for follower in self._followers:
            for kind, reason in follower.failures().items():
                self._fail(kind, reason)
        self._followers = [follower for follower in self._followers if follower.process.returncode is None]
        return [kind for follower in self._followers for kind in follower.kinds or ["the trackers"]]

    def _fail(self, kind: str, reason: str) -> None:
        if kind not in self._has_failed:
            rows = self.run_dir / "metrics.jsonl"
            write_line(f"log.{kind} stopped ({reason}): the run goes on without it; its record is {rows}")
        self._has_failed.add(kind)
        self._retry_at[kind] = time.monotonic() + RETRY_SECONDS


class _Follower:
    """A follower process and the trackers in it that have not ended."""

    def __init__(self, run_dir: Path, kinds: list[str], options: Mapping) -> None:
        self.kinds, self.log, self._rest = kinds, run_dir / "trackers" / "follower.log", b""
        self.log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mochi_tune.training.follower", os.fspath(run_dir.absolute())]
        command += [",".join(kinds), json.dumps(options, default=str)]
        with open(self.log, "ab") as log:
            # In a session of its own: a Ctrl-C is for the trainer, which then stops in order.
            self.process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert self.process.stdin and self.process.stdout
        self.stdin, self._reports = self.process.stdin, self.process.stdout
        os.set_blocking(self._reports.fileno(), False)

    def failures(self) -> dict[str, str]:
        """Returns the trackers that have failed since the last call, and why."""
        # Asked before the pipe is read, which then holds all that the process has written.
        code = self.process.poll()
        *lines, self._rest = (self._rest + (self._reports.read(1 << 16) or b"")).split(b"\n")
        ended = dict(json.loads(line) for line in lines)
        self.kinds = [kind for kind in self.kinds if kind not in ended]
        if code is not None:
            died = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, see {self.log}"
            ended |= dict.fromkeys(self.kinds, died)
            self.kinds = []
        return {kind: reason for kind, reason in ended.items() if reason}


def _wanted(log: "LogConfig") -> dict[str, str]:
    values = {"wandb": log.wandb, "tensorboard": log.tensorboard, "trackio": log.trackio}
    return {kind: str(value).lower() for kind, value in values.items() if value not in ("disabled", False)}


def _short(value: object) -> object:
    return value if len(str(value)) <= 200 else f"{str(value)[:200]}..."
