"""What the same command makes up for, and what it leaves alone, after a run was broken off, went back or was ended."""

import json
import os
import shutil
import signal

import pytest
import torch
from helpers_road import LORA, prepared, read_rows, road, train

from mochi_tune.config.load import load_config
from mochi_tune.errors import DataError, TrainingError
from mochi_tune.files import load_tensors
from mochi_tune.training.checkpoint import load_adapter_tensors
from mochi_tune.training.preflight import check

EACH = ["train.checkpoint_every=1", "train.keep_checkpoints=9", "train.warmup_steps=0", "train.learning_rate=1e-2"]


def same(ours, theirs) -> bool:
    ours, theirs = load_tensors(ours), load_tensors(theirs)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_that_is_named_is_followed_until_there_is_one_after_it(tmp_path):
    other, run_dir = tmp_path / "other", tmp_path / "run"
    train(other, *EACH, "train.steps=4")
    again = [*EACH, "train.steps=4", f"resume_from={other / 'checkpoints/step_000002'}"]
    train(run_dir, *again)
    # With the rows that led to it.
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]
    # As if it had been killed before its first checkpoint.
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(TrainingError, match=rf"no checkpoint to resume from: give {again[-1]} again, as its last"):
        train(run_dir, *EACH, "train.steps=4")
    train(run_dir, *again)
    assert same(run_dir / "adapter.safetensors", other / "adapter.safetensors")
    # Followed by now: nothing is made again.
    train(run_dir, *again)
    starts = read_rows(run_dir / "history.jsonl")
    assert len(starts) == 2
    # A start that went on from there and was killed before it saved leads to no other place.
    with open(run_dir / "history.jsonl", "a") as file:
        file.write(json.dumps(starts[-1] | {"from_step": 4}) + "\n")
    train(run_dir, *again, "train.steps=5")
    assert read_rows(run_dir / "history.jsonl")[-1]["from_step"] == 4
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def rows_of(run_dir, name="metrics"):
    """The rows of a run, but for its times."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(run_dir / name)]


def checkpoints_of(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


BRANCHED = [
    *EACH, "train.schedule=constant", "train.validate_every=2", "train.validation_clips=1", "train.keep_best=true",
]  # fmt: skip


def test_going_back_to_a_branch_brings_its_rows_and_checkpoints_alone(tmp_path, capsys):
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    train(straight, *BRANCHED, "train.steps=6")
    train(run_dir, *BRANCHED, "train.steps=4")
    back = f"resume_from={run_dir / 'checkpoints/step_000002'}"
    train(run_dir, *BRANCHED, "train.steps=5", "train.learning_rate=5e-2", back, "resume=force")
    other = rows_of(run_dir, "metrics.jsonl")
    assert other[2]["loss"] == rows_of(straight, "metrics.jsonl")[2]["loss"] != other[3]["loss"]
    capsys.readouterr()
    train(run_dir, *BRANCHED, "train.steps=6", f"resume_from={run_dir / 'checkpoints/aside_0_step_000004'}")
    assert "is from another branch" in (out := capsys.readouterr().out)
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert rows_of(run_dir, name) == rows_of(straight, name), name
    assert checkpoints_of(run_dir) == [f"step_00000{step}" for step in (1, 2, 5, 6)], out
    assert same(run_dir / "adapter.safetensors", straight / "adapter.safetensors")
    # Nothing of the other branch is lost.
    kept = run_dir / "checkpoints"
    assert rows_of(kept, "aside_1_metrics.jsonl") == other
    assert {f"aside_1_step_00000{step}" for step in (3, 4, 5)} <= {path.name for path in kept.iterdir()}


def test_another_runs_checkpoint_brings_the_rows_of_that_run(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, *BRANCHED, "train.steps=4", "train.learning_rate=5e-2")
    train(second, *BRANCHED, "train.steps=4")
    train(first, *BRANCHED, "train.steps=5", f"resume_from={second / 'checkpoints/step_000004'}")
    assert rows_of(first, "metrics.jsonl")[:4] == rows_of(second, "metrics.jsonl")
    assert checkpoints_of(first) == ["step_000005"]
    assert checkpoints_of(second) == [f"step_00000{step}" for step in (1, 2, 3, 4)]


def test_a_branch_that_parts_where_the_losses_are_the_same_is_another(tmp_path):
    """The loss of a step is that of the weights before its update, which another rate changes."""
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    for folder in (straight, run_dir):
        train(folder, *BRANCHED, "train.steps=3")
    back = f"resume_from={run_dir / 'checkpoints/step_000002'}"
    train(run_dir, *BRANCHED, "train.steps=3", "train.learning_rate=5e-2", back, "resume=force")
    train(run_dir, *BRANCHED, "train.steps=4", f"resume_from={run_dir / 'checkpoints/aside_0_step_000003'}")
    assert rows_of(run_dir, "metrics.jsonl")[:3] == rows_of(straight, "metrics.jsonl")
    assert checkpoints_of(run_dir) == [f"step_00000{step}" for step in (1, 2, 4)]


@pytest.mark.parametrize("name", ["good", "step_000004"])
def test_a_checkpoint_of_another_branch_is_known_wherever_it_lies(tmp_path, name):
    """A copy in the run's own folder, and one that was put aside and got its name back."""
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    for folder in (straight, run_dir):
        train(folder, *BRANCHED, "train.steps=4")
    kept = run_dir / "checkpoints"
    shutil.copytree(kept / "step_000004", kept / "good")
    back = f"resume_from={kept / 'step_000002'}"
    train(run_dir, *BRANCHED, "train.steps=3", "train.learning_rate=5e-2", back, "resume=force")
    if name != "good":
        (kept / "aside_0_step_000004").rename(kept / name)
    train(run_dir, *BRANCHED, "train.steps=5", f"resume_from={kept / name}")
    for file in ("metrics.jsonl", "validation.jsonl"):
        assert (
            rows_of(run_dir, file)[: 4 if file[0] == "m" else 3]
            == rows_of(straight, file)[: 4 if file[0] == "m" else 3]
        )
    assert "step_000003" not in checkpoints_of(run_dir)


