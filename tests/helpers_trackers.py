"""A small run that has metrics and trackers and no model, and what its trackers have of it."""

import atexit
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from helpers_process import PATIENCE

# Steps from the one after argv[2] to argv[3], as a trainer would log them; a validation at every other one, 0 too.
# Where a file `until` is named, it ends after the even step at which that is there.
RUN = """
import json, os, signal, sys, time
from pathlib import Path
from mochi_tune.config.schema import LogConfig
from mochi_tune.training import trackers as room
from mochi_tune.training.metrics import Metrics
from mochi_tune.training.trackers import Trackers

run_dir, last_step, steps, options = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
pause, left_out, until = options.pop("pause", 0), options.pop("left_out", None), options.pop("until", None)
# The shell of a background job has what it starts ignore SIGINT, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
room.RETRY_SECONDS = options.pop("retry", room.RETRY_SECONDS)
close_seconds, log = options.pop("close_seconds", 20.0), LogConfig(**options)
settings = {"train.steps": steps, "train.sample_prompts": ["a cat"] * 10**6}
with (
    Metrics(run_dir, last_step) as metrics,
    Trackers(run_dir, last_step, "a run", settings, log, close_seconds) as trackers,
):
    try:
        for step in range(last_step, steps + 1):
            if step > last_step:
                metrics.log({"step": step, "loss": step / 8, "lr": 0.5, "clips": ["a.mp4"], "sigmas": [0.25]})
            if step % 2 == 0 and step != left_out and not metrics.is_validated(step):
                metrics.log_validation({"step": step, "validation_loss": step / 4, "bins": {"0.125": step / 2}})
            trackers.check()
            time.sleep(pause)
            if until and step % 2 == 0 and os.path.exists(until):
                break
    except KeyboardInterrupt:
        pass
    trackers.check()
"""

# In W&B's place: writes what it is given to a file.
RECORDER = """
import json, os
def init(**options):
    return Run(options)
class Settings:
    def __init__(self, **_): pass
class Run:
    def __init__(self, options):
        self.file = open(os.path.join(options["dir"], "recorded.jsonl"), "a", buffering=1)
        self.write(id=options["id"])
    def write(self, **row): self.file.write(json.dumps(row) + "\\n")
    def define_metric(self, *_, **__): pass
    def log(self, row, step=None, commit=None): self.write(row=row, step=step)
    def finish(self): self.write(finished=True)
    summary = {}
"""


def environment(package: Path | None = None, **more: str) -> dict[str, str]:
    """Returns the environment, with a folder of packages that come before the installed ones."""
    path = [str(package)] if package else []
    return {**os.environ, "PYTHONPATH": ":".join([*path, *filter(None, [os.environ.get("PYTHONPATH")])]), **more}


def fake_wandb(folder: Path, code: str) -> dict[str, str]:
    """Returns an environment in which W&B is this code."""
    (folder / "packages").mkdir()
    (folder / "packages" / "wandb.py").write_text(code)
    return environment(folder / "packages")


def start(run_dir: Path, last_step: int, steps: int, env: dict | None = None, **options) -> subprocess.Popen:
    run_dir.mkdir(exist_ok=True)
    # A busy machine takes its time to start a tracker.
    options = {"close_seconds": 300, **options}
    command = [sys.executable, "-c", RUN, str(run_dir), str(last_step), str(steps), json.dumps(options)]
    process = subprocess.Popen(
        command, env=env or environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    # One that a failed test leaves behind would log for hours.
    atexit.register(process.kill)
    return process


def run(run_dir: Path, last_step: int, steps: int, env: dict | None = None, **options) -> list[str]:
    """Runs to the end; returns the lines on stderr."""
    _, err = (process := start(run_dir, last_step, steps, env, **options)).communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return err.splitlines()


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Returns the tracker processes of a run that are alive, and what they have started."""
    found = []
    for process in psutil.process_iter():
        try:
            arguments, is_alive = process.cmdline(), process.status() != psutil.STATUS_ZOMBIE
            if is_alive and str(run_dir) in arguments and "mochi_tune.training.follower" in arguments:
                found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return found


def wait_until(is_so) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, "it never was so"
        time.sleep(0.05)


def wandb_history(path: Path) -> Iterator[dict]:
    """Reads the rows of a W&B file: blocks of 32 KiB with records in pieces, each with checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, content = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # A whole one, or the last piece.
            record, content = Record.FromString(content), b""
            if record.WhichOneof("record_type") == "history":
                yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
