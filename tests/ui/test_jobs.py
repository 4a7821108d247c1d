"""Jobs are files and processes: they run one at a time, outlive the process that started them, stop and go on."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from helpers_jobs import put

from mochi_tune.errors import DataError
from mochi_tune.ui import runner
from mochi_tune.ui.jobs import (
    Job,
    add_job,
    find_job,
    is_alive,
    jobs_folder,
    list_jobs,
    log_path,
    message_of,
    process_start,
    read_tail,
    revive_runner,
    stop_job,
)
from mochi_tune.ui.jobs_bar import jobs_table

PATIENCE = 300


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_runs_to_its_end_without_its_page(tmp_path):
    # Verbs that end at once: one prints help, one has a mistake.
    add_job(tmp_path, "toy", ["--help"])
    add_job(tmp_path, "train", ["conf=nothing_like_it"])
    wait_until(lambda: all(job.ended for job in list_jobs(tmp_path)))
    first, second = list_jobs(tmp_path)
    assert (first.number, first.state, first.code) == (1, "done", 0)
    assert (second.number, second.state, second.code) == (2, "failed", 2)
    assert second.began >= first.ended
    assert "nothing_like_it" in message_of(read_tail(log_path(tmp_path, 2)))
    assert second.command == "mochi-tune train conf=nothing_like_it"


def test_two_runners_do_not_run_a_job_twice(tmp_path):
    put(tmp_path, Job(1, "toy", ["--help"]), Job(2, "toy", ["--help"]))
    command = [sys.executable, "-m", "mochi_tune.ui.runner", str(tmp_path)]
    for process in [subprocess.Popen(command) for _ in range(2)]:
        assert process.wait(PATIENCE) == 0
    # Each log contains the help once.
    alone = subprocess.run([sys.executable, "-m", "mochi_tune.cli", "toy", "--help"], capture_output=True, check=True)
    for number in (1, 2):
        assert find_job(tmp_path, number).state == "done"
        assert log_path(tmp_path, number).read_bytes() == alone.stdout


def test_a_job_runs_the_settings_that_its_conf_had_when_it_started(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "own.yaml").write_text("train: {warmup_steps: 3}\n")
    conf = tmp_path / "conf" / "cats.yaml"
    conf.write_text("defaults: [base, own, _self_]\nname: cats\nlora: {rank: 4}\n")
    put(tmp_path, Job(1, "train", ["conf=cats", "--cfg"]))
    started = runner.start_next(tmp_path)
    # The process has not read the file yet.
    conf.write_text("defaults: [base, _self_]\nname: cats\nlora: {rank: 8}\n")
    assert started is not None and started[1].wait(PATIENCE) == 0
    printed = log_path(tmp_path, 1).read_text()
    assert "rank: 4\n" in printed and "warmup_steps: 3\n" in printed
    assert find_job(tmp_path, 1).command == "mochi-tune train conf=cats --cfg"


def test_a_waiting_job_leaves_the_queue_when_it_is_stopped(tmp_path):
    put(tmp_path, Job(1, "toy", ["--help"]))
    assert stop_job(tmp_path, 1).state == "stopped"
    assert runner.start_next(tmp_path) is None
    with pytest.raises(DataError, match="ended already"):
        stop_job(tmp_path, 1)
    with pytest.raises(DataError, match="does not exist any more"):
        stop_job(tmp_path, 7)


def test_a_running_job_gets_sigterm_and_counts_as_stopped(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = psutil.Process(sleeper.pid).create_time()
    put(tmp_path, Job(1, "train", state="running", pid=sleeper.pid, pid_started=started, began=1.0))
    assert stop_job(tmp_path, 1).is_asked_to_stop
    assert sleeper.wait(PATIENCE) == -15
    # The next runner, which did not start the job, sees that it has ended.
    runner.main(tmp_path)
    assert find_job(tmp_path, 1).state == "stopped"


def test_a_job_that_nobody_saw_end_ended_when_its_log_was_last_written(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(PATIENCE)
    put(tmp_path, Job(1, "train", state="running", pid=ended.pid, pid_start="an earlier boot", began=1000.0))
    log_path(tmp_path, 1).touch()
    os.utime(log_path(tmp_path, 1), (5000, 5000))
    runner.main(tmp_path)
    job = find_job(tmp_path, 1)
    assert (job.state, job.code, job.ended) == ("failed", None, 5000.0)


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    mine, start = psutil.Process().create_time(), process_start(os.getpid())
    job = Job(1, "train", state="running", pid=os.getpid(), pid_started=mine - 60)
    # Also after the system clock was set, which changes what psutil computes.
    assert is_alive(replace(job, pid_start=start))
    assert not is_alive(replace(job, pid_started=mine, pid_start=start + "0"))
    # A record of an older version.
    assert is_alive(replace(job, pid_started=mine)) and not is_alive(job)
    put(tmp_path, job)
    with pytest.raises(DataError, match="ended already"):
        stop_job(tmp_path, 1)


def test_a_job_records_the_start_of_its_process(tmp_path):
    put(tmp_path, Job(1, "toy", ["--help"]))
    started = runner.start_next(tmp_path)
    assert started is not None
    job, process = started
    assert is_alive(job) and job.pid_start == process_start(process.pid) and len(job.pid_start.split()) == 2
    assert process.wait(PATIENCE) == 0 and not is_alive(job)


def test_a_job_whose_start_was_killed_is_not_started_again(tmp_path, monkeypatch):
    started = []

    class Killed(BaseException):
        """Ends the runner after it has started a process."""

    def start(command, **_):
        started.append(command)
        raise Killed

    put(tmp_path, Job(1, "toy", ["--help"]))
    monkeypatch.setattr(runner.subprocess, "Popen", start)
    with pytest.raises(Killed):
        runner.main(tmp_path)
    runner.main(tmp_path)
    assert len(started) == 1 and find_job(tmp_path, 1).state == "failed"
    assert "check that it does not run, and start it again" in message_of(read_tail(log_path(tmp_path, 1)))


def test_the_error_of_a_conf_names_the_file_that_the_user_has(tmp_path):
    (tmp_path / "conf").mkdir()
    conf = tmp_path / "conf" / "a.yaml"
    jobs_folder(tmp_path).mkdir(parents=True)
    for text, argument in (("train: {stepz: 3}", "conf=a"), ("seed: 3", "conf=.mochi_tune/jobs/00001/a.yaml")):
        conf.write_text(text)
        assert runner.with_kept_conf(tmp_path, Job(1, "train", ["conf=a"])) == [argument]
    assert (jobs_folder(tmp_path) / "00001" / "a.yaml").read_text() == "seed: 3"
    put(tmp_path, Job(1, "train", ["conf=a"], state="running"))
    runner.finish(tmp_path, find_job(tmp_path, 1), 0)
    assert not (jobs_folder(tmp_path) / "00001").exists()


@pytest.mark.parametrize(
    ("code", "asked", "state"),
    [(0, False, "done"), (0, True, "done"), (1, False, "partly"), (2, False, "failed"), (143, False, "stopped"),
     (-15, False, "stopped"), (-9, False, "failed"), (-9, True, "failed"), (2, True, "failed"),
     (None, False, "failed"), (None, True, "stopped")],
)  # fmt: skip
def test_an_exit_code_says_how_a_job_ended(code, asked, state):
    assert runner.state_of(code, asked) == state


def test_a_bug_is_no_success_but_for_some_clips(tmp_path):
    put(tmp_path, Job(1, "prepare", state="running"))
    log_path(tmp_path, 1).write_text("Traceback (most recent call last):\n  ...\nKeyError: 'x'\n")
    runner.finish(tmp_path, find_job(tmp_path, 1), 1)
    assert find_job(tmp_path, 1).state == "failed"


def test_a_record_that_is_damaged_is_left_out_and_named(tmp_path):
    put(tmp_path, Job(1, "toy"))
    (jobs_folder(tmp_path) / "00002.json").write_text("{")
    (jobs_folder(tmp_path) / "00003.json").write_text(json.dumps({"number": 3, "verb": "toy", "unknown": 1}))
    assert [job.number for job in list_jobs(tmp_path)] == [1]
    for jobs in (list_jobs(tmp_path), []):
        assert "cannot be read are not shown (00002.json, 00003.json)" in jobs_table(tmp_path, jobs)


def test_a_new_job_never_gets_the_log_of_an_old_one(tmp_path):
    put(tmp_path, replace(Job(1, "toy"), state="done"))
    log_path(tmp_path, 4).write_text("of a job whose record is gone")
    assert add_job(tmp_path, "toy", ["--help"]).number == 5
    wait_until(lambda: find_job(tmp_path, 5).ended)


def test_a_log_shows_the_last_state_of_its_bars(tmp_path):
    path = tmp_path / "log"
    path.write_text("begins\nclips: 10%\rclips: 50%\rclips: 100%\n\nmochi-tune: it is so: do this.\n")
    assert read_tail(path) == ["begins", "clips: 100%", "mochi-tune: it is so: do this."]
    assert message_of(read_tail(path)) == "it is so: do this."
    assert message_of(["mochi-tune: rows wait", "mochi-tune: it failed"]) == "it failed"
    assert read_tail(tmp_path / "none") == []
    path.write_bytes(b"x" * 200_000 + b"\nlast \xff\n")
    assert read_tail(path, 1) == ["last \ufffd"]


def test_a_job_that_cannot_be_started_does_not_stop_the_next_one(tmp_path):
    (tmp_path / ".mochi_tune" / "jobs").mkdir(parents=True)
    put(tmp_path, Job(1, "sample", ["x" * 200_000]), Job(2, "sample", ["\ud83d"]), Job(3, "toy", ["--help"]))
    runner.main(tmp_path)
    assert [find_job(tmp_path, number).state for number in (1, 2, 3)] == ["failed", "failed", "done"]
    assert message_of(read_tail(log_path(tmp_path, 1))).startswith("it cannot be started: ")


def test_the_table_says_what_was_so(tmp_path):
    jobs = [Job(number, "train", state="done", began=1, ended=2, code=0) for number in range(2, 12)]
    jobs += [
        Job(20, "train", state="stopped"),
        Job(21, "train", state="stopped", began=1, ended=2, code=143),
        Job(22, "train", state="stopped", began=1, ended=2, code=-15),
        Job(23, "train", state="failed", began=1, ended=2, code=-9),
        Job(24, "train", state="failed", began=1, ended=2),
        Job(25, "train", state="failed", began=1, ended=121, code=-35),
    ]
    put(tmp_path, Job(1, "train", state="running", pid=1, began=1))
    page = jobs_table(tmp_path, [find_job(tmp_path, 1), *jobs])
    assert "<td class='time'>2 minutes</td>" in page
    rows = dict(re.findall(r"class='number'>(\d+)<.*?state \w+'>(.*?)</td>", page))
    assert rows["1"].startswith("running"), "what runs is there, however many have ended since"
    assert "2" not in rows and {"20", "24"} < rows.keys()
    said = {"20": "taken out of the queue", "21": "stopped, saved", "22": "stopped<", "23": "ended by SIGKILL"}
    assert all(
        words in rows[number]
        for number, words in (said | {"24": "its exit code is unknown", "25": "signal 35"}).items()
    ), rows


def test_a_queue_whose_runner_was_killed_goes_on(tmp_path):
    put(tmp_path, Job(1, "toy", ["--help"]))
    revive_runner(tmp_path)
    wait_until(lambda: find_job(tmp_path, 1).state == "done")