def test_a_named_checkpoint_of_the_run_itself_leaves_what_led_to_it(tmp_path):
    train(tmp_path, *BRANCHED, "train.steps=4")
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], b"{bad\n", *lines[2:]]))
    with pytest.raises(TrainingError, match="line 2 is no row of a run"):
        train(tmp_path, *BRANCHED, "train.steps=4", f"resume_from={tmp_path / 'checkpoints/step_000003'}")
    assert checkpoints_of(tmp_path)[:3] == [f"step_00000{step}" for step in (1, 2, 3)]


def test_a_copy_of_a_checkpoint_that_was_kept_elsewhere_is_the_runs_own(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, *BRANCHED, "train.steps=3")
    before = rows_of(run_dir, "metrics.jsonl")
    shutil.copytree(run_dir / "checkpoints" / "step_000002", tmp_path / "kept" / "good" / "step_000002")
    train(run_dir, *BRANCHED, "train.steps=3", f"resume_from={tmp_path / 'kept/good/step_000002'}")
    assert rows_of(run_dir, "metrics.jsonl") == before
    assert checkpoints_of(run_dir) == [f"step_00000{step}" for step in (1, 2, 3)]


@pytest.mark.parametrize("is_link", [False, True])
def test_the_rows_of_a_checkpoint_are_found_by_a_relative_path_and_through_a_link(tmp_path, monkeypatch, is_link):
    train(tmp_path / "other", *BRANCHED, "train.steps=2")
    monkeypatch.chdir(tmp_path / "other" / "checkpoints")
    if is_link:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "step_000002").symlink_to("other/checkpoints/step_000002")
    train(tmp_path / "run", *BRANCHED, "train.steps=3", "resume_from=step_000002")
    assert rows_of(tmp_path / "run", "metrics.jsonl")[:2] == rows_of(tmp_path / "other", "metrics.jsonl")


def test_a_run_that_goes_back_to_its_end_has_the_settings_of_that(tmp_path, capsys):
    train(tmp_path, *BRANCHED, "train.steps=3", "train.weight_decay=0.02")
    back = [f"resume_from={tmp_path / 'checkpoints/step_000001'}", "resume=force"]
    train(tmp_path, *BRANCHED, "train.steps=3", "train.weight_decay=0.3", *back)
    again = f"resume_from={tmp_path / 'checkpoints/aside_0_step_000003'}"
    train(tmp_path, *BRANCHED, "train.steps=3", "train.weight_decay=0.02", again)
    assert "set train.steps above 3 with this resume_from to continue" in capsys.readouterr().out
    assert load_config(str(tmp_path / "config.yaml"), []).train.weight_decay == 0.02
    # A later start with this file is not forced, nor goes back.
    assert "resume: auto\nresume_from: null\n" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("is_foreign", [False, True])
