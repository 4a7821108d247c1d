"""The road by clicks in headless Chromium: clips, captions, prepare, train with a stop, going on, sample, export."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers_video import write_video

from mochi_tune.ui.jobs import list_jobs
from mochi_tune.ui.runs import curves, list_runs, read_state, validation_curves

BROWSERS = [path for path in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser")) if path.exists()]
# A bound on hanging and nothing else.
PATIENCE = 120_000

pytestmark = pytest.mark.skipif(not BROWSERS, reason="no Chromium")


@pytest.fixture
def address(tmp_path):
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "mochi_tune.cli", "ui", f"folder={tmp_path / 'work'}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+/", server.stdout.readline())
        assert found
        yield found[0]
        server.send_signal(signal.SIGINT)
        server.wait(60)
    # What a failed test has left at work.
    for job in list_jobs(tmp_path / "work"):
        if job.state == "running":
            subprocess.run(["kill", "-9", str(job.pid)], check=False)


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(BROWSERS[0]), args=["--no-sandbox"])
        context = browser.new_context()
        context.set_default_timeout(PATIENCE)
        sync_api.expect.set_options(timeout=PATIENCE)
        yield context
        browser.close()


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_road_by_clicks(address, browser, tmp_path):
    from playwright.sync_api import expect

    work, clips = tmp_path / "work", tmp_path / "clips"
    clips.mkdir()
    for number in range(3):
        write_video(clips / f"clip {number}.mp4", 8, width=48, height=32, first_number=10 * number)
    for number in range(2):
        (clips / f"clip {number}.txt").write_text(f"a red ball {number}")
    asked = []
    browser.on("request", lambda request: asked.append(request.url))

    def open_page():
        page = browser.new_page()
        page.goto(address)
        return page

    page = open_page()
    expect(page.locator("#gallery_empty")).to_contain_text("No clips yet")
    page.locator("#model input").fill("tiny")
    page.locator("#model input").press("Enter")
    for key, value in (("num_frames", "7"), ("height", "32"), ("width", "48")):
        page.locator(f"#data_{key} textarea, #data_{key} input").fill(value)
    expect(page.locator("#data_message")).to_contain_text("7 frames, 48 x 32")
    page.locator("#data_width input, #data_width textarea").press("Tab")

    # Three clips and two captions; the third caption is written here.
    page.locator("input[type=file]").set_input_files(sorted(map(str, clips.glob("clip*"))))
    boxes = page.locator("#gallery .caption textarea")
    expect(page.locator("#gallery .card:visible")).to_have_count(3)
    expect(boxes.nth(1)).to_have_value("a red ball 1")
    boxes.nth(2).fill("a <b>blue</b> ball")
    boxes.nth(2).press("Tab")
    expect(page.locator("#data_said")).to_contain_text("clip 2.mp4 is saved")
    assert (work / "videos" / "clip 2.txt").read_text() == "a <b>blue</b> ball\n"

    page.locator("#prepare").click()
    expect(page.locator("#jobs_table")).to_contain_text("done")
    assert list_jobs(work)[0].code == 0 and (work / "cache" / "my_lora_tiny").is_dir()

    # A mistake is told as it is typed, and nothing starts.
    page.get_by_role("tab", name="Train").click()
    rank = page.locator("#lora_rank input, #lora_rank textarea")
    rank.fill("0")
    expect(page.locator("#train_message")).to_contain_text("lora.rank=0 is not possible: it must be at least 1.")
    page.locator("#train").click()
    expect(page.locator("#train_said")).to_contain_text("lora.rank=0 is not possible")
    assert len(list_jobs(work)) == 1
    rank.fill("2")
    for key, value in (("steps", "100000"), ("sample_every", "0")):
        page.locator(f"#train_{key} input, #train_{key} textarea").fill(value)
    page.get_by_text("All other settings").click()
    page.locator("#more textarea").fill("device=cpu\ntrain.recompute=none")
    expect(page.locator("#plan")).to_contain_text("fits")
    page.get_by_label("replace it").check()
    page.locator("#train").click()
    expect(page.locator("#train_said")).to_contain_text("is in the queue")

    # The browser leaves; the run goes on, and another page finds it.
    page.close()
    run_dir = work / "runs" / "my_lora_tiny"
    wait_until(lambda: read_state(run_dir).step >= 3)
    page = open_page()
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#figures")).to_contain_text("my_lora_tiny trains")
    second = open_page()
    expect(second.locator("#jobs_table")).to_contain_text("running")
    second.close()
    page.locator("#job_stop").click()
    expect(page.locator("#job_said")).to_contain_text("asked to save and stop")
    expect(page.locator("#jobs_table")).to_contain_text("stopped, saved")
    stopped = read_state(run_dir)
    assert stopped.checkpoints[-1] == stopped.step and stopped.owner_pid == 0

    # It goes on where it was.
    page.locator("#train_steps input, #train_steps textarea").fill(str(stopped.step + 3))
    page.get_by_label("replace it").check()
    page.locator("#train").click()
    expect(page.locator("#figures")).to_contain_text("my_lora_tiny is complete")
    assert read_state(run_dir).step == stopped.step + 3
    assert list_runs(work) == ["runs/my_lora_tiny"]
    points = curves(work, ["runs/my_lora_tiny"])
    assert points["loss"][-1]["step"] == stopped.step + 3 and points["lr"] and points["seconds"]
    assert {"mean", "σ 0.125"} <= {point["line"] for point in validation_curves(work, ["runs/my_lora_tiny"])}
    wait_until(lambda: list_jobs(work)[-1].ended)
    assert [job.state for job in list_jobs(work)] == ["done", "stopped", "done"]

    # Two strengths in a grid, and the history fills the form again.
    page.get_by_role("tab", name="Sample").click()
    expect(page.locator("#renders_empty")).to_contain_text("No videos yet")
    page.locator("#sample").click()
    expect(page.locator("#sample_said")).to_contain_text("prompt is empty")
    page.locator("#prompt textarea").fill("a red ball")
    page.locator("#sample_steps input, #sample_steps textarea").fill("2")
    page.get_by_label("grid", exact=True).check()
    page.locator("#strengths input, #strengths textarea").fill("0.5, 1")
    page.locator("#sample").click()
    expect(page.locator("#sample_said")).to_contain_text("is in the queue")
    cards = page.locator("#renders .card:visible")
    expect(cards).to_have_count(2)
    expect(page.locator("#renders")).to_contain_text("my_lora_tiny × 0.5")
    half = cards.filter(has_text="my_lora_tiny × 0.5")
    page.locator("#prompt textarea").fill("")
    half.get_by_role("button", name="Do it again").click()
    expect(page.locator("#prompt textarea")).to_have_value("a red ball")
    expect(page.locator("#strength_0 input, #strength_0 textarea")).to_have_value("0.5")
    with page.expect_download() as download:
        half.get_by_text("Download").click()
    assert download.value.suggested_filename.endswith(".mp4")

    page.get_by_role("tab", name="LoRA").click()
    expect(page.locator("#lora_file input")).to_have_value("my_lora_tiny, the result")
    page.locator("#export").click()
    expect(page.locator("#lora_said")).to_contain_text("it writes loras/my_lora_tiny_diffusers.safetensors")
    expect(page.locator("#lora_made")).to_contain_text("my_lora_tiny_diffusers.safetensors")
    assert (work / "loras" / "my_lora_tiny_diffusers.safetensors").is_file()
    wait_until(lambda: list_jobs(work)[-1].ended)
    assert [job.state for job in list_jobs(work)][3:] == ["done", "done"]
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not foreign
