import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers_process import run

from mochi_tune.cli.launch import (
    LOST_CONTACT,
    STARTED_HERE,
    check_num_processes,
    check_python,
    import_nothing_from_here,
    keep_compiled_code,
    name_process,
    num_processes_here,
    own_gpu,
    slurm_variables,
)
from mochi_tune.cli.main import run as run_here
from mochi_tune.errors import ConfigError, ParallelError

SLURM = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu-[003-004,009],login",
}  # fmt: skip
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


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


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
            "SLURM_STEP_NUM_TASKS=2 says that 2 processes were started together, but SLURM_LOCALID, "
            "SLURM_STEP_NODELIST, SLURM_JOB_ID, SLURM_STEP_ID are not set: start them by srun, or unset SLURM_STEP_NUM",
        ),
        (SLURM | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8 is no rank of 8 processes: it is from 0 to 7, let the"),
        (SLURM | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID=x is no rank of 8 processes"),
        (SLURM | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID=x is no number of a job: unset it"),
        (SLURM | {"SLURM_STEP_NODELIST": "["}, "SLURM_STEP_NODELIST=[ names no machine: start the processes by srun"),
        (SLURM | {"RANK": "3"}, "srun started 8 processes, and the environment variable RANK=3 is set without WORLD_S"),
        (TORCHRUN | {"MASTER_PORT": "abc"}, "MASTER_PORT=abc is no port: set it to one from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "99999999"}, "MASTER_PORT=99999999 is no port"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        (TORCHRUN | {"RANK": "x"}, "RANK=x is no rank of 2 processes: it is from 0 to 1, let the launcher set it"),
        (TORCHRUN | {"RANK": "5"}, "RANK=5 is no rank of 2 processes"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x is no number of a process: unset it"),
    ],
)
def test_a_variable_that_cannot_be_is_one_line_at_once(variables, said):
    with pytest.raises(ParallelError) as error:
        num_processes_here(variables)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert name_process(variables) == "mochi-tune"


def test_the_program_ends_at_once_where_a_rank_is_none_of_the_processes():
    for broken in ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, TORCHRUN | {"RANK": "5"}):
        done = run("train", "conf=my_lora", "model=tiny", env=broken)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.startswith("mochi-tune: the environment variable ") and done.stderr.count("\n") == 1


def test_a_gpu_that_the_launcher_shows_to_one_process_alone_is_that_ones():
    assert [own_gpu({"LOCAL_RANK": str(number)}, 4) for number in range(4)] == [0, 1, 2, 3]
    assert own_gpu({}, 1) == 0
    task = {"LOCAL_RANK": "3", "SLURM_LOCALID": "3"}
    for asked in (
        {"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_GPUS_PER_TASK": "a100:1"}, {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu:1"},
        {"SLURM_TRES_PER_TASK": "gres/gpu:a100=1"}, {"SLURM_NTASKS_PER_GPU": "1"}, {"SLURM_GPU_BIND": "single:1"},
    ):  # fmt: skip
        assert own_gpu(task | asked, 1) == 0, asked
    script = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"}
    assert own_gpu(script, 1) == own_gpu(script | {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "0"}, 1) == 0


@pytest.mark.parametrize(
    ("environment", "num_visible"),
    [
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "3"}, 1),
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "3", "SLURM_GPUS_PER_TASK": "2"}, 2),
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "3", "SLURM_TRES_PER_TASK": "gres/gpu:16"}, 1),
        # torchrun in a job of one task with one GPU.
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "0", "SLURM_GPUS_PER_TASK": "1"}, 1),
        # The same GPU for all: one of two processes is refused, whichever it is.
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0"}, 1),
        ({"LOCAL_RANK": "0"}, 0),
    ],
)
def test_processes_that_may_share_a_gpu_are_refused(environment, num_visible):
    with pytest.raises(ParallelError, match=r"needs a GPU of its own, and sees \d: .* with srun by --gpus-per-node"):
        own_gpu(environment, num_visible)


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
    assert last.startswith(f"mochi-tune: rank 0: could not meet the others at 127.0.0.1:{port}")
    assert "set MASTER_PORT to a free port" in last


def test_compiled_code_has_a_place_where_the_home_folder_cannot_be_written_to(tmp_path, monkeypatch):
    file = tmp_path / "home"
    file.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    # The last one is what a user id without a home folder has.
    for home, expected in ((tmp_path / "new", tmp_path / "new"), (file, tmp_path / "tmp"), ("~", tmp_path / "tmp")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        keep_compiled_code()
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(expected)
    assert not (tmp_path / "new").exists(), "nothing is made before it is needed"
    own = tmp_path / "tmp" / f"mochi_tune_{os.getuid()}"
    own.rmdir()
    for spoil in (own.touch, lambda: own.symlink_to("nowhere")):
        spoil()
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        keep_compiled_code()
        assert not Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(own)
        own.unlink()


def test_started_processes_do_not_execute_files_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("print('decoy')")
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "mine.py").write_text("print('mine')")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(Path(__file__).parents[2])
    import_nothing_from_here()
    assert "PYTHONSAFEPATH" not in os.environ, "a clone is searched"
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.chdir(tmp_path)
    import_nothing_from_here()
    code = "import queue, mine, mochi_tune.recipes"
    env = os.environ | {"PYTHONPATH": str(tmp_path / "found")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "mine\n"


def test_a_single_process_forgets_what_a_launcher_has_left_behind(monkeypatch, capsys):
    left = {"WORLD_SIZE": "1", "RANK": "1", "LOCAL_RANK": "1", "PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert run_here(["toy", "--help"]) == 0 and "toy" in capsys.readouterr().out
    assert not {"LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & os.environ.keys()


def test_a_mark_of_a_starter_that_is_not_the_parent_is_one_line():
    done = run("train", "conf=my_lora", env={STARTED_HERE: "17\x1b"})
    assert done.returncode == LOST_CONTACT and done.stderr.count("\n") == 1
    assert r"process 17\x1b, which MOCHI_TUNE_STARTED_HERE names" in done.stderr and "unset MOCHI" in done.stderr


def test_a_python_without_docstrings_is_refused():
    check_python(1)
    with pytest.raises(ConfigError, match=r"PYTHONOPTIMIZE=2 or python -OO.*: unset PYTHONOPTIMIZE, or set it to 1\."):
        check_python(2)
