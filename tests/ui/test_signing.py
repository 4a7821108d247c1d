"""Only jobs that this user has started are run; the folder of a page may come from somebody else."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_jobs import put

from mochi_tune.errors import ConfigError, DataError
from mochi_tune.ui import jobs, runner
from mochi_tune.ui.jobs import Job, changing, find_job, list_jobs, open_jobs, repeat_job, save_job, stop_job
from mochi_tune.ui.jobs_bar import jobs_table
from mochi_tune.ui.signing import KEY, read_key, sign


def test_the_key_is_made_once_and_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    key = read_key()
    assert len(key) == 32 and read_key() == key == (tmp_path / KEY).read_bytes()
    assert [path.stat().st_mode & 0o777 for path in ((tmp_path / KEY).parent, tmp_path / KEY)] == [0o700, 0o600]
    signed = sign(1, "toy", ["a"])
    assert len({signed, sign(2, "toy", ["a"]), sign(1, "train", ["a"]), sign(1, "toy", ["b"])}) == 4
    # A process was killed before it wrote the key.
    (tmp_path / KEY).write_bytes(b"")
    assert len(read_key()) == 32 and sign(1, "toy", ["a"]) != signed
    # The machine lost power before the key was on disk.
    (tmp_path / KEY).write_bytes(bytes(32))
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    assert any(key := read_key()) and (tmp_path / KEY).read_bytes() == key
    assert synced == [str(tmp_path / KEY), str((tmp_path / KEY).parent)]
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set HOME to a folder of yours"):
        read_key()


@pytest.fixture
def strangers(tmp_path):
    """The page's folder with waiting and running jobs of somebody else: without, with a false, and with no signature of
    this command."""
    number = os.getpid()
    put(tmp_path, Job(1, "toy", ["--help"]))
    mine = find_job(tmp_path, 1)
    with changing(tmp_path):
        save_job(tmp_path, replace(mine, verb="train"))
        save_job(tmp_path, Job(2, "toy", ["--help"]))
        save_job(tmp_path, Job(3, "toy", ["--help"], signature="é\ud800"))
        start = jobs.process_start(number)
        save_job(tmp_path, Job(4, "toy", ["--help"], state="running", pid=number, pid_start=start, began=1.0))
        save_job(tmp_path, Job(5, "toy", ["--help"], state="done", began=1.0, ended=2.0))
    return tmp_path


def test_jobs_of_a_stranger_are_shown_and_not_run(strangers, monkeypatch):
    monkeypatch.setattr(jobs.subprocess, "Popen", None)
    assert len(list_jobs(strangers)) == 5 and not open_jobs(strangers)
    jobs.start_runner(strangers)
    jobs.revive_runner(strangers)
    # It neither waits for the running one nor for the waiting ones.
    runner.main(strangers)
    assert runner.start_next(strangers) is None
    page = jobs_table(strangers, list_jobs(strangers))
    assert page.count("not started here: not run") == 4 and page.count("state done'>done<") == 1
    assert [job.state for job in list_jobs(strangers)] == ["waiting"] * 3 + ["running", "done"]


def test_a_strangers_job_does_not_go_on_and_its_process_is_not_stopped(strangers):
    for number in range(1, 6):
        with pytest.raises(DataError, match=f"job {number} was not started by you on this machine"):
            repeat_job(strangers, number)
    assert len(list_jobs(strangers)) == 5
    with pytest.raises(DataError, match=r"job 4 was not started by you on this machine, .*: stop it where it runs"):
        stop_job(strangers, 4)
    # It can be taken out of the queue.
    assert stop_job(strangers, 2).state == "stopped"


def test_a_record_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    put(tmp_path, Job(1, "toy"))
    assert any("/.00001.json." in path for path in synced)


@pytest.mark.parametrize(
    "change", ['"state": "<b>"', '"arguments": 5', '"began": Infinity', '"ended": 1e999', '"number": "<b>"']
)
def test_a_record_with_values_of_other_types_is_left_out(tmp_path, change):
    jobs.jobs_folder(tmp_path).mkdir(parents=True)
    path = Path(jobs.jobs_folder(tmp_path) / "00001.json")
    path.write_text(f'{{"number": 1, "verb": "toy", {change}}}')
    assert list_jobs(tmp_path) == []
