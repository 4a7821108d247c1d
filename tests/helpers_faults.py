"""Real trainers that are started cheaply and disturbed exactly where a test wants it.

Each is a process of its own, forked from one that has imported everything, and runs the command line's own `main`.
Python's audit events tell it of every file that it opens for writing, renames or removes: at one of them it may kill
itself, or sleep. Nothing in the product knows of this.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import load_file

PRELOADED = [
    "peft", "pyarrow.parquet", "psutil", "hydra", "omegaconf", "mochi_tune.cli.main", "mochi_tune.config.load",
    "mochi_tune.recipes.train_lora", "mochi_tune.recipes.sample", "mochi_tune.data_prep.prepare",
]  # fmt: skip
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.copyfile"}


@dataclass(frozen=True)
class Disturbance:
    """What befalls a process.

    Attributes:
        under: only changes of files under this folder count.
        kill_at: the change, counted from 1, before which it is killed; 0: never.
        kill_before: ending of a path before whose first change it is killed; None: never.
        signal_before: ending of a path before whose first change it gets `signal`.
        signal: its number.
        slow: "module:function" that takes `seconds` longer from its call number `slow_from` on.
        log: file to which every change is written, one JSON line each; None: none.
        file_bytes: size beyond which none of its files may grow, as on a full disk; None: any.
    """

    under: str = ""
    kill_at: int = 0
    kill_before: str | None = None
    signal_before: str | None = None
    signal: int = signal.SIGTERM
    slow: str | None = None
    slow_from: int = 1
    seconds: float = 0.0
    log: str | None = None
    file_bytes: int | None = None


class Program:
    """A running `mochi-tune`, in a process of its own."""

    def __init__(self, arguments: list[str], out: Path, disturbance: Disturbance | None = None) -> None:
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = multiprocessing.get_context("forkserver")
        self.out = out
        # Through a pipe, so that a full disk is not what its words fail on.
        pipe = out.with_name(f"{out.name}.{next(_NUMBERS)}.pipe")
        os.mkfifo(pipe)
        self._copier = threading.Thread(target=_copy, args=(pipe, out), daemon=True)
        self._copier.start()
        self.process = context.Process(target=_run, args=(arguments, str(pipe), disturbance or Disturbance()))
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """Returns the exit code, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.text()[-2000:]}"
        # What it has started may hold the pipe a little longer.
        self._copier.join(5)
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), f"ended too early: {self.text()[-2000:]}"
            assert time.monotonic() < deadline, self.text()[-2000:]
            time.sleep(0.005)

    def text(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""


@cache
def toy_lesson() -> list[str]:
    """Returns the settings of a cache of the demo's clips, made once a test session."""
    from mochi_tune.toy.lesson import write_lesson

    folder = Path(mkdtemp(prefix="mochi_tune_toy_"))
    write_lesson(folder / "videos", 0)
    settings = [f"data.videos={folder / 'videos'}", f"data.cache={folder / 'cache'}"]
    code, text = run_program(["prepare", "conf=toy_lora", *settings], folder / "out")
    assert code == 0, text
    return settings


_NUMBERS = itertools.count()


def _copy(pipe: Path, out: Path) -> None:
    with open(pipe, "rb", buffering=0) as source, open(out, "wb", buffering=0) as target:
        while piece := source.read(65536):
            target.write(piece)


def run_program(arguments: list[str], out: Path, disturbance: Disturbance | None = None) -> tuple[int, str]:
    """Runs a program to its end; returns its exit code and what it wrote."""
    program = Program(arguments, out, disturbance)
    return program.wait(), program.text()


def _run(arguments: list[str], out: str, disturbance: Disturbance) -> None:
    handle = os.open(out, os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    torch.set_num_threads(1)
    if disturbance.under:
        sys.addaudithook(_hook(disturbance))
    if disturbance.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disturbance.file_bytes, resource.RLIM_INFINITY))
    if disturbance.slow:
        _slow_down(disturbance)
    from mochi_tune.cli import main as cli

    cli.main(arguments)


def _hook(disturbance: Disturbance) -> Callable[[str, tuple], None]:
    count, has_signalled = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count, has_signalled
        if event not in CHANGES:
            return
        path = str(arguments[0])
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            is_writing = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            # A folder or file opened with O_RDONLY by number is about to be synced.
            if not is_writing and not (mode is None and not path.endswith(".json")):
                return
        if not disturbance.under or not path.startswith(disturbance.under):
            return
        count += 1
        if disturbance.log:
            with _quietly(disturbance.log) as log:
                log.write(json.dumps([count, event, path]) + "\n")
        if count == disturbance.kill_at or (disturbance.kill_before and path.endswith(disturbance.kill_before)):
            os.kill(os.getpid(), signal.SIGKILL)
        if not has_signalled and disturbance.signal_before and path.endswith(disturbance.signal_before):
            has_signalled = True
            os.kill(os.getpid(), disturbance.signal)

    return hook


def _slow_down(disturbance: Disturbance) -> None:
    """Makes a function of a module take longer; what it does stays what it is."""
    module, _, name = disturbance.slow.partition(":")
    module = importlib.import_module(module)
    function, calls = getattr(module, name), itertools.count(1)

    def slowly(*arguments, **options):
        if next(calls) >= disturbance.slow_from:
            sys.stderr.write(f"slow: {name}\n")
            time.sleep(disturbance.seconds)
        return function(*arguments, **options)

    setattr(module, name, slowly)


def _quietly(path: str):
    """Opens the log by a number that is no path, so that it is not counted."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w")


def rows_of(run_dir: Path, name: str = "metrics") -> list[dict]:
    """Returns the rows of a run without its times."""
    lines = (run_dir / f"{name}.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def newest_checkpoint(run_dir: Path) -> Path:
    found = {json.loads(m.read_text())["step"]: m.parent for m in run_dir.glob("checkpoints/step_*/manifest.json")}
    return found[max(found)]


def assert_same_end(ours: Path, theirs: Path) -> None:
    """Compares all that two runs have come to, bit for bit."""
    mine, its = newest_checkpoint(ours), newest_checkpoint(theirs)
    assert mine.name == its.name
    names = sorted(path.name for path in its.glob("*.safetensors"))
    assert names == sorted(path.name for path in mine.glob("*.safetensors"))
    for name in names:
        a, b = load_file(mine / name), load_file(its / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b), name
    states = [json.loads((folder / "state.json").read_text()) for folder in (mine, its)]
    for key in ("step", "groups", "losses", "rows", "cache", "base", "draws"):
        assert states[0][key] == states[1][key], key
    for name in ("metrics", "validation"):
        assert rows_of(ours, name) == rows_of(theirs, name), name
    a, b = (load_file(folder / "adapter.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
