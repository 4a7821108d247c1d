"""The follower process of a run: sends the numbers of its JSONL files and its eval videos to trackers.

Each tracker has a thread, so that one that fails or hangs does not stop the others. run_dir/trackers/KIND.json records
the last steps that a tracker has stored, and the next start continues from there.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mochi_tune.files import parse_object, write_atomic
from mochi_tune.training.eval_files import find_eval_videos, is_written, prompt_of
from mochi_tune.training.metrics import FILES, read_new_rows

# Interval in seconds at which the follower reads new rows.
POLL_SECONDS = 0.5
# Interval in seconds at which a tracker that is sent many rows is recorded.
RECORD_SECONDS = 5.0
GIF_WIDTH = 640
# The file of a row without its suffix, and the row.
_Row = tuple[str, dict[str, Any]]


# A tracker gets rows in the order of their steps. `send` sends the numbers of a row, `show` an eval video or picture.
# `flush` returns whether everything sent is known to be stored, and `finish` waits until it is. A tracker is built when
# its first row exists.


class _Wandb:
    """A run in W&B, which accepts no more numbers for a step once a later step was logged, even after a resume.

    A validation or a video is therefore added to the row of its step while that is open. If a resumed run catches up on
    one, it goes into the row of the next step, with its own step as x axis.
    """

    def __init__(self, folder: Path, run_id: str, options: Mapping, last_step: int) -> None:
        import wandb

        self.run = wandb.init(
            project=options["project"], name=options["name"], id=run_id, resume="allow", mode=options["wandb"],
            dir=folder, config=options["settings"], settings=wandb.Settings(console="off"),
        )  # fmt: skip
        for part in ("validation", "samples"):
            self.run.define_metric(f"{part}/*", step_metric=f"{part}/step")
        self.open_step = 0 if last_step < 0 else None
        self.late: dict[str, Any] = {}

    def send(self, file: str, step: int, numbers: dict[str, float]) -> None:
        if file == "validation":
            self._add({**numbers, "validation/step": step}, step)
            return
        self.run.log({**self.late, **numbers}, step=step)
        self.open_step, self.late = step, {}

    def show(self, name: str, step: int, path: Path, prompt: str) -> None:
        import wandb

        # With the format, W&B copies the file unchanged.
        kind = wandb.Image(str(path), caption=prompt) if path.suffix == ".png" else None
        media = kind or wandb.Video(str(path), caption=prompt, format="mp4")
        self._add({name: media, "samples/step": step}, step)

    def _add(self, values: dict[str, Any], step: int) -> None:
        if step == self.open_step:
            self.run.log({**self.late, **values}, step=step)
            self.late = {}
        else:
            self.late |= values

    def flush(self) -> bool:
        # Only `finish` shows that rows are stored. W&B ignores a step that is sent again because of that.
        return False

    def finish(self) -> None:
        # Logging a row would close the next step, which a resumed run may still need.
        self.run.summary.update(self.late)
        self.run.finish()


class _TensorBoard:
    """TensorBoard event files in a folder. Steps that are logged again are purged first."""

    def __init__(self, folder: Path, _run_id: str, _options: Mapping, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def send(self, _file: str, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def show(self, name: str, step: int, path: Path, _prompt: str) -> None:
        """Adds a video as a GIF, the format that TensorBoard plays.

        Source: pytorch/pytorch@v2.9.0 torch/utils/tensorboard/summary.py (video, make_video), which needs moviepy.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        content, (width, height) = _as_gif(path)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        value = Summary.Value(tag=name, image=image)
        self.writer._get_file_writer().add_summary(Summary(value=[value]), step)

    def flush(self) -> bool:
        self.writer.flush()
        return True

    def finish(self) -> None:
        self.writer.close()


