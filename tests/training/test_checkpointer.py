"""A checkpoint is written only when the rows of its steps are on disk."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from mochi_tune.adapters.files import Adapter, LoraLayer
from mochi_tune.errors import TrainingError
from mochi_tune.files import copy_atomic, read_json_lines
from mochi_tune.training import checkpoint
from mochi_tune.training import checkpointer as checkpointer_module
from mochi_tune.training.checkpointer import Checkpointer, Retention, Snapshot, check_free_space
from mochi_tune.training.metrics import Metrics


def test_no_checkpoint_is_committed_while_a_row_waits_for_room(tmp_path):
    """The disk has space for the small files of the checkpoint, but not for another row."""
    lines = []
    layer = LoraLayer(torch.ones(2, 4), torch.ones(4, 2), 2.0)
    snapshot = Snapshot(2, Adapter({"blocks.0.attn.proj_x": layer}), None, {}, {"step": 2})
    with Metrics(tmp_path, 0) as metrics:
        metrics.log({"step": 1, "sigmas": [0.5], "clips": ["x" * 100_000]})
        checkpointer = Checkpointer(tmp_path, metrics, Retention(newest=1, every=0, best=False), lines.append)
        former = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size, former[1]))
        try:
            metrics.log({"step": 2, "sigmas": [0.5], "clips": []})
            assert not checkpointer.save(snapshot) and "could not be saved" in lines[0]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        assert not list(tmp_path.glob("checkpoints/step_*"))
        # At its end, the run tries again.
        checkpointer.check_saved(2)
        assert (tmp_path / "checkpoints/step_000002/manifest.json").exists()
        assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_step_that_is_saved_is_not_lost_where_an_old_checkpoint_cannot_be_read_or_removed(tmp_path, monkeypatch):
    lines, layer = [], LoraLayer(torch.ones(2, 4), torch.ones(4, 2), 2.0)
    remove, read = checkpoint.remove_checkpoints, Path.read_bytes

    def cannot_read(path: Path) -> bytes:
        if path.parent.name == "step_000001":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    def cannot_remove(folder: Path, keep: set[int]) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(folder))

    with Metrics(tmp_path, 0) as metrics:
        checkpointer = Checkpointer(tmp_path, metrics, Retention(newest=1, every=0, best=False), lines.append)
        for step in (1, 2, 3, 4):
            # A real disk cannot be made to fail here, and root may do everything.
            monkeypatch.setattr(Path, "read_bytes", cannot_read if step == 2 else read)
            monkeypatch.setattr(checkpoint, "remove_checkpoints", cannot_remove if step == 3 else remove)
            snapshot = Snapshot(step, Adapter({"blocks.0.attn.proj_x": layer}), None, {}, {"step": step})
            assert checkpointer.save(snapshot) and checkpointer.failed is None
    assert len(lines) == 1 and "step 3 is saved, but old checkpoints could not be removed" in lines[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000004"]


def test_a_best_step_takes_no_place_of_the_newest_after_a_restart_either(tmp_path):
    def save(last_step: int, losses: dict[int, float], saves: dict[int, bool]) -> None:
        with Metrics(tmp_path, last_step) as metrics:
            checkpointer = Checkpointer(tmp_path, metrics, Retention(newest=2, every=0, best=True), print)
            for step, is_best in saves.items():
                metrics.log({"step": step})
                metrics.log_validation({"step": step, "validation_loss": losses[step]})
                layer = LoraLayer(torch.ones(2, 4), torch.ones(4, 2), 2.0)
                adapter = Adapter({"blocks.0.attn.proj_x": layer})
                assert checkpointer.save(Snapshot(step, adapter, None, {}, {"step": step}), is_best)

    save(0, {4: 0.9, 8: 0.8, 9: 0.5}, {4: False, 8: False, 9: True})
    # A damaged old checkpoint must not prevent a new one.
    (tmp_path / "checkpoints/step_000004/state.json").write_text("{")
    save(9, {11: 0.3, 12: 0.4}, {11: True, 12: False})
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["08", "11", "12"]
    save(12, {16: 0.6}, {16: False})
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["11", "12", "16"]


def test_a_full_disk_at_the_copy_of_the_adapter_is_reported_as_that(tmp_path, monkeypatch):
    lines, layer = [], LoraLayer(torch.ones(2, 4), torch.ones(4, 2), 2.0)

    def is_full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with Metrics(tmp_path, 0) as metrics:
        checkpointer = Checkpointer(tmp_path, metrics, Retention(newest=1, every=0, best=False), lines.append)
        for step in (1, 2):
            monkeypatch.setattr(checkpointer_module, "copy_atomic", is_full if step == 2 else copy_atomic)
            snapshot = Snapshot(step, Adapter({"blocks.0.attn.proj_x": layer}), None, {}, {"step": step})
            assert checkpointer.save(snapshot) == (step == 1)
        # The old checkpoint was removed, which may have made room.
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
        assert len(lines) == 1 and "the adapter of step 2 could not be copied" in lines[0] and "goes on" in lines[0]
        monkeypatch.setattr(checkpoint, "new_checkpoint", None)  # What is written is not written again.
        with pytest.raises(TrainingError, match=r"adapter of step 2 could not be copied .*step_000002: make room"):
            checkpointer.check_saved(2)
        assert len(lines) == 1
        monkeypatch.undo()
        checkpointer.check_saved(2)
        assert checkpointer.failed is None


def test_the_probe_of_free_space_leaves_no_file(tmp_path, monkeypatch):
    check_free_space(tmp_path, 1000)
    assert not list(tmp_path.iterdir())
    names = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", lambda *_: names.extend(tmp_path.iterdir()))
        check_free_space(tmp_path, 1000)
    assert [path.match(".*.tmp") for path in names] == [True], "what a killed process leaves is removed"
