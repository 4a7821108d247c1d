"""Asked to stop or to save, wherever it is, a run does so within seconds and loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_faults import (
    DECODING,
    READING,
    SAMPLING,
    STEP,
    VALIDATION,
    assert_same_end,
    newest_checkpoint,
    rows_of,
)
from helpers_process import Disturbance, Program, run_program
from helpers_road import LORA, road

from mochi_tune.training.interrupts import REPEAT_SECONDS

STEPS = 12
SETTINGS = [
    *LORA, f"train.steps={STEPS}", "train.batch_size=2", "train.accumulation_steps=2", "train.checkpoint_every=5",
    "train.ema_decay=0.9", "train.validate_every=4", "train.validation_clips=3", "train.sample_every=6",
    "train.sample_prompts=[a red ball]", "sample.steps=40",
]  # fmt: skip


def command(run_dir: Path, *more: str) -> list[str]:
    return ["train", "conf=my_lora", *(a for a in road(run_dir, *SETTINGS, *more) if a != "train.sample_every=0")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    code, text = run_program(command(folder / "run"), folder / "out")
    assert code == 0, text
    return folder / "run"


def stop(program: Program, number: int = signal.SIGTERM) -> None:
    """Sends a signal to a program that is held, lets it go on, and makes sure that it ends by it."""
    program.send(number)
    program.release()
    assert program.wait() == 128 + number, program.text()


def assert_goes_on(run_dir: Path, straight: Path, tmp_path: Path) -> None:
    code, text = run_program(command(run_dir), tmp_path / "again")
    assert code == 0 and "resuming" in text, text
    assert_same_end(run_dir, straight)
    videos = [sorted(p.name for p in (folder / "samples").iterdir()) for folder in (run_dir, straight)]
    assert videos[0] == videos[1]
    for name in videos[1]:
        assert (run_dir / "samples" / name).read_bytes() == (straight / "samples" / name).read_bytes()


def step_of_checkpoint(run_dir: Path) -> int:
    return json.loads((newest_checkpoint(run_dir) / "state.json").read_text())["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_a_step(straight, tmp_path, number):
    run_dir = tmp_path / "run"
    program = Program(command(run_dir), tmp_path / "out", Disturbance(hold=STEP, hold_at=(3,)))
    program.wait_until_held()
    stop(program, number)
    assert len(rows_of(run_dir)) == step_of_checkpoint(run_dir) == 3, "the step in hand is finished and saved"
    assert f"stopped after step 3 of {STEPS}" in program.text()
    assert "the same command goes on from there" in program.text()
    assert_goes_on(run_dir, straight, tmp_path)


def test_a_signal_that_comes_twice_at_once_is_one(straight, tmp_path):
    """As Slurm's, which goes to the launcher and to the processes that the launcher passes it on to."""
    run_dir = tmp_path / "run"
    program = Program(command(run_dir), tmp_path / "out", Disturbance(hold=STEP, hold_at=(3,)))
    program.wait_until_held()
    program.send(signal.SIGTERM)
    time.sleep(0.05)
    stop(program)
    assert len(rows_of(run_dir)) == step_of_checkpoint(run_dir) == 3
    assert_goes_on(run_dir, straight, tmp_path)


@pytest.mark.parametrize(
    ("function", "expected", "hold"),
    # The clips, sampler's steps and halves of step 0, where there is nothing to save yet, come before.
    [
        ("validation", "step 4/12: ", Disturbance(hold=VALIDATION, hold_at=(4,))),
        ("rendering", "step 6/12: ", Disturbance(hold=SAMPLING, hold_at=(45,))),
        ("decoding", "step 6/12: ", Disturbance(hold=DECODING, hold_at=(3,))),
    ],
)
def test_stopped_while_it_evaluates(straight, tmp_path, function, expected, hold):
    run_dir = tmp_path / "run"
    program = Program(command(run_dir), tmp_path / "out", hold)
    program.wait_until_held()
    # Of all steps' lines it is the last.
    assert expected in program.err.splitlines()[-2]
    stop(program)
    saved, rows = step_of_checkpoint(run_dir), rows_of(run_dir)
    assert saved == len(rows) == (4 if function == "validation" else 6)
    if function == "validation":
        assert [row["step"] for row in rows_of(run_dir, "validation")] == [0], "it was broken off"
    assert not list((run_dir / "samples").glob("step_000006*")), "no part of a video is left"
    assert_goes_on(run_dir, straight, tmp_path)


