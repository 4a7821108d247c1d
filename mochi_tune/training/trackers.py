"""Starts and watches the process that sends metrics to W&B, TensorBoard and trackio.

That process, see follower.py, reads the JSONL files of the run. The trainer never waits for a tracker: if one fails or
hangs, the trainer prints a line and continues. The follower ends when the pipe from the trainer closes.
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
from typing import TYPE_CHECKING, Any

from mochi_tune.errors import ConfigError
from mochi_tune.training.metrics import write_line

if TYPE_CHECKING:
    from mochi_tune.config.schema import LogConfig

# Seconds after the failure of a tracker until all trackers are started again.
RETRY_SECONDS = 600
WANDB_LOGIN = "import wandb; wandb.setup(wandb.Settings(silent=True)); wandb.login(verify=False)"


def check_trackers(log: "LogConfig") -> None:
    """Checks without a network that this machine has what the trackers need.

    Raises:
        ConfigError: a package is not installed, or W&B has no login.
    """
    for kind, value in _wanted(log).items():
        if importlib.util.find_spec(kind) is None:
            package = "'mochi-tune[trackio]'" if kind == "trackio" else kind
            raise ConfigError(f"log.{kind}={value} needs a package that is not installed: run pip install {package}.")
    if log.wandb == "online":
        # W&B looks for a login in several places. Without a terminal it does not ask for one.
        command = [sys.executable, "-c", WANDB_LOGIN]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, start_new_session=True, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2].partition(": ")[2].rstrip(".")
            raise ConfigError(f"log.wandb=online: {reason}: run `wandb login`, or use log.wandb=offline.")


class Trackers:
    """The trackers of a run. No call waits for a tracker or raises its errors; closing waits for a limited time.

    Args:
        run_dir: the run folder with the JSONL files.
        last_step: step of the checkpoint to resume from; 0 starts a new run in every tracker.
        name: name of the run in the trackers.
        settings: the settings of the run, which the trackers display.
        log: the settings that choose the trackers and their project.
        close_seconds: maximum number of seconds that closing waits for all trackers.
    """

    def __init__(
        self, run_dir: Path, last_step: int, name: str, settings: Mapping, log: "LogConfig", close_seconds: float = 20
    ) -> None:
        self.run_dir, self.close_seconds, self.kinds = run_dir, close_seconds, list(_wanted(log))
        self.options = {
            # A new run gets a new ID, even in a folder that had another run before.
            "begun": secrets.token_hex(8) if last_step == 0 else None,
            **{"name": name, "project": log.project, "wandb": log.wandb, "close_seconds": close_seconds},
            # The options are an argument of a process, which is limited to 128 KiB.
            "prompts": [text[:200] for text in settings.get("train.sample_prompts", [])[:100]],
            "settings": {key: value if len(str(value)) < 200 else str(value)[:200] for key, value in settings.items()},
        }
        self.follower: Any = None  # A Popen while the process runs.
        self.at_work: list[str] = []
        self.has_failed: set[str] = set()
        self.retry_at = 0.0 if self.kinds else None

    def __enter__(self) -> "Trackers":
        self.check()
        return self

    def check(self) -> None:
        """Prints a line if a tracker has failed, and starts all trackers again ten minutes later."""
        self._read_reports()
        if self.retry_at is not None and time.monotonic() >= self.retry_at:
            if self.follower:  # It finishes its remaining trackers; the new process waits for it.
                self.follower.stdin.close()
            self._start()

    def __exit__(self, *_: object) -> None:
        """Waits for the trackers to send the last rows, and ends those that take too long."""
        if self.follower is None:
            return
        self.follower.stdin.close()
        started, has_warned = time.monotonic(), False
        while self._read_reports() and (waited := time.monotonic() - started) < self.close_seconds:
            if waited > 5 and not has_warned:
                busy = " and ".join(self.at_work) or "the trackers"
                write_line(f"waiting up to {self.close_seconds:g} s for {busy} to take the last rows")
                has_warned = True
            time.sleep(0.05)
        if self.follower:
            os.killpg(self.follower.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # A process that hangs in a disk access cannot end.
                self.follower.wait(1)
            self._fail(self.at_work, f"it did not take the last rows within {self.close_seconds:g} s")

    def _start(self) -> None:
        self.retry_at, self.at_work, self.log = None, list(self.kinds), self.run_dir / "trackers" / "follower.log"
        command = [sys.executable, "-m", "mochi_tune.training.follower", os.fspath(self.run_dir.absolute())]
        command += [",".join(self.kinds), json.dumps(self.options, default=str)]
        try:
            self.log.parent.mkdir(exist_ok=True)
            with open(self.log, "ab") as log:
                # A separate session does not get the Ctrl-C of the trainer, which stops in order.
                self.follower = subprocess.Popen(
                    command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            os.set_blocking(self.follower.stdout.fileno(), False)
        except OSError as error:
            self._fail(self.at_work, str(error))

    def _read_reports(self) -> bool:
        """Reads which trackers have ended; returns whether the follower is still running."""
        if self.follower is None:
            return False
        # If the process has ended, the pipe now contains everything that it wrote, in complete lines.
        code = self.follower.poll()
        for line in (self.follower.stdout.read(1 << 16) or b"").splitlines():
            kind, reason = json.loads(line)
            self.at_work.remove(kind)
            if reason:
                self._fail([kind], reason)
        if code is None:
            return True
        self.follower = None
        died = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, see {self.log}"
        self._fail(self.at_work, died)
        return False

    def _fail(self, kinds: list[str], reason: str) -> None:
        rows = self.run_dir / "metrics.jsonl"
        for kind in kinds:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            if kind not in self.has_failed:
                write_line(f"log.{kind} stopped ({reason}): the run goes on without it; its record is {rows}")
        self.has_failed.update(kinds)


def _wanted(log: "LogConfig") -> dict[str, str]:
    values = {"wandb": log.wandb, "tensorboard": log.tensorboard, "trackio": log.trackio}
    return {kind: str(value).lower() for kind, value in values.items() if value not in ("disabled", False)}
