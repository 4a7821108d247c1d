"""The page reads run folders, also while they are written; test_page.py trains the run that it reads there."""

import json
import os
import subprocess
import sys

import pytest

from mochi_tune.errors import DataError
from mochi_tune.training.run_folder import RunLock
from mochi_tune.ui import runs


def test_the_owner_is_whoever_holds_the_lock(tmp_path):
    assert runs.owner(tmp_path) == 0
    with RunLock(tmp_path):
        assert runs.owner(tmp_path) == os.getpid()
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    who = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(who | {"pid": int(done.stdout)}))
    assert runs.owner(tmp_path) == 0
    for text in ("", "{", "[]", json.dumps(who | {"started": "never"}), json.dumps(who | {"host": "another"})):
        (tmp_path / ".lock").write_text(text)
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