def test_stopped_while_it_waits_for_data(straight, tmp_path):
    """A disk that does not answer holds no process up: finished steps are saved at once."""
    run_dir = tmp_path / "run"
    program = Program(command(run_dir), tmp_path / "out", Disturbance(hold=READING, hold_at=(8,)))
    program.wait_until_held()
    program.wait_until(lambda: len(rows_of(run_dir)) == 3)
    # Not to test the same as another test: time to get from the last step to the waiting. If it is not, nothing fails.
    time.sleep(0.5)
    program.send(signal.SIGTERM)
    assert program.wait() == 128 + signal.SIGTERM, program.text()
    assert len(rows_of(run_dir)) == step_of_checkpoint(run_dir) == 3
    assert_goes_on(run_dir, straight, tmp_path)


def test_sigusr1_while_it_waits_for_data_saves_at_once(straight, tmp_path):
    run_dir = tmp_path / "run"
    hang = Disturbance(hold=READING, hold_at=(8,))
    program = Program(command(run_dir, "train.steps=5"), tmp_path / "out", hang)
    program.wait_until_held()
    program.wait_until(lambda: len(rows_of(run_dir)) == 3)
    program.send(signal.SIGUSR1)
    program.wait_until(lambda: (run_dir / "checkpoints/step_000003/manifest.json").exists())
    assert len(rows_of(run_dir)) == 3, "it still waits"
    program.send(signal.SIGKILL)
    program.wait()
    code, text = run_program(command(run_dir), tmp_path / "again")
    assert code == 0 and "from step 3" in text, text
    assert_same_end(run_dir, straight)


@pytest.mark.parametrize("place", ["a save", "rendering"])
def test_sigusr1_in_a_save_or_in_rendering_is_followed(straight, tmp_path, place):
    run_dir = tmp_path / "run"
    if place == "a save":
        in_the_save = Disturbance(run_dir, signal_before=".tmp_000005/state.json", signal=signal.SIGUSR1)
        code, text = run_program(command(run_dir), tmp_path / "out", in_the_save)
        assert code == 0, text
        assert (run_dir / "checkpoints/step_000006").exists(), "no interval falls on it"
    else:
        hold = Disturbance(hold=SAMPLING, hold_at=(45, 50))
        program = Program(command(run_dir), tmp_path / "out", hold)
        program.wait_until_held()
        assert "step 6/12: " in program.err
        program.send(signal.SIGUSR1)
        program.release()
        program.wait_until_held(2)
        assert (run_dir / "checkpoints/step_000006/manifest.json").exists(), "while it renders"
        program.release()
        assert program.wait() == 0, program.text()
    assert_same_end(run_dir, straight)


def test_stopped_in_a_save(straight, tmp_path):
    run_dir = tmp_path / "run"
    in_the_save = Disturbance(run_dir, signal_before=".tmp_000005/state.json", signal=signal.SIGTERM)
    program = Program(command(run_dir), tmp_path / "out", in_the_save)
    assert program.wait() == 128 + signal.SIGTERM, program.text()
    # It came in step 5's save, which was made; the next step ended the run.
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_000005", "step_000006"]
    assert_goes_on(run_dir, straight, tmp_path)


def test_stopped_before_the_first_step(tmp_path):
    at_step_0 = Disturbance(hold=VALIDATION, hold_at=(1,))
    program = Program(command(tmp_path / "run"), tmp_path / "out", at_step_0)
    program.wait_until_held()
    stop(program)
    assert program.err.splitlines()[-1] == "mochi-tune: there is no checkpoint yet; the same command starts over"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_sigusr1_saves_and_goes_on_and_sigterm_still_stops(straight, tmp_path):
    run_dir = tmp_path / "run"
    program = Program(command(run_dir), tmp_path / "out", Disturbance(hold=STEP, hold_at=(2, 3)))
    program.wait_until_held()
    program.send(signal.SIGUSR1)
    program.release()
    program.wait_until_held(2)
    assert step_of_checkpoint(run_dir) == 2, "no interval falls on it"
    stop(program)
    assert step_of_checkpoint(run_dir) == 3
    assert_goes_on(run_dir, straight, tmp_path)


