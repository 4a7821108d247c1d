"""`sample` in several real processes that are killed, hung, stopped and interrupted: a clear end, and nothing left."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers_process import Command
from helpers_road import ENVIRONMENT, command

from mochi_tune.sampling.video import read_frames

PROMPTS = ("a red circle moves up over a grey background", "a blue square")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    # Reading T5 may take longer than the few seconds after which the tests have a rank missed.
    few = ["sample.steps=1", "sample.guidance=1", "sample.num_frames=7", f"sample.out={folder / 'first'}"]
    assert Command(folder / "log", "sample", "conf=toy_lora", *settings(folder, "first", {}), *few).end() == 0
    return folder


def settings(folder: Path, name: str, layout: dict) -> list[str]:
    given = [f"{key}={value}" for key, value in layout.items()]
    given += ["sample.num_frames=37", "sample.guidance=2", "sample.save_latents=true"]
    given += [f"sample.prompts={folder / 'prompts.txt'}", f"sample.prompt_cache={folder / 'cache'}"]
    return [*given, f"sample.out={folder / name}", f"run_dir={folder}"]


class Rendering:
    """A rendering of two long videos by two processes, of which both are in the midst."""

    def __init__(self, folder: Path, name: str, *more: str) -> None:
        self.out = folder / name
        layout = {"parallel.num_processes": 2, "parallel.context": 2, "parallel.timeout_seconds": 3}
        arguments = [*settings(folder, name, layout), *more]
        self.process = subprocess.Popen(
            command("sample", "conf=toy_lora", *arguments), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        self.said = ""
        while "noise" not in self.said:
            assert self.process.poll() is None, self.said
            self.said += self.process.stderr.readline()
        self.ranks = sorted(psutil.Process(self.process.pid).children(), key=lambda p: int(p.environ()["RANK"]))
        time.sleep(1)

    def end(self) -> tuple[int, str, float]:
        """Returns the exit code, the last line, and the seconds it took; no process may be left."""
        started = time.monotonic()
        _, said = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(self.ranks, timeout=1)
        assert not alive
        return self.process.returncode, said.splitlines()[-1], time.monotonic() - started


LONG = ("sample.steps=20000",)


def test_a_rank_that_is_killed_ends_all_and_is_named(folder):
    rendering = Rendering(folder, "killed", *LONG)
    rendering.ranks[1].send_signal(signal.SIGKILL)
    code, line, seconds = rendering.end()
    assert code == 2 and "rank 1 was ended by SIGKILL" in line and seconds < 30
    assert not list(rendering.out.rglob("*.*"))


def test_a_rank_that_hangs_ends_all_and_is_named(folder):
    rendering = Rendering(folder, "hung", *LONG)
    rendering.ranks[1].send_signal(signal.SIGSTOP)
    code, line, seconds = rendering.end()
    # 3 seconds until it is missed.
    assert code == 2 and "rank 1 did not answer" in line and seconds < 35
    assert not list(rendering.out.rglob("*.*"))


def test_a_ctrl_c_keeps_what_is_finished(folder):
    # As a terminal sends it: to the process that was started, while the second video is under way.
    rendering = Rendering(folder, "stopped", "sample.steps=150")
    while rendering.said.count("noise") < 2:
        rendering.said += rendering.process.stderr.readline()
    time.sleep(0.5)
    os.kill(rendering.process.pid, signal.SIGINT)
    code, line, _ = rendering.end()
    assert code == 130 and line == "mochi-tune: interrupted"
    assert sorted(p.suffix for p in rendering.out.iterdir()) == [".json", ".mp4", ".safetensors"]
    [video] = rendering.out.glob("a_red_circle*.mp4")
    assert len(read_frames(video)) == 37


def test_a_rank_that_is_stopped_with_a_video_of_its_own_is_named(folder):
    rendering = Rendering(folder, "stopped_alone", *LONG, "parallel.context=1", "parallel.guidance=1")
    rendering.ranks[1].send_signal(signal.SIGSTOP)
    code, line, _ = rendering.end()
    assert code == 2 and "rank 1 did not answer" in line


@pytest.mark.parametrize("seconds", [2.5, 3.2])
def test_a_ctrl_c_while_processes_start_ends_at_once(folder, seconds):
    arguments = settings(folder, f"early_{seconds}", {"parallel.num_processes": 2, "parallel.context": 2})
    process = subprocess.Popen(
        command("sample", "conf=toy_lora", *arguments, *LONG), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=45)
    assert process.returncode == 130 and said.splitlines()[-1] == "mochi-tune: interrupted"


@pytest.mark.parametrize("seconds", [0, 2])
def test_no_process_outlives_the_one_that_started_it(folder, seconds):
    """Killed while its processes start, when they have not met yet, and later."""
    arguments = settings(folder, f"orphan_{seconds}", {"parallel.num_processes": 2, "parallel.context": 2})
    process = subprocess.Popen(
        command("sample", "conf=toy_lora", *arguments, *LONG), env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    ranks = []
    while len(ranks) < 2:
        assert process.poll() is None
        ranks = psutil.Process(process.pid).children()
        time.sleep(0.05)
    time.sleep(seconds)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
