"""A tracker's own process: follows the JSONL files of a run and sends their numbers to W&B, TensorBoard or trackio.

It remembers in run_dir/trackers/KIND.json which steps are safe there, and the next one goes on from them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from mochi_tune.files import parse_object, write_atomic

FILES = ("metrics", "validation")
# How often it looks for new rows, and how much of a file it reads at once.
POLL_SECONDS, CHUNK_BYTES = 0.5, 1 << 20
# Its last word, about why it failed, begins with this.
REASON = "mochi-tune: "


class WandbService:
    """A run in W&B, which takes no number for a step that it has closed, neither now nor when the run goes on.

    So a validation goes into its step's row, which is still open. One that a stopped run did not come to, and that is
    made up for now, goes into the next step's, with its own step as its x axis.
    """

    def __init__(self, folder: Path, run_id: str, options: Mapping, last_step: int) -> None:
        import wandb

        self.run = wandb.init(
            project=options["project"], name=options["name"], id=run_id, resume="allow", mode=options["wandb"],
            dir=folder, config=options["settings"], settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.run.define_metric("validation/*", step_metric="validation/step")
        self.open_step = 0 if last_step < 0 else None
        self.late: dict[str, float] = {}

    def send(self, file: str, step: int, numbers: dict[str, float]) -> None:
        """Hands a row's numbers over."""
        if file == "validation":
            numbers = {**numbers, "validation/step": step}
            if step != self.open_step:
                self.late = numbers
                return
        self.run.log({**self.late, **numbers}, step=step)
        self.open_step, self.late = step, {}

    def flush(self) -> bool:
        """Returns False: only `finish` tells when rows are safe.

        What is sent once more because of that, the server leaves out, as it knows the step.
        """
        return False

    def finish(self) -> None:
        """Waits until all is sent, or on disk if offline."""
        # A row of its own would close the step that the run may yet come to.
        self.run.summary.update(self.late)
        self.run.finish()


class TensorBoardService:
    """Event files in a folder. What lies there of steps that come again is purged."""

    def __init__(self, folder: Path, _run_id: str, _options: Mapping, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=last_step + 1)

    def send(self, _file: str, step: int, numbers: dict[str, float]) -> None:
        """Hands a row's numbers over."""
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def flush(self) -> bool:
        """Writes what was sent; returns True."""
        self.writer.flush()
        return True

    def finish(self) -> None:
        """Closes the file."""
        self.writer.close()


class TrackioService:
    """A run in trackio, which tells of a failure by a warning only: here that is an error."""

    def __init__(self, _folder: Path, run_id: str, options: Mapping, _last_step: int) -> None:
        self.warned: list[str] = []
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        import trackio

        # trackio finds a run by its name.
        self.run = trackio.init(
            project=options["project"], name=f"{options['name']}-{run_id[:8]}", config=options["settings"],
            resume="allow", embed=False,
        )  # fmt: skip
        self.warned.clear()  # Until here no row can have been lost.

    def send(self, _file: str, step: int, numbers: dict[str, float]) -> None:
        """Hands a row's numbers over."""
        self.run.log(numbers, step=step)

    def flush(self) -> bool:
        """Waits until trackio has written what was sent, which it does twice a second; returns True."""
        time.sleep(1)
        self._raise_warned()
        return True

    def finish(self) -> None:
        """Waits until all is written."""
        self.run.finish()
        self._raise_warned()

    def _note(self, message: object, _category: type, filename: str, *_: object, **__: object) -> None:
        if "trackio" in Path(filename).parts:
            self.warned.append(str(message))

    def _raise_warned(self) -> None:
        if self.warned:
            raise OSError(self.warned[0])


SERVICES = {"wandb": WandbService, "tensorboard": TensorBoardService, "trackio": TrackioService}


