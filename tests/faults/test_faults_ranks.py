"""Several processes are one run: when one of them is killed, hangs or is asked to stop, all end, and all go on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers_faults import assert_same_end, newest_checkpoint, rows_of
from helpers_road import ENVIRONMENT, LORA, command, road

SETTINGS = [*LORA, "train.steps=40", "train.accumulation_steps=3", "train.checkpoint_every=4", "train.ema_decay=0.9"]
LAYOUTS = {"data": ["parallel=data"], "context": ["parallel=context"]}


def arguments(run_dir: Path, layout: str, *more: str) -> list[str]:
    two = ["parallel.num_processes=2", *LAYOUTS[layout]]
    return command("train", "conf=my_lora", *road(run_dir, *SETTINGS, *two, *more))


def run_to_the_end(run_dir: Path, layout: str) -> str:
    done = subprocess.run(arguments(run_dir, layout), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=LAYOUTS)
def straight(request, tmp_path_factory) -> tuple[str, Path]:
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    run_to_the_end(run_dir, request.param)
    return request.param, run_dir


class Started:
    """A run of two processes that is under way: it has made a few steps."""

    def __init__(self, run_dir: Path, layout: str, *more: str) -> None:
        self.run_dir, self.log = run_dir, run_dir.parent / f"{run_dir.name}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(arguments(run_dir, layout, *more), env=ENVIRONMENT, stdout=log, stderr=log)
        while not ((run_dir / "metrics.jsonl").exists() and len(rows_of(run_dir)) >= 6):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)
        self.ranks = {child.environ()["RANK"]: child for child in psutil.Process(self.process.pid).children()}

    def end(self, timeout: float) -> tuple[int, str]:
        """Returns the exit code and what was written; every process has ended by then."""
        code = self.process.wait(timeout)
        assert not psutil.wait_procs(self.ranks.values(), timeout=5)[1]
        return code, self.log.read_text()


def test_a_rank_that_is_killed_ends_all_and_the_same_command_goes_on(straight, tmp_path):
    layout, whole = straight
    started = Started(tmp_path / "run", layout)
    started.ranks["1"].kill()
    code, text = started.end(timeout=30)
    last = text.strip().splitlines()[-1]
    assert code == 2 and "rank 1 was ended by SIGKILL" in last, text
    assert f"the last checkpoint is {newest_checkpoint(tmp_path / 'run')}" in last
    assert "resuming" in run_to_the_end(tmp_path / "run", layout)
    assert_same_end(tmp_path / "run", whole)


def test_a_rank_that_hangs_is_named_with_where_the_others_wait(tmp_path):
    """Stopped, it answers nobody; the rank that waits for it tells where, and all end."""
    started = Started(tmp_path / "run", "data", "parallel.timeout_seconds=5")
    started.ranks["1"].suspend()
    code, text = started.end(timeout=60)
    assert code == 2 and "rank 1 did not answer and had to be killed" in text, text
    assert "Timeout (0:00:04" in text and "train_lora.py" in text, "the stack of the rank that waited"


def test_asked_to_stop_all_ranks_save_one_step_and_the_same_command_goes_on(straight, tmp_path):
    layout, whole = straight
    started = Started(tmp_path / "run", layout)
    started.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 30
    while newest_checkpoint(tmp_path / "run").name == "step_000004" and time.monotonic() < deadline:
        time.sleep(0.01)
    started.process.terminate()
    code, text = started.end(timeout=30)
    done = rows_of(tmp_path / "run")[-1]["step"]
    assert code == 128 + signal.SIGTERM and f"stopped after step {done} of 40" in text, text
    assert newest_checkpoint(tmp_path / "run").name == f"step_{done:06d}"
    run_to_the_end(tmp_path / "run", layout)
    assert_same_end(tmp_path / "run", whole)


def test_a_slurm_job_that_is_requeued_goes_on(tmp_path):
    """As Slurm does it: each task is sent SIGTERM, the job starts again with the same script, on other ports."""
    run_dir = tmp_path / "run"
    task = command("train", "conf=my_lora", *road(run_dir, *SETTINGS, "parallel=data"))

    def start(restarts: int) -> list[subprocess.Popen]:
        step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": str(restarts), "SLURM_STEP_NUM_TASKS": "2"}
        step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_RESTART_COUNT": str(restarts)}
        tasks = []
        for rank in (0, 1):
            place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            tasks.append(subprocess.Popen(task, env=ENVIRONMENT | step | place, stderr=subprocess.PIPE, text=True))
        return tasks

    tasks = start(0)
    while not ((run_dir / "metrics.jsonl").exists() and len(rows_of(run_dir)) >= 6):
        assert all(one.poll() is None for one in tasks)
        time.sleep(0.01)
    for one in tasks:
        one.terminate()
    assert [one.wait(30) for one in tasks] == [143, 143]
    done = rows_of(run_dir)[-1]["step"]
    assert newest_checkpoint(run_dir).name == f"step_{done:06d}" and 6 <= done < 40
    tasks = start(1)
    assert [one.wait(60) for one in tasks] == [0, 0]
    assert [row["step"] for row in rows_of(run_dir)] == list(range(1, 41))
    assert newest_checkpoint(run_dir).name == "step_000040"
