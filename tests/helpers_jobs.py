"""Records of jobs that this user has started."""

from dataclasses import replace
from pathlib import Path

from mochi_tune.ui.jobs import Job, changing, save_job
from mochi_tune.ui.signing import sign


def put(folder: Path, *jobs: Job) -> None:
    """Saves records of jobs with the signature of this user."""
    with changing(folder):
        for job in jobs:
            save_job(folder, replace(job, signature=sign(job.number, job.verb, job.arguments)))
