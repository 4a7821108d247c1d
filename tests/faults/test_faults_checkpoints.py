"""A checkpoint that is not what was saved is named and never gone on from; a changed run is reported or refused."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_faults import assert_same_end, newest_checkpoint, rows_of
from helpers_road import LORA, read_rows, road
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.errors import CheckpointError, TrainingError
from mochi_tune.recipes.train_lora import main
from mochi_tune.training.checkpoint import manifest_of

SETTINGS = [
    *LORA,
    "train.checkpoint_every=2",
    "train.ema_decay=0.9",
    "train.validate_every=2",
    "train.validation_clips=1",
]
FILES = ["adapter.safetensors", "averaged.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def train(run_dir: Path, *more: str) -> int:
    return main(load_config("my_lora", road(run_dir, *SETTINGS, "train.steps=6", *more)))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    assert train(run_dir) == 0
    return run_dir


@pytest.fixture
def stopped(straight, tmp_path) -> Path:
    """The run with checkpoints of steps 2 and 4, as it was after step 4."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_000006")
    return run_dir


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints/step_000004"


def reseal(folder: Path) -> None:
    """Makes the manifest fit what is there now, as someone who edits a checkpoint by hand would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "manifest.json").write_text(json.dumps(manifest_of(manifest["step"], sums)))


def edit_state(folder: Path, **changes: object) -> None:
    state = json.loads((folder / "state.json").read_text()) | changes
    (folder / "state.json").write_text(json.dumps({k: v for k, v in state.items() if v is not None}))
    reseal(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, remove, empty])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(stopped, straight, capsys, name, damage):
    if name == "manifest.json" and damage is cut:
        # Without its last byte, a line feed, it says the same.
        (newest(stopped) / name).write_text((newest(stopped) / name).read_text().rstrip())
    damage(newest(stopped) / name)
    with pytest.raises(CheckpointError, match=r"resume_from|manifest") as error:
        train(stopped, f"resume_from={newest(stopped)}")
    is_gone = name == "manifest.json" and damage is remove
    assert ("is not a checkpoint" if is_gone else name) in str(error.value), "one that is named is not passed over"

    assert train(stopped) == 0
    output = capsys.readouterr().out
    assert name in output and "step_000004" in output and "resuming" in output and "from step 2" in output
    assert_same_end(stopped, straight)
    assert (stopped / "checkpoints/aside_0_step_000004").is_dir(), "nothing is deleted that could be looked at"


@pytest.mark.parametrize("entry", ["extra", "missing"])
def test_a_manifest_that_lists_other_files_is_refused(stopped, straight, entry):
    path = newest(stopped) / "manifest.json"
    manifest = json.loads(path.read_text())
    if entry == "extra":
        manifest["sha256"]["../../../outside"] = "0" * 64
    else:
        del manifest["sha256"]["optimizer.safetensors"]
    path.write_text(json.dumps(manifest_of(4, manifest["sha256"])))
    with pytest.raises(CheckpointError, match="outside" if entry == "extra" else "optimizer.safetensors"):
        train(stopped, f"resume_from={newest(stopped)}")
    assert train(stopped) == 0
    assert_same_end(stopped, straight)


def test_a_manifest_that_tells_another_step_is_damaged(stopped, straight):
    path = newest(stopped) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))
    assert train(stopped) == 0
    assert (stopped / "checkpoints/aside_0_step_000004").is_dir()
    assert_same_end(stopped, straight)


def test_when_every_checkpoint_is_damaged_the_run_does_not_begin_anew(stopped):
    for folder in (stopped / "checkpoints").glob("step_*"):
        flip(folder / "adapter.safetensors")
    before = (stopped / "adapter.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume from: .*step_000004.*step_000002"):
        train(stopped)
    assert (stopped / "adapter.safetensors").read_bytes() == before


def test_a_missing_optimizer_is_an_error_and_never_a_new_warm_up(stopped):
    (newest(stopped) / "optimizer.safetensors").unlink()
    reseal(newest(stopped))
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        train(stopped)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        train(stopped, "resume=force")


@pytest.mark.parametrize("key", ["draws", "groups", "losses", "settings", "step"])
def test_a_missing_part_of_the_state_is_an_error(stopped, key):
    edit_state(newest(stopped), **{key: None})
    with pytest.raises(CheckpointError, match=rf"state\.json has no {key}"):
        train(stopped)


def test_an_emptied_optimizer_is_an_error(stopped):
    from safetensors.torch import save_file

    path = newest(stopped) / "optimizer.safetensors"
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)
    reseal(newest(stopped))
    with pytest.raises(CheckpointError, match="optimizer is not this run's AdamW"):
        train(stopped)


def test_other_random_numbers_are_refused_unless_forced(stopped):
    """As of a torch that draws otherwise: the proof that is saved is not the one that is drawn here."""
    edit_state(newest(stopped), draws="0" * 64)
    with pytest.raises(TrainingError, match=r"draws other random numbers than .*resume=force"):
        train(stopped)
    assert train(stopped, "resume=force") == 0
    history = read_rows(stopped / "history.jsonl")
    assert history[-1]["from_step"] == 4 and "draws other random numbers" in history[-1]["changed"][0]


def test_a_changed_setting_is_printed_and_what_changes_the_run_is_refused_unless_forced(stopped, straight, capsys):
    with pytest.raises(TrainingError, match=r"train.learning_rate was 0.0002, is 0.001.*resume=force"):
        train(stopped, "train.learning_rate=1e-3")
    assert rows_of(stopped) == rows_of(straight), "nothing is taken back by a run that is refused"
    assert train(stopped, "train.learning_rate=1e-3", "resume=force") == 0
    assert "since step 4 train.learning_rate was 0.0002, is 0.001" in capsys.readouterr().out
    assert read_rows(stopped / "history.jsonl")[-1]["changed"] == ["train.learning_rate was 0.0002, is 0.001"]
    rates = [[row["lr"] for row in rows_of(run)] for run in (stopped, straight)]
    assert rates[0][:4] == rates[1][:4] and rates[0][4:] == pytest.approx([5 * rate for rate in rates[1][4:]])


def test_what_was_forced_need_not_be_forced_again_and_damage_is_reported_first(stopped, capsys):
    """Forced at step 4, saved at step 6, which is then damaged: step 4 is of other settings, as was agreed."""
    assert train(stopped, "train.learning_rate=1e-3", "resume=force") == 0
    whole = rows_of(stopped)
    flip(stopped / "checkpoints/step_000006/adapter.safetensors")
    with pytest.raises(
        TrainingError, match=r"^.*step_000006 is damaged.*cannot resume from step 4: train.learning_rate"
    ):
        train(stopped, "train.learning_rate=1e-4")
    assert train(stopped, "train.learning_rate=1e-3") == 0
    assert "step_000006 is damaged" in capsys.readouterr().out
    assert rows_of(stopped) == whole


def test_a_folder_that_is_no_checkpoint_is_reported_with_those_that_are(stopped):
    for name in (stopped, stopped / "checkpoints/step_000099"):
        with pytest.raises(
            CheckpointError,
            match=r"is not a checkpoint: use one of .*step_000002, .*step_000004, or leave it out for the newest\.$",
        ):
            train(stopped, f"resume_from={name}")


def test_fewer_steps_than_are_done_are_reported_and_nothing_else(stopped, capsys):
    assert main(load_config("my_lora", road(stopped, *SETTINGS, "train.steps=3"))) == 0
    output = capsys.readouterr().out
    assert "is already trained to step 4" in output and "stretched" not in output


def test_a_harmless_change_is_printed_and_taken(stopped, straight, capsys):
    assert train(stopped, "train.keep_checkpoints=1") == 0
    assert "since step 4 train.keep_checkpoints was 3, is 1" in capsys.readouterr().out
    assert [p.name for p in (stopped / "checkpoints").glob("step_*")] == ["step_000006"]
    assert_same_end(stopped, straight)


@pytest.mark.parametrize("change", ["lora.rank=3", "train.optimizer=adafactor"])
def test_what_would_not_fit_is_refused_even_by_force(stopped, change):
    with pytest.raises(TrainingError, match=rf"{change.partition('=')[0]} was") as error:
        train(stopped, change, "resume=force")
    assert "resume=force" not in str(error.value), "it is no way out"


def test_going_back_to_an_older_checkpoint_puts_the_later_one_aside(stopped, straight, capsys):
    back = f"resume_from={stopped / 'checkpoints/step_000002'}"
    assert train(stopped, back) == 0
    assert "put aside" in capsys.readouterr().out
    assert (stopped / "checkpoints/aside_0_step_000004").is_dir()
    assert_same_end(stopped, straight)
    # The same command goes on, and does not go back again.
    shutil.rmtree(stopped / "checkpoints/step_000006")
    assert train(stopped, back) == 0
    assert "from step 4" in capsys.readouterr().out
    assert_same_end(stopped, straight)


def test_the_metrics_file_has_every_step_once_though_rows_were_lost_or_doubled(stopped, straight, capsys):
    """Rows after the checkpoint are made again; those before it that someone took are reported."""
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(lines[1:]) + lines[-1])
    assert train(stopped) == 0
    assert [row["step"] for row in rows_of(stopped)] == [2, 3, 4, 5, 6]
    assert "metrics.jsonl has 3 rows up to step 4, but had 4" in capsys.readouterr().out


def test_another_device_or_torch_is_reported_of(stopped, straight, capsys):
    environment = json.loads((newest(stopped) / "state.json").read_text())["environment"]
    edit_state(newest(stopped), environment=environment | {"torch": "2.0.0"})
    assert train(stopped) == 0
    assert (
        f"torch was 2.0.0, is {torch.__version__}" in (output := capsys.readouterr().out)
        and "differ in rounding" in output
    )
    assert newest_checkpoint(stopped).name == "step_000006"


def test_the_best_and_every_nth_checkpoint_are_kept(tmp_path):
    more = ["train.keep_checkpoints=1", "train.keep_every=4", "train.keep_best=true", "train.checkpoint_every=1"]
    # At this rate it learns at first and is then ruined by a spike of its own: the best is in the middle.
    assert train(tmp_path, *more, "train.validate_every=1", "train.steps=8", "train.learning_rate=3e-2",
                 "train.schedule=constant", "train.warmup_steps=0", "train.ema_decay=0") == 0  # fmt: skip
    losses = {row["step"]: row["validation_loss"] for row in read_rows(tmp_path / "validation.jsonl") if row["step"]}
    # Step 8 was validated after its own save.
    best = min((step for step in losses if step < 8), key=losses.get)
    kept = {json.loads(m.read_text())["step"] for m in tmp_path.glob("checkpoints/step_*/manifest.json")}
    assert kept == {4, 8, best}
