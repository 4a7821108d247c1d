"""All steps by clicks in headless Chromium: clips, captions, prepare, train, stop, terminal, go on, sample, export.

The processes that the page starts take most of the time, so the test fills in one step while another one runs.
"""

import json
import re
import signal
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path

import pytest
from helpers_video import write_video

from mochi_tune.ui.jobs import list_jobs, log_path, read_tail
from mochi_tune.ui.runs import curves, list_runs, read_rows, read_state, validation_curves

BROWSERS = [path for path in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser")) if path.exists()]
# Milliseconds until a hanging test fails.
PATIENCE = 600_000


@pytest.fixture
def server(tmp_path):
    """The process of the page, which starts at the same time as the browser."""
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "mochi_tune.cli", "ui", f"folder={tmp_path / 'work'}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.send_signal(signal.SIGINT)
        server.wait(60)
    # Jobs that a failed test has left running.
    for job in list_jobs(tmp_path / "work"):
        if job.state == "running":
            subprocess.run(["kill", "-9", str(job.pid)], check=False)


@pytest.fixture
def browser(server):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(BROWSERS[0]), args=["--no-sandbox"])
        context = browser.new_context()
        context.set_default_timeout(PATIENCE)
        sync_api.expect.set_options(timeout=PATIENCE)
        yield context
        browser.close()