class _Trackio:
    """A run in trackio, which reports failures only as warnings; this class raises them as errors."""

    def __init__(self, _folder: Path, run_id: str, options: Mapping, _last_step: int) -> None:
        self.warned: list[str] = []
        warnings.simplefilter("always")
        warnings.showwarning = self._note
        import trackio

        # trackio finds a run by its name.
        name = f"{options['name']}-{run_id[:8]}"
        self.run = trackio.init(
            project=options["project"], name=name, config=options["settings"], resume="allow", embed=False
        )
        self.warned.clear()  # No row was sent yet, so earlier warnings do not matter.

    def send(self, _file: str, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def show(self, *_: object) -> None:
        """Does nothing: only W&B and TensorBoard get videos."""

    def flush(self) -> bool:
        time.sleep(1)  # trackio writes twice a second.
        self._raise_warned()
        return True

    def finish(self) -> None:
        self.run.finish()
        self._raise_warned()

    def _note(self, message: object, _category: type, filename: str, *_: object, **__: object) -> None:
        if "trackio" in Path(filename).parts:
            self.warned.append(str(message))

    def _raise_warned(self) -> None:
        if self.warned:
            raise OSError(self.warned[0])


TRACKERS: dict[str, Callable[..., Any]] = {"wandb": _Wandb, "tensorboard": _TensorBoard, "trackio": _Trackio}


class _NewRows:
    """Reads what was added to the files of a run: rows, and eval videos as rows of "samples"."""

    def __init__(self, run_dir: Path, files: Mapping[str, BinaryIO], shown: Collection[str]) -> None:
        self._run_dir, self._files = run_dir, files
        # The last step whose row was read; rows and videos of later steps; names of the videos that were found.
        self._reached, self._waiting, self._found = 0, list[_Row](), set(shown)

    def read(self, is_over: bool) -> list[_Row]:
        """Returns the new rows by step; the validation and the videos of a step are between its row and the next one.

        Videos are listed only with new rows and at the end of the run, because a folder may have thousands of them.
        """
        steps = read_new_rows(self._files["metrics"])
        self._reached = steps[-1]["step"] if steps else self._reached
        new: list[_Row] = [("metrics", row) for row in steps]
        # The row of a validation is written after the row of its step, but may be read before it.
        new += [("validation", row) for row in read_new_rows(self._files["validation"])]
        if new or is_over:
            unknown = [video for video in find_eval_videos(self._run_dir) if video[2].name not in self._found]
            # A resumed run writes an empty file again.
            videos = [video for video in unknown if is_written(video[2])]
            self._found.update(path.name for _, _, path in videos)
            new += [("samples", {"step": step, "number": number, "path": path}) for step, number, path in videos]
        order = (*FILES, "samples")
        rows = sorted(self._waiting + new, key=lambda named: (named[1]["step"], order.index(named[0])))
        self._waiting = [named for named in rows if named[1]["step"] > self._reached]
        return rows[: len(rows) - len(self._waiting)]


def follow(run_dir: Path, kind: str, options: Mapping, wait: Callable[[float], bool]) -> None:
    """Sends the missing rows of a run to a tracker until the run is over.

    Args:
        run_dir: the run folder with the JSONL files.
        kind: one of TRACKERS.
        options: the options of `trackers.Trackers`.
        wait: waits for the end of the run for at most this many seconds, and returns whether the run is over.
    """
    folder, tracker, is_over = run_dir / "trackers", None, False
    with contextlib.ExitStack() as stack:
        # Opened before waiting for the lock, because another trainer may replace the files meanwhile.
        files = {name: stack.enter_context(open(run_dir / f"{name}.jsonl", "rb")) for name in FILES}
        # The follower of a trainer that was killed may still be sending its last rows.
        fcntl.flock(stack.enter_context(open(folder / f".{kind}.lock", "w")), fcntl.LOCK_EX)
        path = folder / f"{kind}.json"
        state = _read_state(path, run_dir, options["begun"])
        # Written before anything is sent: without it the next start would send everything again.
        write_atomic(path, json.dumps(state).encode())
        new_rows = _NewRows(run_dir, files, state["samples"])
        while True:
            rows = new_rows.read(is_over)
            due = time.monotonic() + RECORD_SECONDS
            for file, row in rows:
                if file != "samples" and row["step"] <= state[file]:
                    continue
                tracker = tracker or TRACKERS[kind](folder, state["id"], options, state["metrics"])
                # A tracker that is far behind may be ended before it has sent all rows. What it has of a step is
                # recorded as a whole, because the next start continues after the last recorded step.
                if file == "metrics" and time.monotonic() >= due:
                    _record(path, state, tracker)
                    due = time.monotonic() + RECORD_SECONDS
                try:
                    _send(tracker, file, row, options["prompts"])
                except Exception:
                    # The validation of a step whose video fails is not sent again.
                    _record(path, state, tracker)
                    raise
                if file == "samples":
                    state[file].append(row["path"].name)
                else:
                    state[file] = row["step"]
                # Step 0 has a validation and videos, but no row of its own.
                state["metrics"] = max(state["metrics"], 0)
            if rows and tracker:
                _record(path, state, tracker)
            # One more iteration after the end reads the last rows.
            if is_over and not rows:
                break
            is_over = wait(POLL_SECONDS)
        if tracker:
            tracker.finish()
            write_atomic(path, json.dumps(state).encode())


def _send(tracker: Any, file: str, row: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """Sends a row to a tracker."""
    if file == "samples":
        prompt = prompt_of(row["path"], row["number"], prompts)[:200]
        tracker.show(f"samples/prompt_{row['number']}", row["step"], row["path"], prompt)
    else:
        numbers = {key: value for key, value in row.items() if key != "step"}
        tracker.send(file, row["step"], dict(_numbers(numbers, file)))


def _record(path: Path, state: Mapping, tracker: Any) -> None:
    """Writes the last steps that a tracker has stored, if it knows that everything sent is stored."""
    if tracker.flush():
        write_atomic(path, json.dumps(state).encode())


def _numbers(value: object, name: str) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a row by name, such as "validation/bins/0.125"; texts and lists are left out."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{name}/{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _read_state(path: Path, run_dir: Path, begun: str | None) -> dict:
    """Returns the run ID and the last steps of a tracker, which starts again if the run is new or was moved."""
    known = (parse_object(path.read_bytes()) if path.exists() else None) or {}
    begun = begun or known.get("begun", "")
    run_id = hashlib.sha256(f"{run_dir.resolve()} {begun}".encode()).hexdigest()[:16]
    if known.get("id") == run_id:
        return {"samples": [], **known}
    return {"id": run_id, "begun": begun, **dict.fromkeys(FILES, -1), "samples": []}


def _as_gif(path: Path) -> tuple[bytes, tuple[int, int]]:
    """Returns an eval video or picture as a GIF of at most GIF_WIDTH pixels, and its size."""
    from mochi_tune.models.latents import FPS
    from mochi_tune.sampling.video import read_frames

    frames = read_frames(path)
    for frame in frames:
        frame.thumbnail((GIF_WIDTH, GIF_WIDTH))
    content = io.BytesIO()
    # GIF durations are multiples of 10 ms.
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=round(100 / FPS) * 10, loop=0)
    return content.getvalue(), frames[0].size


def main() -> None:
    """Follows a run until its trainer ends; the arguments are RUN_DIR KIND,KIND OPTIONS.

    Writes a JSON line [kind, reason] to stdout when a tracker has ended; the reason is "" if it did not fail.
    """
    run_dir, kinds, options = Path(sys.argv[1]), sys.argv[2].split(","), json.loads(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A cluster signals every process of a job, but the last rows are still to be sent.
        signal.signal(number, signal.SIG_IGN)
    # The output of the trackers' libraries goes to the log.
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    over = threading.Event()

    def run(kind: str) -> None:
        reason = ""
        try:
            follow(run_dir, kind, options, over.wait)
        except (Exception, SystemExit) as error:  # noqa: BLE001  (reported to the trainer; the log has the traceback)
            traceback.print_exc()
            # Short enough to be written to the pipe atomically.
            reason = " ".join(str(error).split())[:500] or type(error).__name__
        with contextlib.suppress(BrokenPipeError):  # The trainer is gone.
            report.write(json.dumps([kind, reason]) + "\n")

    def wait_for_the_end() -> None:
        while os.read(0, 1):  # Until the trainer closes the pipe or ends.
            pass
        over.set()
        time.sleep(options["close_seconds"] + 1)  # A living trainer ends this process earlier.
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    threads = [threading.Thread(target=run, args=(kind,), daemon=True) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
