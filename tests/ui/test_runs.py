"""The page reads run folders, also while they are written; test_page.py reads those of a real training."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers_calls import count_calls

from mochi_tune.errors import DataError
from mochi_tune.training.run_folder import RunLock
from mochi_tune.ui import runs
from mochi_tune.ui.adapters import adapters_state
from mochi_tune.ui.renders import renders_state


def test_the_owner_is_whoever_holds_the_lock(tmp_path):
    assert runs.owner(tmp_path) == 0
    with RunLock(tmp_path):
        assert runs.owner(tmp_path) == os.getpid()
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    who = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(who | {"pid": int(done.stdout)}))
    assert runs.owner(tmp_path) == 0
    odd = [{"started": "never"}, {"started": "0001-01-01T00:00:00+23:59"}, {"host": "another"}, {"pid": float("inf")}]
    for text in ("", "{", "[]", *(json.dumps(who | each) for each in (*odd, {"pid": 10**30}))):
        (tmp_path / ".lock").write_text(text)
        assert runs.owner(tmp_path) == 0


def test_a_step_of_the_clock_leaves_the_owner(tmp_path):
    with RunLock(tmp_path):
        # psutil adds the time of the boot, which changes when the system clock is set.
        who = json.loads((tmp_path / ".lock").read_text())
        (tmp_path / ".lock").write_text(json.dumps(who | {"started": "2001-01-01T00:00:00+00:00"}))
        assert runs.owner(tmp_path) == os.getpid()
    assert runs.owner(tmp_path) == 0


def test_long_runs_are_thinned_and_torn_rows_left_out(tmp_path):
    run_dir = tmp_path / "runs" / "long"
    run_dir.mkdir(parents=True)
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 5001)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text + '{"step": 5001, "lo')
    points = runs.curves(tmp_path, ["runs/long"])["loss"]
    assert len(points) == runs.MAX_POINTS and (points[0]["step"], points[-1]["step"]) == (1, 5000)
    with pytest.raises(DataError, match="outside of"):
        runs.curves(tmp_path, ["../elsewhere"])


def test_samples_are_found_by_step_and_prompt(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in (
        "step_000020_prompt_1.mp4",
        "step_000020_prompt_0.mp4",
        "step_000000_prompt_0.mp4",
        "base_prompt_0_a.st",
    ):
        (tmp_path / "samples" / name).touch()
    found = [(sample.step, sample.prompt) for sample in runs.list_samples(tmp_path)]
    assert found == [(0, 0), (20, 0), (20, 1)]


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (999_990, 1_000_000):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"settings": {"train.steps": step}}))
    assert runs.recorded_settings(tmp_path) == {"train.steps": 1_000_000}
    state = runs.read_state(tmp_path)
    assert state.checkpoints == (999_990, 1_000_000) and state.is_finished


def test_a_run_of_a_terminal_is_stopped_by_its_lock(tmp_path):
    run_dir = tmp_path / "cats"
    run_dir.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from mochi_tune.training.run_folder import RunLock\n"
        "with RunLock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, run_dir], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "locked\n"
        # A copy of the folder names the same process, which does not train there.
        copy = tmp_path / "copy"
        copy.mkdir()
        (copy / ".lock").write_bytes((run_dir / ".lock").read_bytes())
        with pytest.raises(DataError, match="there is nothing to stop"):
            runs.stop_run(copy)
        assert runs.stop_run(run_dir) == trainer.pid
        assert trainer.wait(60) == -signal.SIGTERM
    for folder in (run_dir, tmp_path / "none"):
        with pytest.raises(DataError, match="there is nothing to stop"):
            runs.stop_run(folder)


def test_a_run_on_a_gpu_has_a_curve_of_its_memory(tmp_path):
    run_dir = tmp_path / "runs" / "gpu"
    run_dir.mkdir(parents=True)
    row = {"step": 1, "loss": 1.5, "lr": 1e-4, "seconds": 0.5, "memory_gib": 20.25}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert runs.curves(tmp_path, ["runs/gpu"])["memory_gib"] == [{"step": 1, "value": 20.25, "run": "gpu"}]


def test_runs_and_samples_that_vanish_are_left_out(tmp_path):
    assert runs.list_runs(tmp_path) == [] and runs.list_samples(tmp_path / "gone") == []
    (tmp_path / "runs" / "dead").mkdir(parents=True)
    (tmp_path / "runs" / "dead" / ".lock").symlink_to(tmp_path / "gone")
    assert runs.list_runs(tmp_path) == []


def add_files(run_dir, numbers):
    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").touch()
    os.utime(run_dir / "metrics.jsonl", (1e9, 1e9))
    for number in numbers:
        (run_dir / "checkpoints" / f"step_{number:06d}").mkdir(parents=True)
        for name in (f"a_{number}.mp4", f"a_{number}.json", f"step_{number:06d}_prompt_0.mp4"):
            (run_dir / "samples" / name).touch()


@pytest.mark.parametrize("read_state", [runs.runs_state, renders_state, adapters_state])
def test_polling_takes_no_longer_for_a_run_of_many_files(tmp_path, read_state):
    costs = []
    for folder, numbers in ((tmp_path / "few", range(34)), (tmp_path / "all", range(90))):
        add_files(folder / "runs" / "cats", numbers)
        with count_calls(os.stat, open) as calls:
            costs.append((calls, len(repr(read_state(folder)))))
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    ("read_state", "new"),
    [
        (runs.runs_state, "checkpoints/step_000002"),
        (runs.runs_state, "samples/step_000002_prompt_0.mp4"),
        (renders_state, "samples/b.json"),
        (renders_state, "samples/a_1.mp4"),
        (adapters_state, "checkpoints/step_000002"),
        (adapters_state, "adapter.safetensors"),
    ],
)
def test_polling_finds_new_files(tmp_path, read_state, new):
    run_dir = tmp_path / "runs" / "cats"
    add_files(run_dir, [1])
    for folder in ("checkpoints", "samples"):
        # The timestamps of a disk may be too coarse to differ.
        os.utime(run_dir / folder, (1e9, 1e9))
    before = repr(read_state(tmp_path))
    assert repr(read_state(tmp_path)) == before
    (tmp_path / "new").touch()
    os.replace(tmp_path / "new", run_dir / new)
    assert repr(read_state(tmp_path)) != before


def test_what_is_no_number_is_not_drawn(tmp_path):
    run_dir = tmp_path / "runs" / "odd"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": null, "lr": "x"}\n{"step": 2, "loss": 0.5}\n')
    rows = ['{"step": 0, "validation_loss": NaN}', '{"step": 10, "validation_loss": 0.4, "bins": {"0.1": null}}']
    (run_dir / "validation.jsonl").write_text("\n".join([*rows, '{"step": 20, "validation_loss": "x"}', ""]))
    assert [point["step"] for point in runs.curves(tmp_path, ["runs/odd"])["loss"]] == [2]
    assert [point["value"] for point in runs.validation_curves(tmp_path, ["runs/odd"])] == [0.4]
    assert runs.best_step(run_dir) == (10, 0.4)
