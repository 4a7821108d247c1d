"""Killed at any instant, a run goes on by the same command as if nothing had happened."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from helpers_faults import STEP, assert_same_end, newest_checkpoint, rows_of, toy_lesson
from helpers_process import Disturbance, Program, run_program
from helpers_road import LORA, road

# Average, validation and epochs that end in the middle of steps: all that a checkpoint must bring back.
SETTINGS = [
    *LORA, "train.steps=8", "train.batch_size=2", "train.accumulation_steps=2", "train.checkpoint_every=2",
    "train.keep_checkpoints=2", "train.ema_decay=0.9", "train.validate_every=4", "train.validation_clips=1",
]  # fmt: skip


def command(run_dir: Path, *more: str) -> list[str]:
    return ["train", "conf=my_lora", *road(run_dir, *SETTINGS, *more)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run without a fault."""
    folder = tmp_path_factory.mktemp("straight")
    code, text = run_program(command(folder / "run"), folder / "out")
    assert code == 0, text
    return folder / "run"


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Path:
    """The run folder of one that was killed when it began to save step 6."""
    run_dir = tmp_path_factory.mktemp("halfway") / "run"
    disturbance = Disturbance(run_dir, signal_before=".tmp_000006")
    assert run_program(command(run_dir), run_dir.parent / "out", disturbance)[0] == -signal.SIGKILL
    assert newest_checkpoint(run_dir).name == "step_000004"
    return run_dir


def changes_of_a_save(halfway: Path, tmp_path: Path) -> list[tuple[int, str, str]]:
    """Returns the changes of files of the save of step 6, which removes the checkpoint of step 2, by their numbers."""
    ours = tmp_path / "dry"
    shutil.copytree(halfway, ours)
    program = Program(command(ours), tmp_path / "dry_out", Disturbance(ours))
    assert program.wait() == 0, program.text()
    changes = [(n, event, Path(path).name) for n, (event, path) in enumerate(program.changes, 1)]
    first = next(n for n, event, name in changes if (event, name) == ("os.mkdir", ".tmp_000006"))
    last = next(n for n, event, name in changes if (event, name) == ("os.mkdir", ".tmp_000008"))
    return [change for change in changes if first <= change[0] < last]


def test_killed_at_every_write_boundary_of_a_save(straight, halfway, tmp_path):
    changes = changes_of_a_save(halfway, tmp_path)
    inside = [(event, name) for _, event, name in changes]
    for file in ("adapter.safetensors", "averaged.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        assert any(name == file for _, name in inside), (file, inside)
    # Into its place, the old one out of it, and only then emptied.
    order = [inside.index(e) for e in (("os.rename", ".tmp_000006"), ("os.rename", "step_000002"))]
    assert order[0] < order[1] < inside.index(("shutil.rmtree", ".trash_000002")) and len(inside) >= 15
    chosen = []
    for number, _, _ in changes:
        ours = tmp_path / f"killed_{number}"
        shutil.copytree(halfway, ours)
        code, text = run_program(command(ours), tmp_path / "out", Disturbance(ours, signal_at=number))
        assert code == -signal.SIGKILL, text
        chosen.append(newest_checkpoint(ours).name)
        code, text = run_program(command(ours), tmp_path / "out")
        assert code == 0, text
        assert_same_end(ours, straight)
        assert not list((ours / "checkpoints").glob(".*")), "nothing is left of what was broken off"
        shutil.rmtree(ours)
    # The one before until the new one is in its place, and never a half one.
    assert sorted(set(chosen)) == ["step_000004", "step_000006"] and chosen == sorted(chosen)


def test_twenty_kills_at_random_end_in_the_adapter_of_the_undisturbed_run(tmp_path):
    """One run on the toy model; every kill is followed by the same command."""
    lesson = toy_lesson()
    settings = ["train.steps=80", "train.batch_size=2", "train.checkpoint_every=2", "train.warmup_steps=5"]
    settings += ["train.validate_every=40", "train.ema_decay=0.99", "lora.rank=4", "lora.dropout=0.1"]

    def toy(run_dir: Path) -> list[str]:
        return ["train", "conf=toy_lora", *lesson, *settings, f"run_dir={run_dir}"]

    code, text = run_program(toy(tmp_path / "straight"), tmp_path / "out")
    assert code == 0, text
    draw, ours, steps = random.Random(5), tmp_path / "run", []
    for number in range(20):
        # By what it does and not by the clock, so that a busy machine is killed at the same places: at the beginning of
        # one of the next steps, somewhere in it, or before one of the next changes of a file.
        if number % 2:
            program = Program(toy(ours), tmp_path / "out", Disturbance(ours, signal_at=draw.randint(1, 60)))
        else:
            program = Program(toy(ours), tmp_path / "out", Disturbance(hold=STEP, hold_at=(draw.randint(1, 8),)))
            program.wait_until_held()
            if number % 4:
                program.release()
            program.send(signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL, (steps, program.text()[-3000:])
        steps.append(json.loads((newest_checkpoint(ours) / "state.json").read_text())["step"] if has(ours) else 0)
    assert steps == sorted(steps) and 0 < steps[-1] < 80 and len(set(steps)) >= 5, steps
    code, text = run_program(toy(ours), tmp_path / "out")
    assert code == 0, text
    assert_same_end(ours, tmp_path / "straight")
    assert [row["step"] for row in rows_of(ours)] == list(range(1, 81))


def has(run_dir: Path) -> bool:
    return bool(list(run_dir.glob("checkpoints/step_*/manifest.json")))
