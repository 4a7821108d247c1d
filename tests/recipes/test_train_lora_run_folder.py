"""What a run leaves in its folder, and what it does with what it finds there."""

import json
import re
import shutil
import signal
import time

import pytest
import torch
from helpers_process import PATIENCE, Disturbance, Program, run, run_program
from helpers_road import LORA, read_rows, road, train
from PIL import Image

from mochi_tune.cli import main as cli
from mochi_tune.config.load import load_config
from mochi_tune.errors import TrainingError
from mochi_tune.recipes.train_lora import main
from mochi_tune.training.evaluate import EvalVideos
from mochi_tune.training.run import Run


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    assert train(tmp_path, "train.steps=5", "train.checkpoint_every=1", "train.keep_checkpoints=2") == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000004", "step_000005"]


def test_a_step_is_saved_before_it_is_evaluated_and_the_evaluation_is_made_up_for(tmp_path, monkeypatch):
    """An evaluation takes long and may fail; its results are not lost with it."""
    more = ["train.steps=4", "train.checkpoint_every=2", "train.sample_every=2", "train.validate_every=2"]
    more += ["train.sample_prompts=[a cat]", "sample.steps=2", "train.validation_clips=1"]
    config = load_config("my_lora", [*road(tmp_path, *LORA), *more])

    def fail_at_step_2(_videos, _dit, step):
        if step == 2:
            raise RuntimeError("the renderer is broken")

    with monkeypatch.context() as patch:
        patch.setattr(EvalVideos, "render", fail_at_step_2)
        with pytest.raises(RuntimeError, match="the renderer is broken"):
            main(config)
    assert (tmp_path / "checkpoints" / "step_000002").exists()
    assert main(config) == 0
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [0, 2, 4]
    videos = sorted(path.name for path in (tmp_path / "samples").glob("*.mp4"))
    # The broken renderer has passed over step 0.
    assert videos == ["step_000002_prompt_0.mp4", "step_000004_prompt_0.mp4"]