def test_a_run_that_goes_back_to_its_new_end_has_the_rows_up_to_that(tmp_path, capsys, is_foreign):
    longer = tmp_path / ("other" if is_foreign else "run")
    train(longer, *BRANCHED, "train.steps=6")
    train(tmp_path / "run", *BRANCHED, "train.steps=3" if is_foreign else "train.steps=6")
    capsys.readouterr()
    named = f"resume_from={longer / 'checkpoints/step_000004'}"
    assert train(tmp_path / "run", *BRANCHED, "train.steps=4", named) == 0
    said = capsys.readouterr().out
    assert "last: step 4, validation loss" in said and "step 6" not in said
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in read_rows(tmp_path / "run" / "validation.jsonl")] == [0, 2, 4]
    assert "step 6" not in (tmp_path / "run" / "report.html").read_text()


def test_another_try_from_one_checkpoint_is_made_and_the_same_one_goes_on(tmp_path, capsys):
    train(tmp_path, *BRANCHED, "train.steps=3")
    back = ["train.steps=3", f"resume_from={tmp_path / 'checkpoints/step_000002'}", "resume=force"]
    for rate in ("5e-2", "1e-3"):
        train(tmp_path, *BRANCHED, f"train.learning_rate={rate}", *back)
        assert read_rows(tmp_path / "metrics.jsonl")[-1]["lr"] == float(rate)
    capsys.readouterr()
    train(tmp_path, *BRANCHED, "train.learning_rate=1e-3", *back)
    assert "was used before: the run resumes from its newest checkpoint" in capsys.readouterr().out


def test_a_checkpoint_is_the_same_however_its_path_is_spelt(tmp_path, capsys, monkeypatch):
    train(tmp_path, *EACH, "train.steps=3")
    train(tmp_path, *EACH, "train.steps=3", f"resume_from={tmp_path / 'checkpoints/step_000002'}")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for again in (f"{tmp_path}/checkpoints/step_000002/", "checkpoints/step_000002"):
        train(tmp_path, *EACH, "train.steps=3", f"resume_from={again}")
        assert "is already trained to step 3" in capsys.readouterr().out


def test_the_best_step_is_kept_though_no_checkpoint_was_due(tmp_path):
    # At this rate it learns at first and is then ruined.
    more = ["train.validate_every=1", "train.checkpoint_every=0", "train.learning_rate=3e-2", "train.warmup_steps=0"]
    more += ["train.validation_clips=1", "train.schedule=constant", "train.keep_checkpoints=1", "train.keep_best=true"]
    train(tmp_path, *more, "train.steps=8")
    losses = {row["step"]: row["validation_loss"] for row in read_rows(tmp_path / "validation.jsonl") if row["step"]}
    best = min(losses, key=losses.get)
    assert best < 8
    assert checkpoints_of(tmp_path) == [f"step_{best:06d}", "step_000008"]


def test_best_steps_take_no_place_of_the_newest(tmp_path):
    more = [
        "train.validate_every=1",
        "train.validation_clips=1",
        "train.checkpoint_every=4",
        "train.keep_checkpoints=2",
    ]
    more += ["train.steps=12", "train.learning_rate=1e-3", "train.warmup_steps=0", "train.keep_best=true"]
    train(tmp_path, *more)
    assert {"step_000008", "step_000012"} <= set(checkpoints_of(tmp_path))
    assert len(checkpoints_of(tmp_path)) <= 3


def test_every_nth_step_is_kept_though_no_checkpoint_was_due(tmp_path):
    train(tmp_path, "train.steps=7", "train.keep_every=3", "train.checkpoint_every=4", "train.keep_checkpoints=1")
    assert checkpoints_of(tmp_path) == ["step_000003", "step_000006", "step_000007"]


