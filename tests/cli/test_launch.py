import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers_process import run

from mochi_tune.cli.launch import (
    LOST_CONTACT,
    keep_compiled_code,
    num_processes_here,
    report_failures,
    slurm_variables,
)
from mochi_tune.errors import ParallelError

SLURM = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu-[003-004,009],login",
}  # fmt: skip


def test_a_step_of_srun_is_what_torchrun_would_have_started():
    found = slurm_variables(SLURM)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "8", "1")
    assert found["MASTER_ADDR"] == "gpu-003" and 20000 <= int(found["MASTER_PORT"]) < 40000
    assert slurm_variables(SLURM | {"SLURM_STEP_NODELIST": "node7,node8"})["MASTER_ADDR"] == "node7"
    assert slurm_variables(SLURM | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != found["MASTER_PORT"]


def test_a_process_ends_without_a_look_through_all_that_it_has_imported():
    ask = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 10_000 > gc.get_count()[0]));"
    ask += "from mochi_tune.cli.launch import spare_the_collector; spare_the_collector(); print(gc.get_threshold()[0])"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10000", "True"]


def test_a_batch_script_and_a_single_task_stand_alone():
    assert slurm_variables({"SLURM_JOB_ID": "41", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == {}
    assert slurm_variables(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert slurm_variables(SLURM | {"RANK": "3"}) == {}
    assert num_processes_here({}) == 1 and num_processes_here(SLURM) == 8
    assert num_processes_here({"WORLD_SIZE": "4"}) == 4


def test_the_rank_that_failed_is_named_and_not_those_that_lost_it():
    lost, killed, asked = (LOST_CONTACT, 101), (-signal.SIGKILL, 100), (-signal.SIGTERM, 101)
    with pytest.raises(ParallelError, match=r"rank 2 was ended by SIGKILL, and all others with it; out of memory"):
        report_failures({0: asked, 1: lost, 2: killed, 3: lost})
    with pytest.raises(ParallelError, match=r"rank 2 lost contact"):
        report_failures({1: asked, 2: lost, 3: lost})
    assert report_failures({0: lost, 1: asked, 3: (2, 100)}) == 2


def test_a_rank_that_had_to_be_killed_after_the_others_is_the_one_that_hung():
    with pytest.raises(ParallelError, match=r"rank 1 did not answer and had to be killed"):
        report_failures({0: (LOST_CONTACT, 100), 1: (-signal.SIGKILL, 110), 2: (-signal.SIGTERM, 100)})


def test_a_port_that_is_in_use_is_reported_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        meeting = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = run("sample", "conf=toy_lora", "prompt=x", "adapter=none", env=meeting)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert f"could not meet the others at 127.0.0.1:{port}" in last and "set MASTER_PORT to a free one" in last


def test_compiled_code_has_a_place_where_the_home_folder_cannot_be_written_to(tmp_path, monkeypatch):
    file = tmp_path / "home"
    file.touch()
    for home, expected in ((tmp_path / "new", tmp_path / "new"), (file, Path(tempfile.gettempdir()))):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        keep_compiled_code()
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(expected)
    assert not (tmp_path / "new").exists(), "nothing is made before it is needed"
