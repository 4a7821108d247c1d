"""Rewinding to checkpoints of versions that stored no hash of the rows, and again after an interruption."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers_checkpoints import edit_state
from helpers_process import Disturbance, run_program
from helpers_road import LORA, read_rows, road, train

from mochi_tune.files import read_json
from mochi_tune.training.resume import ResumePoint
from mochi_tune.training.rewind import rewind

MORE = [
    "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.warmup_steps=0", "train.schedule=constant",
    "train.learning_rate=1e-2", "train.steps=4", "train.validate_every=1", "train.validation_clips=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of an older version that went back to step 2 with another rate, and the same run before that, `before`."""
    folder = tmp_path_factory.mktemp("older")
    run_dir = folder / "run"
    train(run_dir, *MORE)
    shutil.copytree(run_dir, folder / "before")
    back = [f"resume_from={run_dir / 'checkpoints/step_000002'}", "resume=force", "train.learning_rate=5e-2"]
    train(run_dir, *MORE, *back)
    for file in (run_dir / "checkpoints").glob("aside_0_*.jsonl"):
        file.unlink()
    for checkpoint in folder.glob("*/checkpoints/*step_*"):
        edit_state(checkpoint, branch=None)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy that a test may change; the paths in its history are adapted."""
    shutil.copytree(made, tmp_path / "older")
    for history in tmp_path.glob("older/*/history.jsonl"):
        history.write_text(history.read_text().replace(str(made), str(tmp_path / "older")))
    return tmp_path / "older"


def go_back(run_dir: Path, checkpoint: Path) -> list[str]:
    """Goes back to a checkpoint as `train` does before it opens the rows; returns the lines for the user."""
    state, lines = read_json(checkpoint / "state.json"), []
    rewind(run_dir, ResumePoint(state["step"], checkpoint, state, is_named=True), lines.append)
    return lines


def steps_of(run_dir: Path, name: str = "metrics") -> list[int]:
    file = run_dir / f"{name}.jsonl"
    return [row["step"] for row in read_rows(file)] if file.exists() else []


def checkpoints_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("is_there", [True, False])
def test_an_older_checkpoint_that_was_kept_elsewhere_is_the_runs_own(folder, is_there):
    run_dir, kept = folder / "before", folder / "backup" / "step_000002"
    shutil.copytree(run_dir / "checkpoints" / "step_000002", kept)
    rows = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    if is_there:
        # The rows were edited since.
        (run_dir / "metrics.jsonl").write_bytes(b"".join(rows[1:]))
    else:
        shutil.rmtree(run_dir / "checkpoints" / "step_000002")
    lines = go_back(run_dir, kept)
    assert not any("from another branch" in line for line in lines)
    # `Metrics` drops the rows after the step.
    assert (run_dir / "metrics.jsonl").read_bytes() == b"".join(rows[is_there:])
    assert checkpoints_of(run_dir) == ([1, 2] if is_there else [1])


@pytest.mark.parametrize("step", [3, 4])
def test_an_older_checkpoint_that_was_put_aside_keeps_what_came_before_the_parting(folder, step):
    """The loss of step 3 is the same in both branches, because it is computed before the update."""
    run_dir = folder / "run"
    lines = go_back(run_dir, run_dir / "checkpoints" / f"aside_0_step_00000{step}")
    assert any("it shares them up to step 2" in line for line in lines)
    assert steps_of(run_dir) == [1, 2] and steps_of(run_dir, "validation") == [0, 1, 2]
    assert checkpoints_of(run_dir) == [1, 2]
    assert steps_of(run_dir / "checkpoints", "aside_1_metrics") == [1, 2, 3, 4], "nothing is lost"


@pytest.mark.parametrize("change", ["elsewhere", "anew", "from_another"])
def test_rows_that_may_be_anothers_are_never_mixed_with_an_older_checkpoint(folder, change):
    run_dir = folder / "run"
    aside, history = run_dir / "checkpoints" / "aside_0_step_000004", run_dir / "history.jsonl"
    if change == "elsewhere":
        aside = aside.rename(folder / "step_000004")
    else:
        other = {"resume_from": None, "from_step": 0} if change == "anew" else {"resume_from": "x/c", "from_step": 3}
        history.write_text(history.read_text() + json.dumps(other) + "\n")
    assert any("it has no rows" in line for line in go_back(run_dir, aside))
    assert steps_of(run_dir) == steps_of(run_dir, "validation") == checkpoints_of(run_dir) == []


def test_an_older_checkpoint_of_another_run_brings_the_rows_beside_it(folder):
    lines = go_back(folder / "run", folder / "before" / "checkpoints" / "step_000004")
    assert any(f"it continues those of {folder / 'before' / 'metrics.jsonl'}" in line for line in lines)
    assert (folder / "run" / "metrics.jsonl").read_bytes() == (folder / "before" / "metrics.jsonl").read_bytes()


def test_what_is_put_aside_in_two_goes_has_one_number(folder):
    run_dir, checkpoints = folder / "before", folder / "before" / "checkpoints"
    (run_dir / "base_latents").mkdir(exist_ok=True)
    for unfinished in (checkpoints / ".aside_0_validation.jsonl", run_dir / "base_latents" / ".x", run_dir / ".x"):
        Path(f"{unfinished}.abcdef-1.tmp").touch()

    def broken_off(line: str) -> None:
        raise KeyboardInterrupt

    state = read_json(checkpoints / "step_000001" / "state.json")
    with pytest.raises(KeyboardInterrupt):
        rewind(run_dir, ResumePoint(1, checkpoints / "step_000001", state, is_named=True), broken_off)
    assert not (checkpoints / "step_000002").exists() and (checkpoints / "step_000003").exists()
    go_back(run_dir, checkpoints / "step_000001")
    aside = [f"aside_0_{name}" for name in ("metrics.jsonl", "step_000002", "step_000003", "step_000004")]
    assert sorted(path.name for path in checkpoints.iterdir()) == [*aside, "aside_0_validation.jsonl", "step_000001"]
    assert not list(run_dir.rglob("*.tmp"))


@pytest.mark.parametrize("suffix", [".txt", ".mp4"])
def test_a_video_that_is_put_aside_keeps_its_prompt_wherever_that_is_cut_off(folder, suffix):
    run_dir = folder / "before"
    names = [f"step_000004_prompt_0{each}" for each in (".mp4", ".txt")]
    for name in names:
        (run_dir / "samples" / name).touch()
    checkpoint = run_dir / "checkpoints" / "step_000003"
    settings = ["train", "conf=my_lora", *road(run_dir, *LORA, *MORE), f"resume_from={checkpoint}"]
    kill = Disturbance(run_dir, signal_before=f"step_000004_prompt_0{suffix}")
    code, out = run_program(settings, folder / "log", kill)
    assert code == -signal.SIGKILL, out
    go_back(run_dir, checkpoint)
    assert sorted(path.name for path in (run_dir / "samples").iterdir()) == [f"aside_0_{name}" for name in names]