def test_trackers_get_what_was_made_again_after_going_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, *EACH, "train.steps=4", "log.tensorboard=true", "train.schedule=constant")
    other = ["train.steps=4", "log.tensorboard=true", "train.schedule=constant", "train.learning_rate=5e-2"]
    train(tmp_path, *EACH, *other, f"resume_from={tmp_path / 'checkpoints/step_000002'}", "resume=force")
    events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard"))
    events.Reload()
    rates = {event.step: event.value for event in events.Scalars("metrics/lr")}
    assert rates == pytest.approx({1: 1e-2, 2: 1e-2, 3: 5e-2, 4: 5e-2})


def test_videos_of_sample_stay_where_those_of_later_steps_go(tmp_path):
    train(tmp_path, *EACH, "train.steps=2")
    names = ["step_by_step_a_dancer_climbs_seed_0_001.mp4", "step_9_to_heaven.json", "step_000002_prompt_0.mp4"]
    for name in [*names, "step_000009_prompt_0.mp4", "step_000009_prompt_0.txt"]:
        (tmp_path / "samples" / name).touch()
    (tmp_path / "samples" / "step_up_seed_0_001").mkdir()
    train(tmp_path, *EACH, "train.steps=2")
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {*names, "step_up_seed_0_001"}


def test_an_evaluation_of_the_last_step_that_was_broken_off_is_made_up_for(tmp_path, capsys):
    settings = ["train.steps=2", "train.validate_every=2", "train.validation_clips=1", "train.sample_every=2"]
    settings += ["train.sample_prompts=[a cat]", "sample.steps=2", "sample.num_frames=7"]
    # Nobody can write a file in a folder's place, or a folder in a file's; not even root, who may run this.
    (tmp_path / "samples" / "step_000002_prompt_0.txt").mkdir(parents=True)
    (tmp_path / "base_latents").touch()
    assert train(tmp_path, *settings) == 2
    said = capsys.readouterr().err
    assert said.count("step_000002_prompt_0.mp4 could not be written (Is a directory): the run goes on") == 1
    assert said.count("the base is sampled again next time") == 2
    assert "the evaluation of step 2 could not be written: make room, and the same command makes it" in said
    assert [path.name for path in (tmp_path / "samples").glob("*.mp4")] == ["step_000000_prompt_0.mp4"]
    (tmp_path / "samples" / "step_000002_prompt_0.txt").rmdir()
    (tmp_path / "base_latents").unlink()
    assert train(tmp_path, *settings) == 0
    rows, [last] = (tmp_path / "validation.jsonl").read_text(), sorted((tmp_path / "samples").glob("step_000002*.mp4"))
    (tmp_path / "validation.jsonl").write_text(rows.splitlines(keepends=True)[0])
    capsys.readouterr()
    assert train(tmp_path, *settings) == 0
    assert "its last step is not evaluated yet, and is now" in capsys.readouterr().out
    assert (tmp_path / "validation.jsonl").read_text() == rows
    last.unlink()
    assert train(tmp_path, *settings) == 0 and last.exists()
    capsys.readouterr()
    assert train(tmp_path, *settings) == 0 and "is already trained to step 2" in capsys.readouterr().out


def test_a_going_back_to_a_last_step_without_an_evaluation_is_recorded(tmp_path):
    settings = ["train.checkpoint_every=1", "train.validate_every=2", "train.validation_clips=1"]
    assert train(tmp_path, *settings, "train.steps=4") == 0
    back = f"resume_from={tmp_path / 'checkpoints' / 'step_000003'}"
    assert train(tmp_path, *settings, "train.steps=3", back) == 0
    assert len(read_rows(tmp_path / "history.jsonl")) == 2
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [0, 2, 3]


def test_a_stop_in_the_last_evaluation_is_no_success(tmp_path, monkeypatch):
    from mochi_tune.training import evaluate

    measure, calls = evaluate.validation_losses, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    settings = ["train.steps=2", "train.validate_every=2", "train.validation_clips=1"]
    # The signal comes at a known place; all else is the run's own.
    monkeypatch.setattr(evaluate, "validation_losses", stopped)
    assert train(tmp_path, *settings) == 128 + signal.SIGTERM
    assert train(tmp_path, *settings) == 0
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [0, 2]