def forward(run_dir: Path, kind: str, options: Mapping, over: Callable[[float], bool]) -> None:
    """Sends a tracker the rows of a run that it does not have, until the run is over.

    Args:
        run_dir: the run's folder, with its JSONL files.
        kind: wandb, tensorboard or trackio.
        options: what `Trackers` passes on.
        over: waits at most so many seconds for the end of the run, and returns whether it is over.
    """
    folder = run_dir / "trackers"
    # Opened now: another trainer may put new ones in their place while this waits for the lock.
    tails = [_Tail(run_dir / f"{name}.jsonl") for name in FILES]
    with open(folder / f".{kind}.lock", "w") as lock:
        # The tracker of a trainer that was killed may still be sending its last rows.
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / f"{kind}.json"
        state = _read_state(path, run_dir, options["begun"])
        # Done before anything is sent: without it the next start would send everything again.
        _write_state(path, state)
        service = None
        for batch in _rows(*tails, over):
            for file, row in batch:
                if row["step"] <= state[file]:
                    continue
                # No run in a tracker before there is something to say.
                service = service or SERVICES[kind](folder, state["id"], options, state["metrics"])
                step = row.pop("step")
                service.send(file, step, dict(_numbers(row, file)))
                state[file] = step
            if service and service.flush():
                _write_state(path, state)
        if service:
            service.finish()
            _write_state(path, state)


def _read_state(path: Path, run_dir: Path, begun: str | None) -> dict:
    """Returns the tracker's run id and the last steps it has; none if the run is a new one or the folder was moved."""
    known = (parse_object(path.read_bytes()) if path.exists() else None) or {}
    begun = begun or known.get("begun", "")
    run_id = hashlib.sha256(f"{run_dir.resolve()} {begun}".encode()).hexdigest()[:16]
    if known.get("id") == run_id:
        return known
    return {"id": run_id, "begun": begun, **dict.fromkeys(FILES, -1)}


def _write_state(path: Path, state: dict) -> None:
    write_atomic(path, json.dumps(state).encode())


def _rows(metrics: "_Tail", validation: "_Tail", over: Callable[[float], bool]) -> Iterator[list[tuple[str, dict]]]:
    """Gives the rows of both files in the order of their steps, as they come; ends with the run.

    A validation's row is written after its step's and before the next step's; but it may be read before its step's.
    """
    reached, held, is_over = 0, [], False
    while True:
        steps = metrics.read()
        held += validation.read()
        reached = steps[-1]["step"] if steps else reached
        ends = is_over and not steps
        ready = [row for row in held if ends or row["step"] <= reached]
        held = [row for row in held if not (ends or row["step"] <= reached)]
        batch = [("metrics", row) for row in steps] + [("validation", row) for row in ready]
        if batch:
            yield sorted(batch, key=lambda named: named[1]["step"])
        elif ends:
            return
        else:
            # What was written before the end is read after it.
            is_over = over(POLL_SECONDS)


class _Tail:
    """Reads what is added to a file, in whole lines."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.rest = b""

    def read(self) -> list[dict]:
        *lines, self.rest = (self.rest + self.file.read(CHUNK_BYTES)).split(b"\n")
        return [json.loads(line) for line in lines]


def _numbers(value: object, name: str) -> Iterator[tuple[str, float]]:
    """Gives the numbers of a row under their names, as "validation/bins/0.125"; texts and lists are left out."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{name}/{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def kill_all(process: psutil.Process) -> None:
    """Kills a process and all that it started, itself last."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _wait_for_the_end(over: threading.Event, close_seconds: float) -> None:
    """Notes when the trainer is gone, and ends this process if it then takes too long."""
    while os.read(0, 1):
        pass
    over.set()
    # The trainer ends it sooner, if it is still there.
    time.sleep(close_seconds + 1)
    kill_all(psutil.Process())


def main() -> None:
    """Follows a run as one of its trackers: RUN_DIR KIND OPTIONS."""
    run_dir, kind, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A cluster sends them to every process of a job; the last rows are yet to come.
        signal.signal(number, signal.SIG_IGN)
    over = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(over, options["close_seconds"]), daemon=True).start()
    try:
        forward(run_dir, kind, options, over.wait)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"{REASON}{reason}\n")
        raise


if __name__ == "__main__":
    main()
