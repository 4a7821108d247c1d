import signal

import pytest

from mochi_tune.errors import ParallelError
from mochi_tune.launch import LOST_CONTACT, num_processes_here, report_failures, slurm_variables

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


def test_a_batch_script_and_a_single_task_stand_alone():
    assert slurm_variables({"SLURM_JOB_ID": "41", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == {}
    assert slurm_variables(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert slurm_variables(SLURM | {"RANK": "3"}) == {}
    assert num_processes_here({}) == 1 and num_processes_here(SLURM) == 8
    assert num_processes_here({"WORLD_SIZE": "4"}) == 4


def test_the_rank_that_failed_is_named_and_not_those_that_lost_it():
    codes = {0: LOST_CONTACT, 1: -signal.SIGKILL, 2: LOST_CONTACT}
    with pytest.raises(ParallelError, match=r"rank 1 was ended by SIGKILL, and all others with it; out of memory"):
        report_failures(codes)
    with pytest.raises(ParallelError, match=r"rank 2 lost contact"):
        report_failures({2: LOST_CONTACT, 3: LOST_CONTACT})
    assert report_failures({0: LOST_CONTACT, 3: 2}) == 2