@pytest.mark.parametrize(
    "more", [["train.ema_decay=0.9"], ["train.optimizer=schedule_free", "train.schedule=constant"]], ids=["ema", "x"]
)
def test_a_checkpoint_that_is_asked_for_in_an_evaluation_has_the_trained_weights(tmp_path, monkeypatch, more):
    from mochi_tune.training import evaluate

    measure, calls = evaluate.validation_losses, []

    def saved(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return measure(*arguments)

    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    common = [*EACH, "train.steps=3", "train.validate_every=1", "train.validation_clips=1", *more]
    train(straight, *common)
    monkeypatch.setattr(evaluate, "validation_losses", saved)
    train(run_dir, *common, "train.checkpoint_every=3")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    for name in ("adapter.safetensors", "averaged.safetensors"):
        assert same(run_dir / "checkpoints/step_000002" / name, straight / "checkpoints/step_000002" / name), name


def test_what_may_be_forced_can_be(tmp_path):
    for name, before, after in (
        ("ema", [], ["train.ema_decay=0.9"]),
        ("ratio", [], ["train.learning_rate_b_ratio=4"]),
        ("decay", ["lora.dora=true"], ["lora.dora=true", "train.weight_decay=0"]),
    ):
        train(tmp_path / name, *EACH, "train.steps=1", *before)
        assert train(tmp_path / name, *EACH, "train.steps=2", *after, "resume=force") == 0
    averaged = load_adapter_tensors(tmp_path / "ema/checkpoints/step_000002/averaged.safetensors")
    trained = load_adapter_tensors(tmp_path / "ema/checkpoints/step_000002/adapter.safetensors")
    assert any(not torch.equal(averaged[name], trained[name]) for name in trained)


def test_a_damaged_clip_is_left_out_of_the_validation(tmp_path, capsys):
    import pyarrow.parquet as pq

    shutil.copytree(prepared() / "cache", tmp_path / "cache")
    settings = [f"data.cache={tmp_path / 'cache'}", "train.steps=1", "train.validate_every=1"]
    settings += ["train.validation_clips=2", "data.damaged=quarantine"]
    plan = check(load_config("my_lora", road(tmp_path / "run", *LORA, *settings)), 1)
    place = plan.validation_clips[0]
    assert len(plan.validation_clips) == 2
    [shard] = (tmp_path / "cache" / "data").iterdir()
    name = pq.read_table(shard, columns=["sample_id"])["sample_id"][place].as_py()
    data = bytearray(shard.read_bytes())
    with pq.ParquetFile(shard) as file:
        column = file.metadata.row_group(place).column(file.schema_arrow.names.index("logvar"))
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    assert train(tmp_path / "run", *settings) == 0
    shard.write_bytes(data)
    assert train(tmp_path / "run", *settings, "train.steps=2") == 0
    written = capsys.readouterr().out
    assert "left out of the validation: " in written and name in written
    rows = read_rows(tmp_path / "run" / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    # The loss of one clip is not compared with that of two.
    assert rows[0]["measured_on"] == rows[1]["measured_on"] != rows[2]["measured_on"]
    assert "best and last: step 2" in written
    with pytest.raises(DataError, match="damaged"):
        train(tmp_path / "strict", *settings, "data.damaged=strict")


def test_settings_in_the_run_folder_are_replaced_whole(tmp_path):
    train(tmp_path, *EACH, "train.steps=1")
    before = (tmp_path / "config.yaml").read_text()
    os.link(tmp_path / "config.yaml", tmp_path / "another_name.yaml")
    train(tmp_path, *EACH, "train.steps=2")
    assert (tmp_path / "another_name.yaml").read_text() == before != (tmp_path / "config.yaml").read_text()


def test_a_folder_that_is_trained_in_anew_shows_the_base_that_it_has(tmp_path):
    settings = ["train.steps=1", "train.sample_every=1", "train.sample_prompts=[a cat]", "sample.steps=2"]
    for dtype in ("fp32", "bf16"):
        train(tmp_path, *settings, f"model.dtype={dtype}", "sample.num_frames=7")
        for name in ("checkpoints", "samples"):
            shutil.rmtree(tmp_path / name)
        (tmp_path / "adapter.safetensors").unlink()
    assert len(list((tmp_path / "base_latents").iterdir())) == 2
