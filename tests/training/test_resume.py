"""Resuming runs of versions before 0.2, whose checkpoints and rows record less."""

import json
import shutil
from pathlib import Path

import pytest
from helpers_checkpoints import edit_state
from helpers_road import read_rows, train

from mochi_tune.errors import TrainingError
from mochi_tune.files import read_json
from mochi_tune.training.metrics import Metrics, comparable
from mochi_tune.training.resume import ResumePoint, check_rows
from mochi_tune.training.run import Run

MORE = ["train.validate_every=1", "train.validation_clips=1", "train.schedule=constant"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("older") / "run"
    assert train(run_dir, *MORE, "train.steps=2") == 0
    return run_dir


@pytest.fixture
def run_dir(made, tmp_path) -> Path:
    """A run of two steps, whose validations do not say what they measured."""
    shutil.copytree(made, tmp_path / "run")
    rows = (tmp_path / "run" / "validation.jsonl").read_text()
    (tmp_path / "run" / "validation.jsonl").write_text(rows.replace('"measured_on"', '"of_later_versions"'))
    return tmp_path / "run"


@pytest.mark.parametrize("cache", [None, "another"])
def test_validations_that_say_nothing_are_compared_where_the_cache_is_the_same(run_dir, cache):
    if cache:
        edit_state(run_dir / "checkpoints" / "step_000002", cache=cache)
    assert train(run_dir, *MORE, "train.steps=3") == 0
    steps = [row["step"] for row in comparable(read_rows(run_dir / "validation.jsonl"))]
    assert steps == ([3] if cache else [0, 1, 2, 3])


def test_other_validation_clips_are_others_though_the_cache_is_the_same(run_dir):
    assert train(run_dir, *MORE, "train.steps=3", "train.validation_clips=2", "resume=force") == 0
    assert [row["step"] for row in comparable(read_rows(run_dir / "validation.jsonl"))] == [3]


@pytest.mark.parametrize("ends_at", [2, 3])
def test_a_start_with_other_validation_clips_that_saves_nothing_leaves_the_losses_comparable(
    run_dir, monkeypatch, ends_at
):
    """The start ends before its first step, or after the validation of step 3 and before a checkpoint."""
    steps = Run.steps

    def end(run):
        for step in steps(run):
            if step == ends_at + 1:
                raise RuntimeError("the machine is gone")
            yield step

    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", end)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(run_dir, *MORE, "train.steps=4", "train.validation_clips=2", "train.checkpoint_every=4")
    assert [row["step"] for row in read_rows(run_dir / "validation.jsonl")] == list(range(ends_at + 1))
    assert train(run_dir, *MORE, "train.steps=3") == 0
    assert [row["step"] for row in comparable(read_rows(run_dir / "validation.jsonl"))] == [0, 1, 2, 3]


def test_a_run_that_kept_no_order_goes_on_where_its_rows_show_that_it_is_the_same(run_dir, capsys):
    edit_state(run_dir / "checkpoints" / "step_000002", order=None)
    path = run_dir / "metrics.jsonl"
    rows = path.read_text()
    [clip] = read_rows(path)[-1]["clips"]
    path.write_text(rows.replace(f'"clips": ["{clip}"]', '"clips": ["another.mp4"]'))
    with pytest.raises(TrainingError, match=r"did not store the order of the clips: start another run.*resume=force"):
        train(run_dir, *MORE, "train.steps=3")
    # A finished run does not need the order.
    assert train(run_dir, *MORE, "train.steps=2") == 0
    assert "is already trained to step 2" in capsys.readouterr().out
    path.write_text(rows)
    assert train(run_dir, *MORE, "train.steps=3") == 0
    assert [row["step"] for row in comparable(read_rows(run_dir / "validation.jsonl"))] == [0, 1, 2, 3]


def test_a_run_of_version_0_1_0_goes_on_over_its_clips_encoded_again(run_dir):
    folder = run_dir / "checkpoints" / "step_000002"
    state = read_json(folder / "state.json")
    settings = {key: value for key, value in state["settings"].items() if key != "train.recompute"}
    settings["train.gradient_checkpointing"] = True
    made_by = {"torch": "2.9.0", "processes": 1}
    edit_state(folder, order=None, cache="another", environment=None, made_by=made_by, settings=settings)
    assert train(run_dir, *MORE, "train.steps=3", "train.recompute=block") == 0
    notes = read_rows(run_dir / "history.jsonl")[-1]["notes"]
    assert "train.recompute" not in " ".join(notes)
    assert any(note.startswith("torch was 2.9.0, is ") for note in notes)
    assert any("clips were encoded again; their order is the same" in note for note in notes)


def test_a_branch_that_was_stopped_before_its_first_checkpoint_is_asked_for_again(run_dir):
    with open(run_dir / "history.jsonl", "a") as file:
        file.write(json.dumps({"from_step": 9, "resume_from": "other/step_000009"}) + "\n")
    here = run_dir / "checkpoints" / "step_000002"
    with pytest.raises(TrainingError, match=rf"resume_from=other/step_000009 again, or resume_from={here} to go on"):
        train(run_dir, *MORE, "train.steps=3")
    assert train(run_dir, *MORE, "train.steps=3", f"resume_from={here}") == 0


def test_what_was_forced_is_that_order_of_the_clips_and_no_other(run_dir, monkeypatch):
    def end(_run):
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", end)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(run_dir, *MORE, "train.steps=3", "seed=7", "resume=force")
    path = run_dir / "history.jsonl"
    history, order = path.read_text(), read_rows(path)[-1]["order"]
    path.write_text(history.replace(order, "another"))
    with pytest.raises(TrainingError, match="seed was 0, is 7: undo that"):
        train(run_dir, *MORE, "train.steps=3", "seed=7")
    path.write_text(history)
    assert train(run_dir, *MORE, "train.steps=3", "seed=7") == 0


def test_rows_that_were_removed_since_the_checkpoint_are_reported(tmp_path, capsys):
    with Metrics(tmp_path, 0) as metrics:
        metrics.log({"step": 1})
        metrics.log_validation({"step": 1, "validation_loss": 0.5})
        check_rows(metrics, ResumePoint(1, state={"rows": {"metrics": 1, "validation": 0}}))
        assert not capsys.readouterr().out
        check_rows(metrics, ResumePoint(1, state={"rows": {"metrics": 1, "validation": 2}}))
        assert "validation.jsonl has 1 rows up to step 1, but had 2" in capsys.readouterr().out
