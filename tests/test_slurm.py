"""The jobs of docs/slurm, run by bash with an srun that records its command and ends as told."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mochi_tune.cli.options import load

JOBS = sorted((Path(__file__).parent.parent / "docs" / "slurm").glob("*.sbatch"))
STOPPABLE = ("prepare.sbatch", "sample_array.sbatch", "train.sbatch")


def run_job(job: Path, folder: Path, exit_code: int) -> tuple[int, list[str]]:
    """Returns the exit code of a job, and the commands of Slurm that it ran."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f'export PATH="{folder}:$PATH"\n')
    for name, code in (("srun", exit_code), ("scontrol", 0)):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/commands\nexit {code}\n')
        (folder / name).chmod(0o755)
    slurm = {"SUBMIT_DIR": str(folder), "JOB_ID": "77", "ARRAY_TASK_ID": "3", "CPUS_PER_TASK": "8"}
    env = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    done = subprocess.run(["bash", "-u", str(job)], env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, (folder / "commands").read_text().splitlines()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
@pytest.mark.parametrize("exit_code", [0, 2, 75, 134, 143])
def test_a_job_that_was_stopped_is_requeued_and_no_other(job, exit_code, tmp_path):
    code, commands = run_job(job, tmp_path, exit_code)
    assert code == exit_code
    requeued = ["scontrol requeue 77"] if exit_code == 143 and job.name in STOPPABLE else []
    assert commands[1:] == requeued
    verb, *arguments = shlex.split(commands[0])[2:]
    load(verb, [*arguments, "--cfg"])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_slurm_reads_every_option_ahead_of_the_first_command(job):
    text = job.read_text()
    assert text.startswith("#!/bin/bash\n") and "#SBATCH --open-mode=append\n" in text
    first = re.search(r"^[^#\n]", text, re.MULTILINE)
    assert first is not None and "#SBATCH" not in text[first.start() :]
    options = set(re.findall(r"^#SBATCH (--[\w-]+)", text, re.MULTILINE))
    assert {"--time", "--output"} <= options
    assert ({"--requeue", "--signal"} <= options) == (job.name in STOPPABLE)
