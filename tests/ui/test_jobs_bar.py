"""The bar of jobs: when it is shown, and which job its buttons act on."""

import time

import pytest
from helpers_jobs import put

pytest.importorskip("gradio")

from mochi_tune.ui.jobs import Job, list_jobs
from mochi_tune.ui.jobs_bar import build_bar
from mochi_tune.ui.page import build_page


def test_without_a_job_there_is_nothing_to_choose_stop_or_repeat(tmp_path):
    functions = [event.fn for event in build_page(tmp_path).fns.values() if event.fn is not None]
    refresh = next(fn for fn in functions if (fn.__module__, fn.__name__) == (build_bar.__module__, "refresh"))
    *_, row, _, shown = refresh(None, [])
    assert not row.visible
    put(tmp_path, Job(1, "toy", ["--help"], "help", state="done", ended=1.0))
    *_, row, chosen, _ = refresh(None, shown)
    assert row.visible and chosen.value == 1


def test_a_job_that_waits_is_taken_out_of_the_queue(tmp_path):
    functions = [event.fn for event in build_page(tmp_path).fns.values() if event.fn is not None]
    stop = next(fn for fn in functions if (fn.__module__, fn.__name__) == (build_bar.__module__, "ask_to_stop"))
    put(tmp_path, Job(1, "toy", ["--help"], "help"))
    assert "job 1, help: taken out of the queue" in stop(1) and list_jobs(tmp_path)[0].state == "stopped"


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
