"""Asked to stop or to save, wherever it is, a run does so within seconds and loses nothing."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers_faults import Disturbance, Program, assert_same_end, newest_checkpoint, rows_of, run_program
from helpers_road import LORA, road

STEPS = 12
SETTINGS = [
    *LORA, f"train.steps={STEPS}", "train.batch_size=2", "train.accumulation_steps=2", "train.checkpoint_every=5",
    "train.ema_decay=0.9", "train.validate_every=4", "train.validation_clips=3", "train.sample_every=6",
    "train.sample_prompts=[a red ball]", "sample.steps=40",
]  # fmt: skip
# Slow enough for a signal to come in the middle, and still over in time.
VALIDATION = Disturbance(slow="mochi_tune.training.evaluate:collate", slow_from=4, seconds=1.0)
DECODING = Disturbance(slow="mochi_tune.training.evaluate:to_vae_latents", slow_from=3, seconds=1.0)
STEP = Disturbance(slow="mochi_tune.training.run:merge_parts", slow_from=3, seconds=0.5)


def command(run_dir: Path, *more: str) -> list[str]:
    return ["train", "conf=my_lora", *(a for a in road(run_dir, *SETTINGS, *more) if a != "train.sample_every=0")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    code, text = run_program(command(folder / "run"), folder / "out")
    assert code == 0, text
    return folder / "run"


def stop(program: Program, number: int = signal.SIGTERM) -> None:
    """Sends a signal and makes sure that it is followed in time."""
    program.send(number)
    started = time.monotonic()
    assert program.wait(30) == 128 + number, program.text()
    assert time.monotonic() - started < 30


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
    program = Program(command(run_dir), tmp_path / "out", STEP)
    program.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(rows_of(run_dir)) >= 2)
    stop(program, number)
    done = len(rows_of(run_dir))
    assert 2 <= done < STEPS and step_of_checkpoint(run_dir) == done, "the step in hand is finished and saved"
    assert f"stopped after step {done} of {STEPS}" in program.text()
    assert "the same command goes on from there" in program.text()
    assert_goes_on(run_dir, straight, tmp_path)


@pytest.mark.parametrize(
    ("place", "shown", "slow"),
    [
        ("validation", "validation:   0%", VALIDATION),
        ("rendering", "step_000006_prompt_0:   0%", Disturbance()),
        ("decoding", "step_000006_prompt_0:   0%", DECODING),
    ],
)
def test_stopped_in_a_look(straight, tmp_path, place, shown, slow):
    run_dir = tmp_path / "run"
    # Not at step 0, where there is nothing to save yet.
    program = Program(command(run_dir), tmp_path / "out", slow)
    program.wait_until(lambda: shown in program.text().partition("1/12")[2], timeout=60)
    stop(program)
    saved, rows = step_of_checkpoint(run_dir), rows_of(run_dir)
    assert saved == len(rows) == (4 if place == "validation" else 6)
    if place == "validation":
        assert [row["step"] for row in rows_of(run_dir, "validation")] == [0], "it was broken off"
    assert not list((run_dir / "samples").glob("step_000006*")), "no part of a video is left"
    assert_goes_on(run_dir, straight, tmp_path)


def test_stopped_while_it_waits_for_data(straight, tmp_path):
    """A disk that does not answer holds nobody up: what is done is saved at once."""
    run_dir = tmp_path / "run"
    hang = Disturbance(slow="mochi_tune.training.loader:collate", slow_from=8, seconds=3600)
    program = Program(command(run_dir), tmp_path / "out", hang)
    program.wait_until(lambda: "slow: collate" in program.text() and len(rows_of(run_dir)) == 3)
    time.sleep(0.5)
    stop(program)
    assert len(rows_of(run_dir)) == step_of_checkpoint(run_dir) == 3
    assert_goes_on(run_dir, straight, tmp_path)


def test_sigusr1_while_it_waits_for_data_saves_at_once(straight, tmp_path):
    run_dir = tmp_path / "run"
    slow = Disturbance(slow="mochi_tune.training.loader:collate", slow_from=8, seconds=5)
    program = Program(command(run_dir, "train.steps=5"), tmp_path / "out", slow)
    program.wait_until(lambda: "slow: collate" in program.text() and len(rows_of(run_dir)) == 3)
    program.send(signal.SIGUSR1)
    program.wait_until(lambda: (run_dir / "checkpoints/step_000003/manifest.json").exists(), timeout=4)
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
        in_the_save = Disturbance(str(run_dir), signal_before=".tmp_000005/state.json", signal=signal.SIGUSR1)
        code, text = run_program(command(run_dir), tmp_path / "out", in_the_save)
        assert code == 0, text
        assert (run_dir / "checkpoints/step_000006").exists(), "no interval falls on it"
    else:
        program = Program(command(run_dir), tmp_path / "out")
        program.wait_until(lambda: "step_000006_prompt_0:   0%" in program.text())
        program.send(signal.SIGUSR1)
        program.wait_until(lambda: (run_dir / "checkpoints/step_000006/manifest.json").exists(), timeout=30)
        assert program.wait() == 0, program.text()
    assert_same_end(run_dir, straight)


def test_stopped_in_a_save(straight, tmp_path):
    run_dir = tmp_path / "run"
    program = Program(
        command(run_dir), tmp_path / "out", Disturbance(str(run_dir), signal_before=".tmp_000005/state.json")
    )
    assert program.wait(30) == 128 + signal.SIGTERM, program.text()
    # It came in step 5's save, which was made; the next step ended the run.
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step_000005", "step_000006"]
    assert_goes_on(run_dir, straight, tmp_path)


def test_stopped_before_the_first_step(tmp_path):
    at_step_0 = Disturbance(slow="mochi_tune.training.evaluate:collate", seconds=1.0)
    program = Program(command(tmp_path / "run"), tmp_path / "out", at_step_0)
    program.wait_until(lambda: "validation:   0%" in program.text())
    stop(program)
    assert "there is no checkpoint yet" in program.text() and not (tmp_path / "run" / "checkpoints").exists()


def test_sigusr1_saves_and_goes_on_and_sigterm_still_stops(straight, tmp_path):
    run_dir = tmp_path / "run"
    program = Program(command(run_dir), tmp_path / "out", STEP)
    program.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(rows_of(run_dir)) >= 2)
    program.send(signal.SIGUSR1)
    program.wait_until(lambda: bool(list(run_dir.glob("checkpoints/step_*/manifest.json"))), timeout=30)
    asked = step_of_checkpoint(run_dir)
    assert asked in (2, 3, 4), "no interval falls on it"
    program.wait_until(lambda: len(rows_of(run_dir)) > asked)
    stop(program)
    assert step_of_checkpoint(run_dir) > asked
    assert_goes_on(run_dir, straight, tmp_path)


def test_sigusr1_in_a_look_saves_the_step_that_is_done(straight, tmp_path):
    run_dir = tmp_path / "run"
    program = Program(command(run_dir), tmp_path / "out", VALIDATION)
    program.wait_until(lambda: "validation:   0%" in program.text().partition("1/12")[2])
    program.send(signal.SIGUSR1)
    program.wait_until(lambda: (run_dir / "checkpoints/step_000004/manifest.json").exists(), timeout=30)
    assert [row["step"] for row in rows_of(run_dir, "validation")] == [0], "while it validates"
    assert program.wait() == 0
    assert_same_end(run_dir, straight)


def test_a_second_sigterm_ends_at_once(straight, tmp_path):
    run_dir = tmp_path / "run"
    hang = Disturbance(slow="mochi_tune.training.run:merge_parts", slow_from=4, seconds=3600)
    program = Program(command(run_dir, "train.checkpoint_every=2"), tmp_path / "out", hang)
    program.wait_until(lambda: "slow: merged" in program.text())
    program.send(signal.SIGTERM)
    time.sleep(0.5)
    assert program.process.is_alive(), "a step that hangs cannot be finished"
    program.send(signal.SIGTERM)
    assert program.wait(5) == -signal.SIGTERM
    code, text = run_program(command(run_dir), tmp_path / "again")
    assert code == 0 and "from step 2" in text
    assert_same_end(run_dir, straight)
    shutil.rmtree(run_dir)