def wait_until(condition, work):
    """Waits for a condition. Fails with the logs of all jobs if one of them fails, or at the deadline."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition():
        jobs = list_jobs(work)
        failed = any(job.state == "failed" for job in jobs)
        assert not failed and time.monotonic() < deadline, describe(jobs, work)
        time.sleep(0.05)


def describe(jobs, work):
    return "\n".join(f"{job}\n" + "\n".join(read_tail(log_path(work, job.number))) for job in jobs)


def says(page, selector, text):
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text)


def field(page, name):
    return page.locator(f"#{name} input, #{name} textarea")


def show(page, tab):
    page.get_by_role("tab", name=tab).click()


def test_events_update_the_progress_of_components_that_show_it_only(tmp_path):
    pytest.importorskip("gradio")
    from mochi_tune.ui.page import build_page

    events = build_page(tmp_path).fns.values()
    quiet = [event for event in events if event.show_progress == "hidden"]
    assert len(quiet) > 0.9 * len(events) and all(len(event.show_progress_on or ()) == 1 for event in quiet)


@pytest.mark.skipif(not BROWSERS, reason="no Chromium")
def test_all_steps_by_clicks(server, browser, tmp_path):
    from playwright.sync_api import expect

    work, asked = tmp_path / "work", []
    run_dir = work / "runs" / "my_lora_tiny"
    browser.on("request", lambda request: asked.append(request.url))
    assert server.stdout is not None
    found = re.search(r"http://\S+/", server.stdout.readline())
    assert found

    def open_page():
        page = browser.new_page()
        page.goto(found[0])
        return page

    page = open_page()
    says(page, "#gallery_empty", "No clips yet")
    # There is nothing to turn the pages of.
    assert not page.locator("#pager").is_visible()
    choose_the_theme(page, open_page, work)
    rest(page, work)
    put_in_clips(page, work, tmp_path / "clips")
    page.locator("#prepare").click()
    says(page, "#data_said", "is in the queue")
    expect(page.locator("#data_message")).not_to_contain_text("will be written")
    # The training is filled in while the clips are prepared, and waits in the queue.
    fill_in_training(page, work)

    # A second page shows what the first one started. The first one is closed, and the run continues.
    first, page = page, open_page()
    wait_until(lambda: read_state(run_dir).step >= 3, work)
    assert list_jobs(work)[0].code == 0 and (work / "cache" / "my_lora_tiny").is_dir()
    for each in (first, page):
        says(each, "#jobs_table", "running")
    # The plan counts the clips, although it was drawn before they were prepared.
    says(first, "#plan", "3 in cache/my_lora_tiny")
    first.close()
    show(page, "Train")
    says(page, "#figures", "my_lora_tiny trains")
    page.locator("#job_stop").click()
    says(page, "#job_said", "asked to save and stop")
    says(page, "#jobs_table", "stopped, saved")
    stopped = read_state(run_dir)
    assert stopped.checkpoints[-1] == stopped.step and stopped.owner_pid == 0

    # A terminal resumes the run by its conf. The page shows that, samples meanwhile, and stops the run.
    command = ["nice", sys.executable, "-m", "mochi_tune.cli", "train", "conf=my_lora"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=work, text=True, **pipes) as terminal:
        try:
            sample_a_grid(page, stopped.step)
            show(page, "Train")
            wait_until(lambda: read_state(run_dir).step >= stopped.step + 2, work)
            says(page, "#figures", "my_lora_tiny trains")
            page.get_by_role("button", name="Stop my_lora_tiny: it saves first").click()
            says(page, "#run_stop_said", f"process {terminal.pid} was asked to save and stop")
            words = terminal.communicate(timeout=60)[0]
            assert terminal.returncode == 128 + signal.SIGTERM, words
        finally:
            terminal.kill()
    assert f"resuming runs/my_lora_tiny from step {stopped.step}\n" in words
    says(page, "#figures", "my_lora_tiny is stopped and can go on")
    there = read_state(run_dir)
    assert there.checkpoints[-1] == there.step >= stopped.step + 2 and len(list_jobs(work)) == 3

    # The page trains to the end, while the test checks the grid.
    for key in ("steps", "sample_every"):
        field(page, f"train_{key}").fill(str(there.step + 3))
    field(page, "train_sample_prompts").fill("a red ball\na blue ball")
    page.get_by_label("replace it").check()
    page.locator("#train").click()
    says(page, "#train_said", "is in the queue")
    expect(page.get_by_label("replace it")).not_to_be_checked()
    look_at_grid(page, work)
    reload(page, work)
    show(page, "Train")
    says(page, "#figures", "my_lora_tiny is complete")
    play_all(page, work)
    assert read_state(run_dir).step == there.step + 3 and list_runs(work) == ["runs/my_lora_tiny"]
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == list(range(1, there.step + 4))
    points = curves(work, ["runs/my_lora_tiny"])
    assert points["loss"][-1]["step"] == there.step + 3 and points["lr"] and points["seconds"]
    assert {"mean", "σ 0.125"} <= {point["line"] for point in validation_curves(work, ["runs/my_lora_tiny"])}

    show(page, "LoRA")
    page.locator("#lora_file input").click()
    page.get_by_role("option", name="my_lora_tiny, the result").click()
    page.locator("#export").click()
    says(page, "#lora_said", "it writes loras/my_lora_tiny_diffusers.safetensors")
    says(page, "#lora_made", "my_lora_tiny_diffusers.safetensors")
    assert (work / "loras" / "my_lora_tiny_diffusers.safetensors").is_file()
    wait_until(lambda: all(job.ended for job in list_jobs(work)), work)
    assert [job.state for job in list_jobs(work)] == ["done", "stopped", "done", "done", "done"]
    foreign = [url for url in asked if not url.startswith((found[0], "data:", "blob:"))]
    assert not foreign


def choose_the_theme(page, open_page, work):
    """The chosen theme is kept, and new pages open with it."""
    is_dark = "document.body.classList.contains('dark')"
    before = page.evaluate(is_dark)
    page.locator("#theme").click()
    wait_until(lambda: page.evaluate(is_dark) is not before, work)
    other = open_page()
    wait_until(lambda: other.evaluate(is_dark) is not before, work)
    other.close()


def rest(page, work):
    """While nothing happens, the page only polls and draws nothing."""
    asked = []

    def note(request):
        if "queue/join" in request.url:
            asked.append(json.loads(request.post_data)["fn_index"])

    page.on("request", note)
    # Waits until the opening page is idle.
    wait_until(lambda: page.wait_for_timeout(100) or (len(asked) >= 4 and len(set(asked[-4:])) == 1), work)
    page.remove_listener("request", note)


def put_in_clips(page, work, clips):
    """Uploads three clips and two captions, and writes the third caption on the page."""
    from playwright.sync_api import expect

    clips.mkdir()
    for number in range(3):
        write_video(clips / f"clip {number}.mp4", 8, width=48, height=32, first_number=10 * number)
    for number in range(2):
        (clips / f"clip {number}.txt").write_text(f"a red ball {number}")
    assert not page.locator("#model input").is_editable(), "text typed into a list may be lost"
    page.locator("#model input").click()
    page.get_by_role("option", name="tiny", exact=True).click()
    expect(page.locator("#model input")).to_have_value("tiny")
    # The model has sizes of its own.
    says(page, "#data_message", "96 x 64")
    for key, value in (("num_frames", "7"), ("height", "32"), ("width", "48")):
        field(page, f"data_{key}").fill(value)
    says(page, "#data_message", "7 frames, 48 x 32")
    page.locator("input[type=file]").set_input_files(sorted(map(str, clips.glob("clip*[!1].*"))))
    boxes = page.locator("#gallery .caption textarea")
    expect(page.locator("#gallery .card:visible")).to_have_count(2)
    drop(page, clips / "clip 1.mp4", clips / "clip 1.txt")
    expect(page.locator("#gallery .card:visible")).to_have_count(3)
    expect(boxes.nth(1)).to_have_value("a red ball 1")
    boxes.nth(2).fill("a <b>blue</b> ball")
    boxes.nth(2).press("Tab")
    says(page, "#data_said", "clip 2.mp4 is saved")
    assert (work / "videos" / "clip 2.txt").read_text() == "a <b>blue</b> ball\n"


def drop(page, *files):
    """Drops files somewhere on the page, which uploads them and opens none of them."""
    dropped = """
    (files) => {
      const data = new DataTransfer();
      const bytes = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
      files.forEach(([name, text]) => data.items.add(new File([bytes(text)], name)));
      return !document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }
    """
    assert page.evaluate(dropped, [[file.name, b64encode(file.read_bytes()).decode()] for file in files])


def fill_in_training(page, work):
    """The page reports a mistake while it is typed, and starts nothing until it is corrected."""
    show(page, "Train")
    field(page, "lora_rank").fill("0")
    says(page, "#train_message", "lora.rank=0 is not possible: it must be at least 1.")
    page.locator("#train").click()
    says(page, "#train_said", "lora.rank=0 is not possible")
    assert len(list_jobs(work)) == 1
    field(page, "lora_rank").fill("2")
    for key, value in (("steps", "100000"), ("sample_every", "0")):
        field(page, f"train_{key}").fill(value)
    page.get_by_text("All other settings").click()
    # No checkpoints except those of stops, because the grid samples the first one, which must not be removed before.
    page.locator("#more textarea").fill(
        "device=cpu\ntrain.recompute=none\nsample.steps=2\ntrain.checkpoint_every=100000"
    )
    says(page, "#plan", "fits")
    page.get_by_label("replace it").check()
    page.locator("#train").click()
    says(page, "#train_said", "is in the queue")


def sample_a_grid(page, step):
    """Samples two strengths of a checkpoint, while the run continues."""
    show(page, "Sample")
    says(page, "#renders_empty", "No videos yet")
    page.locator("#sample").click()
    says(page, "#sample_said", "prompt is empty")
    page.locator("#prompt textarea").fill("a red ball")
    field(page, "sample_steps").fill("2")
    page.locator("#adapter_0 input").click()
    page.get_by_role("option", name=f"my_lora_tiny, step {step}").click()
    page.get_by_label("grid", exact=True).check()
    field(page, "strengths").fill("0.5, 1")
    page.locator("#sample").click()
    says(page, "#sample_said", "is in the queue")


def play_all(page, work):
    """The eval videos of the last step are paused until the button plays all of them from the start."""
    from playwright.sync_api import expect

    expect(page.locator("#samples video")).not_to_have_count(0)
    every = "[...document.querySelectorAll('#samples video')].every((video) => {})"
    assert page.evaluate(every.format("video.paused"))
    page.locator("#play_all").click()
    wait_until(lambda: page.evaluate(every.format("video.played.length > 0")), work)


def reload(page, work):
    """The page keeps its LoRA, though another conf is newer. On a phone the state of a job has the whole width."""
    from playwright.sync_api import expect

    # It is kept when the form is filled in, a moment after it was chosen.
    kept = "sessionStorage.getItem('mochi_tune_lora')"
    wait_until(lambda: page.evaluate(kept) == "my_lora", work)
    page.reload()
    expect(page.locator("#model input")).to_have_value("tiny")
    assert page.locator("#conf input").input_value() == "my_lora"
    wide = page.viewport_size
    page.set_viewport_size({"width": 375, "height": 800})
    assert page.locator("#jobs_table td.state_of").first.bounding_box()["width"] > 300
    page.set_viewport_size(wide)


def look_at_grid(page, work):
    """The history fills in the form and chooses the conf of the run. The server delivers videos and the grid's page."""
    from playwright.sync_api import expect

    show(page, "Sample")
    cards = page.locator("#renders .card:visible")
    wait_until(lambda: cards.count() == 2, work)
    half = cards.filter(has_text="× 0.5")
    page.locator("#prompt textarea").fill("")
    (work / "conf" / "another.yaml").write_text("lora: [<b>")
    page.locator("#conf input").fill("another")
    page.locator("#conf input").press("Enter")
    # The notice of a conf that cannot be read stays until it is closed, and quotes the file; the page goes on.
    says(page, ".toast-body", "another.yaml is not YAML")
    expect(page.get_by_label("replace it")).not_to_be_checked()
    says(page, ".toast-body", "<stream end>")
    page.locator(".toast-close").click()
    half.get_by_role("button", name="Do it again").click()
    says(page, "#sample_said", "conf/my_lora.yaml is chosen")
    expect(page.locator("#prompt textarea")).to_have_value("a red ball")
    expect(field(page, "strength_0")).to_have_value("0.5")
    expect(page.locator("#conf input")).to_have_value("my_lora")
    with page.expect_download() as download:
        half.get_by_text("Download").click()
    assert download.value.suggested_filename.endswith(".mp4")
    with page.expect_popup() as grid:
        page.locator("#grids").get_by_text("open its page").click()
    expect(grid.value.locator("video")).to_have_count(2)
    # Playwright's own waiting evaluates scripts in the page, which the policy of the page forbids.
    loaded = "[...document.querySelectorAll('video')].every((video) => video.readyState > 0)"
    wait_until(lambda: grid.value.evaluate(loaded), work)
    grid.value.close()
