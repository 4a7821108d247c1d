"""Several processes are one run: when one of them is killed, hangs or is asked to stop, all end, and all go on."""

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from helpers_faults import READING, STARTED_STEP, STEP, assert_same_end, newest_checkpoint, rows_of
from helpers_process import Disturbance, Program, run_program, wait_for_end
from helpers_road import LORA, road

SETTINGS = [*LORA, "train.steps=40", "train.accumulation_steps=3", "train.checkpoint_every=4", "train.ema_decay=0.9"]
LAYOUTS = {"data": ["parallel=data"], "context": ["parallel=context"]}


def arguments(run_dir: Path, layout: str, *more: str) -> list[str]:
    two = ["parallel.num_processes=2", *LAYOUTS[layout]]
    return ["train", "conf=my_lora", *road(run_dir, *SETTINGS, *two, *more)]


def run_to_the_end(run_dir: Path, layout: str) -> str:
    code, text = run_program(arguments(run_dir, layout), run_dir.with_name("whole"))
    assert code == 0, text[-3000:]
    return text


@pytest.fixture(scope="module", params=LAYOUTS)
def straight(request, tmp_path_factory) -> tuple[str, Path]:
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    run_to_the_end(run_dir, request.param)
    return request.param, run_dir


class Started(Program):
    """A run of two processes that is under way: it has made six steps, and both processes are held in the next one."""

    def __init__(self, run_dir: Path, layout: str, *more: str, hold_at: tuple[int, ...] = (7,)) -> None:
        hold = Disturbance(hold=STARTED_STEP, hold_at=hold_at, holds_ranks=True)
        super().__init__(arguments(run_dir, layout, *more), run_dir.with_name("started"), hold)
        self.wait_until_held(2)
        self.ranks = {child.environ()["RANK"]: child for child in psutil.Process(self.pid).children()}

    def end(self) -> tuple[int, str]:
        """Returns the exit code and what was written; every process has ended by then."""
        code = self.wait()
        wait_for_end(self.ranks.values())
        return code, self.text()


def test_a_rank_that_is_killed_ends_all_and_the_same_command_goes_on(straight, tmp_path):
    layout, whole = straight
    started = Started(tmp_path / "run", layout)
    started.ranks["1"].kill()
    started.release()
    code, text = started.end()
    last = text.strip().splitlines()[-1]
    assert code == 2 and "rank 1 was ended by SIGKILL" in last, text
    assert f"the last checkpoint is {newest_checkpoint(tmp_path / 'run')}" in last
    assert "resuming" in run_to_the_end(tmp_path / "run", layout)
    assert_same_end(tmp_path / "run", whole)


def test_a_rank_that_hangs_is_named_with_where_the_others_wait(tmp_path):
    """Stopped, it answers no other; the process that waits for it reports where, and all end."""
    # Ten times and more what the slower of two processes may be behind the other one when they start.
    started = Started(tmp_path / "run", "data", "parallel.timeout_seconds=20")
    started.ranks["1"].suspend()
    started.release()
    code, text = started.end()
    assert code == 2 and "rank 1 did not answer and had to be killed" in text, text
    assert "Timeout (0:00:18" in text and "train_lora.py" in text, "the stack of the rank that waited"


def test_asked_to_stop_all_ranks_save_one_step_and_the_same_command_goes_on(straight, tmp_path):
    layout, whole = straight
    started = Started(tmp_path / "run", layout, "train.checkpoint_every=30", hold_at=(7, 20))
    started.send(signal.SIGUSR1)
    # It reaches the processes by way of the one that has started them.
    time.sleep(1)
    started.release()
    started.wait_until_held(4)
    saved = int(newest_checkpoint(tmp_path / "run").name.removeprefix("step_"))
    assert 7 <= saved < 20, "no interval falls on it"
    started.send(signal.SIGTERM)
    time.sleep(1)
    started.release()
    code, text = started.end()
    done = rows_of(tmp_path / "run")[-1]["step"]
    assert code == 128 + signal.SIGTERM and f"stopped after step {done} of 40" in text, text
    assert newest_checkpoint(tmp_path / "run").name == f"step_{done:06d}" and done < 40
    run_to_the_end(tmp_path / "run", layout)
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "code", "saved"), [(signal.SIGUSR1, 0, [3, 5]), (signal.SIGTERM, 143, [3])])
def test_a_process_that_waits_for_its_data_passes_on_what_it_was_asked_to_do(tmp_path, number, code, saved):
    """It is not the one that writes: all save together, after the step."""
    run_dir, more = tmp_path / "run", ["train.steps=5", "train.checkpoint_every=100", "train.keep_checkpoints=9"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"}
        env["MASTER_PORT"] = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        slow = Disturbance(hold=READING, hold_at=(8,)) if rank == "1" else None
        task = ["train", "conf=my_lora", *road(run_dir, *SETTINGS, *more, "parallel=data")]
        ranks.append(Program(task, tmp_path / rank, slow, env | {"RANK": rank, "LOCAL_RANK": rank}))
    ranks[1].wait_until_held()
    ranks[1].wait_until(lambda: len(rows_of(run_dir)) == 2)
    ranks[1].send(number)
    time.sleep(1)  # It looks for signals five times a second.
    ranks[1].release()
    assert [rank.wait() for rank in ranks] == [code, code], ranks[1].text()
    assert sorted(folder.name for folder in (run_dir / "checkpoints").iterdir()) == [f"step_{n:06d}" for n in saved]


def test_a_slurm_job_that_is_requeued_goes_on(tmp_path):
    """As Slurm does it: each task is sent SIGTERM, the job starts again with the same script, on other ports."""
    run_dir = tmp_path / "run"
    task = ["train", "conf=my_lora", *road(run_dir, *SETTINGS, "parallel=data")]

    def start(restarts: int, *hold_at: int) -> list[Program]:
        step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": str(restarts), "SLURM_STEP_NUM_TASKS": "2"}
        step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_RESTART_COUNT": str(restarts)}
        hold, tasks = Disturbance(hold=STEP, hold_at=hold_at), []
        for rank in (0, 1):
            env = step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            tasks.append(Program(task, tmp_path / f"task_{restarts}_{rank}", hold, env))
        return tasks

    tasks = start(0, 7)
    for one in tasks:
        one.wait_until_held()
    for one in tasks:
        one.send(signal.SIGTERM)
    for one in tasks:
        one.release()
    assert [one.wait() for one in tasks] == [143, 143], tasks[0].text()
    assert rows_of(run_dir)[-1]["step"] == 7 and newest_checkpoint(run_dir).name == "step_000007"
    assert [one.wait() for one in start(1)] == [0, 0]
    assert [row["step"] for row in rows_of(run_dir)] == list(range(1, 41))
    assert newest_checkpoint(run_dir).name == "step_000040"