def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_nothing_to_the_next(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000000_prompt_0.mp4").write_bytes(b"of other settings")
    (tmp_path / "validation.jsonl").write_text('{"step": 0, "validation_loss": 99.0}\n')
    assert train(tmp_path, "train.steps=1", "train.validate_every=1", "train.validation_clips=1") == 0
    assert not (tmp_path / "samples" / "step_000000_prompt_0.mp4").exists()
    rows = read_rows(tmp_path / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and rows[0]["validation_loss"] < 10


def test_an_adapter_without_checkpoints_is_not_overwritten(tmp_path):
    assert train(tmp_path, "train.steps=1") == 0
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / "adapter.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        train(tmp_path, "train.steps=1")
    assert (tmp_path / "adapter.safetensors").read_bytes() == before


def test_the_same_command_puts_a_finished_runs_adapter_back(tmp_path):
    assert train(tmp_path, "train.steps=1") == 0
    before = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").unlink()
    assert train(tmp_path, "train.steps=1") == 0
    assert (tmp_path / "adapter.safetensors").read_bytes() == before


def test_more_steps_go_on_and_say_that_the_cosine_is_stretched(tmp_path, capsys):
    assert train(tmp_path, "train.steps=2") == 0
    assert train(tmp_path, "train.steps=4") == 0
    assert "train.steps was 2, is 4" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_out_of_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def no_memory(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    # The clips are prepared before, if no test has done that.
    arguments = road(tmp_path, *LORA, "train.steps=2")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", no_memory)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "conf=my_lora", *arguments])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mochi-tune: the GPU's memory does not suffice in a step (CUDA out of memory)")
    assert "held are 1.3 GiB of the GPU" in line and "lower data.num_frames" in line and "train.batch_size" in line


def test_wandb_works_offline(tmp_path):
    # A process of its own, as its end is when W&B's service has written everything.
    done = run("train", "conf=my_lora", *road(tmp_path, *LORA, "train.steps=2", "log.wandb=offline"))
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("trackers/wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + PATIENCE
    while file.stat().st_size <= 1000 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert file.stat().st_size > 1000


def test_the_printed_line_of_progress_shows_loss_norm_rate_and_time(tmp_path):
    done = run("train", "conf=my_lora", *road(tmp_path, *LORA, "train.steps=2"))
    assert done.returncode == 0
    for part in ("loss ", "norm ", "lr ", "s/step", "2/2"):
        assert part in done.stderr
    assert str(tmp_path / "adapter.safetensors") in done.stdout
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


def test_eval_stills_are_pictures(tmp_path):
    more = ["train.steps=1", "train.sample_every=1", "train.sample_prompts=[a cat]", "sample.steps=1"]
    assert train(tmp_path, *more, "sample.num_frames=1") == 0
    stills = sorted((tmp_path / "samples").glob("step_*.png"))
    assert [path.name for path in stills] == ["step_000000_prompt_0.png", "step_000001_prompt_0.png"]
    with Image.open(stills[0]) as picture:
        # Without an adapter yet, both halves are the base.
        left, right = (picture.crop((x, 0, x + 48, 32)).tobytes() for x in (0, 48))
        assert picture.size == (96, 32) and left == right


MOVED = ["train.checkpoint_every=2", "train.keep_checkpoints=9", "train.schedule=constant", "train.warmup_steps=0"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_run_whose_folder_is_moved_saves_its_step_there_and_ends(tmp_path, monkeypatch, is_replaced):
    """Another run may have begun at its path: it keeps its files."""
    run_dir, moved, straight = tmp_path / "run", tmp_path / "moved", tmp_path / "straight"
    other = [b"another run's adapter", b"another run's report"]

    def move_at_step_3(self, result):
        finish_step(self, result)
        if self.step == 3:
            run_dir.rename(moved)
            if is_replaced:
                (run_dir / "checkpoints" / "step_000001").mkdir(parents=True)
                for name, content in zip(("adapter.safetensors", "report.html"), other, strict=True):
                    (run_dir / name).write_bytes(content)

    finish_step = Run.finish_step
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_step", move_at_step_3)
        with pytest.raises(TrainingError) as error:
            train(run_dir, *MOVED, "train.steps=6")
    assert f"{run_dir} was moved to {moved}" in str(error.value)
    assert f"the last checkpoint is {moved / 'checkpoints/step_000004'}" in str(error.value)
    if is_replaced:
        assert [(run_dir / name).read_bytes() for name in ("adapter.safetensors", "report.html")] == other
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]
        shutil.rmtree(run_dir)
    else:
        assert not run_dir.exists()
    moved.rename(run_dir)
    assert train(run_dir, *MOVED, "train.steps=6") == train(straight, *MOVED, "train.steps=6") == 0
    assert [row["loss"] for row in read_rows(run_dir / "metrics.jsonl")] == [
        row["loss"] for row in read_rows(straight / "metrics.jsonl")
    ]


def test_the_main_process_alone_reports_that_the_folder_was_moved(tmp_path):
    run_dir, settings = tmp_path / "run", ["train.steps=9999", "train.accumulation_steps=2", "parallel.num_processes=2"]
    program = Program(["train", "conf=my_lora", *road(run_dir, *LORA, *settings)], tmp_path / "log")
    rows, deadline = run_dir / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (rows.exists() and rows.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    run_dir.rename(tmp_path / "moved")
    code, text = program.wait(), program.text()
    assert code == 2 and "move the folder back" in text and "lost contact" not in text, text


def test_a_run_whose_folder_is_removed_ends_at_the_next_step(tmp_path, monkeypatch):
    finish_step = Run.finish_step

    def remove_at_step_1(self, result):
        finish_step(self, result)
        if self.step == 1:
            shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(Run, "finish_step", remove_at_step_1)
    with pytest.raises(TrainingError, match="was moved or removed while this run trained in it"):
        train(tmp_path / "run", *MOVED, "train.steps=6")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("folder", "ending", "nth"),
    [
        ("samples", "step_000002_prompt_0.mp4.tmp", 1),
        ("samples", "step_000002_prompt_0.txt.tmp", 3),
        ("base_latents", ".safetensors.tmp", 3),
    ],
)
def test_what_a_kill_left_of_an_evaluation_is_removed(tmp_path, folder, ending, nth):
    run_dir = tmp_path / "run"
    settings = ["train.steps=2", "train.sample_every=2", "train.sample_prompts=[a cat]", "sample.steps=2"]
    # Before the temporary file takes its name.
    kill = Disturbance(run_dir / folder, signal_before=ending, nth=nth)
    code, out = run_program(["train", "conf=my_lora", *road(run_dir, *LORA, *settings)], tmp_path / "log", kill)
    assert code == -signal.SIGKILL, out
    assert list((run_dir / folder).glob(".*.tmp"))
    (run_dir / "samples" / "..step_000002_prompt_0.mp4.abcdef-1.tmp.abcdef-1.tmp").touch()
    # `sample` may be writing this one.
    other = run_dir / "samples" / ".step_by_step_prompt_0.mp4.abcdef-1.tmp"
    other.touch()
    assert train(run_dir, *settings) == 0
    assert list(run_dir.rglob(".*.tmp")) == [other]


def test_the_closing_lines_say_that_the_checkpoint_of_the_best_step_is_gone(tmp_path, capsys):
    more = [*MOVED, "train.keep_checkpoints=1", "train.validate_every=1", "train.validation_clips=1"]
    # At this rate it learns at first and is then ruined.
    assert train(tmp_path, *more, "train.steps=8", "train.learning_rate=3e-2", "train.keep_best=true") == 0
    step = min(read_rows(tmp_path / "validation.jsonl"), key=lambda row: row["validation_loss"])["step"]
    assert 0 < step < 8
    best = rf"best: step {step}, validation loss \d\.\d{{4}}"
    assert re.search(rf"{best}$", capsys.readouterr().out, re.MULTILINE)
    assert train(tmp_path, *more, "train.steps=9", "train.learning_rate=3e-2", "train.keep_best=false") == 0
    assert re.search(rf"{best}; its checkpoint was not kept$", capsys.readouterr().out, re.MULTILINE)
