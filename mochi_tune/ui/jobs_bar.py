"""The bar of jobs below the tabs: running, waiting and ended jobs, with their logs and buttons to stop and go on."""

import signal
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_tune.errors import MochiTuneError, some
from mochi_tune.parallel.forecast import in_words
from mochi_tune.ui import html
from mochi_tune.ui.form import SettingsForm
from mochi_tune.ui.jobs import (
    Job,
    damaged_records,
    list_jobs,
    log_path,
    message_of,
    read_tail,
    repeat_job,
    revive_runner,
    stop_job,
)

NUM_SHOWN = 8
WORDS = {"partly": "done except for some clips"}
FOREIGN = "not started here: not run"


def build_bar(folder: Path, form: SettingsForm) -> None:
    """Builds the bar. It is drawn when the form is filled, as when a page opens, and when jobs have changed."""
    with gr.Column(elem_id="jobs"):
        gr.HTML("<h2>Jobs</h2>")
        table = gr.HTML(elem_id="jobs_table")
        # Without a job there is nothing to choose, stop or repeat.
        with gr.Row(equal_height=False, elem_id="job_row", visible=False) as row:
            chosen = gr.Dropdown([], label="Job", elem_id="job", scale=4, min_width=220)
            stop = gr.Button("Stop", elem_id="job_stop", min_width=90, scale=1)
            again = gr.Button("Go on", elem_id="job_again", min_width=90, scale=1)
        said = gr.HTML(elem_id="job_said")
        with gr.Accordion("Log", open=False):
            log = gr.HTML(elem_id="job_log")

    def refresh(number: int | None, shown: list) -> Any:
        jobs = list_jobs(folder)
        choices = _choices(jobs)
        numbers = [job.number for job in jobs]
        # The selection follows the running job until the user chooses another one.
        follows = number not in numbers or number == (shown[-1] if shown else None)
        if follows:
            number = next((job.number for job in jobs if job.state == "running"), numbers[-1] if numbers else None)
        now = [jobs_table(folder, jobs), html.log_lines(read_tail(log_path(folder, number))) if number else ""]
        now += [bool(jobs), (choices, number), number if follows else None]
        parts = [*now[:2], gr.Row(visible=bool(jobs)), gr.Dropdown(choices, value=number)]
        changed = [not shown or new != old for new, old in zip(now[:4], shown or now, strict=False)]
        return [*(part if each else gr.skip() for part, each in zip(parts, changed, strict=True)), now]

    def ask_to_stop(number: int | None) -> str:
        def act() -> str:
            job = stop_job(folder, number or 0)
            return f"{_name(job)}: {'taken out of the queue' if job.state == 'stopped' else 'asked to save and stop'}"

        return result_html(act)

    def go_on(number: int | None) -> tuple[str, Any]:
        added: list[Job] = []

        def add() -> str:
            added.append(repeat_job(folder, number or 0))
            return f"{_name(added[0])} is in the queue"

        said = result_html(add)
        # *Stop* then stops the new job.
        return said, gr.Dropdown(_choices(list_jobs(folder)), value=added[0].number) if added else gr.skip()

    state = gr.State([])
    outputs = [table, log, row, chosen, state]
    events = [form.poller.changes(jobs_state), form.filled_times.change, chosen.input]
    gr.on(events, refresh, [chosen, state], outputs, show_progress="hidden")
    for button, act, results in ((stop, ask_to_stop, said), (again, go_on, [said, chosen])):
        button.click(act, chosen, results, show_progress="hidden").then(
            refresh, [chosen, state], outputs, show_progress="hidden"
        )


def result_html(act: Any) -> str:
    """Returns the message of an action as HTML, or its error in one line."""
    try:
        return html.note(act(), "good")
    except MochiTuneError as error:
        return html.note(str(error), "error")
    except OSError as error:
        return html.note(f"{error.filename or 'the file'}: {error.strerror}.", "error")


def saved_html(act: Any) -> list[Any]:
    """Returns the message of an action that saves the conf, and the tick of `replaces`, which counts for one save."""
    said = result_html(act)
    return [said, gr.skip() if "note error" in said else False]


def jobs_state(folder: Path) -> str:
    """Returns the table of jobs, which includes running times, and revives the runner."""
    revive_runner(folder)
    return jobs_table(folder, list_jobs(folder))


def jobs_table(folder: Path, jobs: Sequence[Job]) -> str:
    """Returns the newest jobs as a table, with the last log line of the running job."""
    note = _damaged_html(folder)
    if not jobs:
        text = "Prepare the clips in Data, then start in Train."
        return note + html.empty_state("Nothing has been started yet", text)
    ended = [job.number for job in jobs if not job.is_open]
    hidden = set(ended[:-NUM_SHOWN])
    rows = "".join(_row(folder, job) for job in reversed(jobs) if job.number not in hidden)
    head = "<tr><th class='number'>#</th><th>command</th><th class='state_of'>state</th><th>time</th></tr>"
    return f'{note}<div class="scroll"><table class="plain">{head}{rows}</table></div>'


def _damaged_html(folder: Path) -> str:
    damaged = damaged_records(folder)
    if not damaged:
        return ""
    names = some([path.name for path in damaged])
    return html.note(
        f"Records of jobs in {damaged[0].parent} that cannot be read are not shown ({names}): they are damaged or of "
        "another version; remove them, and start those jobs again in their tabs.",
        "warning",
    )


def _row(folder: Path, job: Job) -> str:
    is_foreign = job.is_open and not job.is_own
    lines = read_tail(log_path(folder, job.number), 12) if job.state in ("running", "failed", "partly") else []
    last = message_of(lines) if job.state == "failed" else lines[-1] if lines else ""
    if job.state == "failed":
        last = last or _how_it_ended(job) or (lines[-1] if lines else "it ended without a message: see the log")
    words = WORDS.get(job.state, job.state)
    if is_foreign:
        words = FOREIGN
    elif job.state == "running" and job.is_asked_to_stop:
        words = "saves and stops"
    elif job.state == "stopped" and not job.began:
        words = "taken out of the queue"
    elif job.state == "stopped" and job.verb == "train" and (job.code or 0) > 128:
        words = "stopped, saved"
    seconds = (job.ended or time.time()) - job.began
    took = in_words(seconds) if job.began and not is_foreign else ""
    return (
        f"<tr><td class='number'>{job.number}</td><td><code>{escape(job.command)}</code></td>"
        f"<td class='state_of'><span class='state {job.state}'>{words}</span>{html.note(last[:300])}</td>"
        f"<td class='time'>{took}</td></tr>"
    )


def _how_it_ended(job: Job) -> str:
    if job.code is None:
        return "its exit code is unknown: see the log"
    if job.code >= 0:
        return ""
    known = {number.value: number.name for number in signal.Signals}
    name = known.get(-job.code, f"signal {-job.code}")
    return f"it was ended by {name}{', often because memory ran out' if name == 'SIGKILL' else ''}"


def _choices(jobs: Sequence[Job]) -> list[tuple[str, int]]:
    return [(f"{job.number}: {job.title}", job.number) for job in reversed(jobs)]


def _name(job: Job) -> str:
    return f"job {job.number}, {job.title}"