def test_sigusr1_while_it_evaluates_saves_the_step_that_is_done(straight, tmp_path):
    run_dir = tmp_path / "run"
    program = Program(command(run_dir), tmp_path / "out", Disturbance(hold=VALIDATION, hold_at=(4, 5)))
    program.wait_until_held()
    program.send(signal.SIGUSR1)
    program.release()
    program.wait_until_held(2)
    assert (run_dir / "checkpoints/step_000004/manifest.json").exists()
    assert [row["step"] for row in rows_of(run_dir, "validation")] == [0], "while it validates"
    program.release()
    assert program.wait() == 0
    assert_same_end(run_dir, straight)


def test_a_second_sigterm_a_while_later_ends_at_once(straight, tmp_path):
    run_dir = tmp_path / "run"
    hang = Disturbance(hold=STEP, hold_at=(4,))
    program = Program(command(run_dir, "train.checkpoint_every=2"), tmp_path / "out", hang)
    program.wait_until_held()
    program.send(signal.SIGTERM)
    time.sleep(REPEAT_SECONDS + 0.5)
    assert program.process.is_alive(), "a step that hangs cannot be finished"
    program.send(signal.SIGTERM)
    assert program.wait() == -signal.SIGTERM
    code, text = run_program(command(run_dir), tmp_path / "again")
    assert code == 0 and "from step 2" in text
    assert_same_end(run_dir, straight)


def test_stopped_while_it_compiles(tmp_path):
    """Between two graphs, as each takes some seconds; the step is not made, and the same command compiles the rest."""
    arguments = [
        "train", "conf=my_lora",
        *road(tmp_path / "run", "lora=attention", "train.steps=2", "train.compile=true", "train.recompute=block"),
    ]  # fmt: skip
    compiled = tmp_path / "compiled"
    program = Program(arguments, tmp_path / "log", env={"TORCHINDUCTOR_CACHE_DIR": str(compiled)})
    program.wait_until(lambda: any(compiled.rglob("*.cpp")))
    program.send(signal.SIGTERM)
    assert program.wait() == 128 + signal.SIGTERM, program.text()
    assert rows_of(tmp_path / "run") == []
    code, text = run_program([*arguments, "train.compile=false"], tmp_path / "again")
    assert code == 0 and [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2], text


def test_under_nohup_a_hangup_ends_nothing_and_a_stop_of_one_process_is_one_of_the_run(tmp_path):
    """By real starts: the launcher keeps what its own parent ignores, and hears of a stop that only a rank got."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    more = ["train.steps=100000", "train.checkpoint_every=90000", "train.ema_decay=0", "train.validate_every=0"]
    settings = road(run_dir, *LORA, *more, "parallel=data", "parallel.num_processes=2")
    program = ["nohup", sys.executable, "-m", "mochi_tune.cli", "train", "conf=my_lora", *settings]
    with open(log, "wb") as out:
        launcher = subprocess.Popen(program, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    num_rows = lambda: len(rows_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0  # noqa: E731
    wait_for(lambda: num_rows() > 2 or launcher.poll() is not None)
    assert launcher.poll() is None, log.read_text()
    os.killpg(launcher.pid, signal.SIGHUP)
    before = num_rows()
    wait_for(lambda: num_rows() > before + 20 or launcher.poll() is not None)
    os.kill(json.loads((run_dir / ".lock").read_text())["pid"], signal.SIGTERM)
    assert launcher.wait(600) == 128 + signal.SIGTERM, log.read_text()
    assert "the same command goes on from there" in log.read_text() and newest_checkpoint(run_dir).is_dir()


def wait_for(is_so) -> None:
    end = time.monotonic() + 600
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)
