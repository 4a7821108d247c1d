"""The bar of jobs: which job its buttons act on."""

import time

import pytest
from helpers_jobs import put

pytest.importorskip("gradio")

from mochi_tune.ui.jobs import Job, list_jobs
from mochi_tune.ui.page import build_page


def test_go_on_selects_the_new_job(tmp_path):
    go_on = next(event.fn for event in build_page(tmp_path).fns.values() if event.api_name == "go_on")
    put(tmp_path, Job(1, "toy", ["--help"], "help", state="stopped", ended=1.0))
    assert go_on is not None
    said, chosen = go_on(1)
    assert "job 2, help is in the queue" in said and chosen.value == 2
    assert [number for _, number in chosen.choices] == [2, 1]
    deadline = time.monotonic() + 300
    while not all(job.ended for job in list_jobs(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    said, chosen = go_on(7)
    assert "note error" in said and chosen == {"__type__": "update"}
