import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers_process import run

from mochi_tune.cli.launch import check_num_processes, keep_compiled_code, num_processes_here, slurm_variables
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
    whole = {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert num_processes_here(whole) == 4 and num_processes_here({"WORLD_SIZE": "1"}) == 1


def test_variables_that_a_launcher_did_not_set_are_one_line():
    # A job script may set some of them for srun, which has its own.
    assert num_processes_here(SLURM | {"WORLD_SIZE": "8", "MASTER_ADDR": "a"}) == 8
    assert slurm_variables(SLURM | {"WORLD_SIZE": "8", "MASTER_ADDR": "a"})["RANK"] == "5"
    with pytest.raises(ParallelError, match="WORLD_SIZE=abc is no number of processes: unset it"):
        num_processes_here({"WORLD_SIZE": "abc"})
    with pytest.raises(ParallelError, match="RANK, MASTER_ADDR, MASTER_PORT are not set: start them by torchrun, or"):
        num_processes_here({"WORLD_SIZE": "2"})
    done = run("train", "conf=my_lora", "model=tiny", env={"WORLD_SIZE": "2", "RANK": "1"})
    assert done.returncode == 2 and done.stderr.startswith("mochi-tune: the environment variable WORLD_SIZE=2 says")


def test_a_setting_does_not_say_another_number_of_processes_than_the_launcher():
    two = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert [check_num_processes(asked, two) for asked in (1, 2, 4)] == [4, 4, 4]
    assert check_num_processes(8, {}) == 1
    with pytest.raises(ParallelError, match=r"parallel\.num_processes=3, but 4 processes were started: leave the"):
        check_num_processes(3, two)


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
