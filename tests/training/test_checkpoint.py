"""A checkpoint is complete or absent."""

import os
import shutil

import pytest
import torch

from mochi_tune.errors import CheckpointError
from mochi_tune.files import load_tensors, save_tensors
from mochi_tune.training import checkpoint
from mochi_tune.training.checkpoint import (
    damage_of,
    find_checkpoints,
    new_checkpoint,
    newest_valid,
    published_file,
    remove_checkpoints,
    step_of,
    steps_to_keep,
)


def write(folder, step):
    with new_checkpoint(folder, step) as new:
        save_tensors(new / "adapter.safetensors", {"a": torch.full((3,), float(step))})


def test_a_checkpoint_appears_whole_and_old_ones_go_by_the_rule(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    remove_checkpoints(tmp_path, {2, 10})
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_000002", "step_000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000010"]
    assert damage_of(tmp_path / "step_000010") == ""
    assert load_tensors(tmp_path / "step_000010" / "adapter.safetensors")["a"].tolist() == [10.0] * 3


def test_copies_under_names_of_a_users_own_stay(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001_good")
    remove_checkpoints(tmp_path, {2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001_good", "step_000002"]


def test_the_newest_every_nth_and_the_best_are_kept():
    steps = range(10, 110, 10)
    assert steps_to_keep(steps, newest=2, every=0, best=None) == {90, 100}
    assert steps_to_keep(steps, newest=1, every=40, best=30) == {100, 40, 80, 30}
    assert steps_to_keep(steps, newest=3, every=0, best=35) == {80, 90, 100}


def test_the_step_is_the_manifests_and_not_the_names(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "step_000001").rename(tmp_path / "step_000009")
    assert newest_valid(tmp_path)[0] == tmp_path / "step_000002" and step_of(tmp_path / "step_000009") == 1


def test_the_averaged_adapter_is_the_one_that_is_given_out(tmp_path):
    write(tmp_path, 1)
    assert published_file(tmp_path / "step_000001").name == "adapter.safetensors"
    save_tensors(tmp_path / "step_000001" / "averaged.safetensors", {"a": torch.zeros(3)})
    assert published_file(tmp_path / "step_000001").name == "averaged.safetensors"


def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(OSError, match="disk"), new_checkpoint(tmp_path, 2) as new:
        (new / "adapter.safetensors").write_bytes(b"half")
        raise OSError("the disk is full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001"]
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "extra"])
def test_damage_is_named(tmp_path, damage):
    write(tmp_path, 1)
    folder = tmp_path / "step_000001"
    file = folder / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        (folder / "extra.bin").write_bytes(b"x")
    assert repr("extra.bin" if damage == "extra" else "adapter.safetensors") in damage_of(folder)
    write(tmp_path, 2)
    assert newest_valid(tmp_path) == (tmp_path / "step_000002", [])
    (tmp_path / "step_000002" / "manifest.json").write_text("{")
    newest, wrong = newest_valid(tmp_path)
    assert newest is None and len(wrong) == 2 and "step_000002 has no readable manifest.json" in wrong[0]
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        damage_of(tmp_path / "step_000002")


def test_a_checkpoint_is_on_disk_before_it_gets_its_name_and_the_name_is_on_disk_too(tmp_path, monkeypatch):
    calls, rename, fsync = [], os.rename, checkpoint.fsync
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (calls.append(path.name), fsync(path)))
    monkeypatch.setattr(os, "rename", lambda *paths: (calls.append("rename"), rename(*paths)))
    write(tmp_path, 1)
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") + 1 :]
    assert set(before) == {"adapter.safetensors", "manifest.json", ".tmp_000001"} and after == [tmp_path.name]
