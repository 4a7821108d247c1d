"""The lock of a run folder, and the history of its starts."""

import os
import resource

import pytest

from mochi_tune.training.run_folder import RunLock, read_history, record_start


def test_a_start_after_a_torn_row_is_read_and_is_on_disk(tmp_path, monkeypatch):
    history, synced, fsync = tmp_path / "history.jsonl", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(history.read_bytes()), fsync(file)))
    record_start(tmp_path, {"from_step": 2})
    with history.open("ab") as file:
        file.write(b'{"from_step": 4, "resu')
    record_start(tmp_path, {"from_step": 6})
    assert read_history(tmp_path) == [{"from_step": 2}, {"from_step": 6}]
    assert synced[-1] == history.read_bytes()


def test_the_error_of_a_full_disk_names_the_history(tmp_path):
    history = tmp_path / "history.jsonl"
    history.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        record_start(tmp_path, {"from_step": 0})
    assert caught.value.filename == str(history)


def test_the_error_of_a_full_disk_names_the_lock(tmp_path):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, former[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, RunLock(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert caught.value.filename == str(tmp_path / ".lock")
