"""`sample` in several real processes that are killed, hung, stopped and interrupted: a clear end, and nothing left."""

import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from helpers_process import Program, run_program, wait_for_end

from mochi_tune.sampling.video import read_frames

PROMPTS = ("a red circle moves up over a grey background", "a blue square")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    # Reading T5 may take longer than the seconds after which the tests have a rank missed.
    few = ["sample.steps=1", "sample.guidance=1", "sample.num_frames=7", f"sample.out={folder / 'first'}"]
    code, text = run_program(["sample", "conf=toy_lora", *settings(folder, "first", {}), *few], folder / "log")
    assert code == 0, text
    return folder


def settings(folder: Path, name: str, layout: dict) -> list[str]:
    given = [f"{key}={value}" for key, value in layout.items()]
    given += ["sample.adapter=none", "sample.num_frames=37", "sample.guidance=2", "sample.save_latents=true"]
    given += [f"sample.prompts={folder / 'prompts.txt'}", f"sample.prompt_cache={folder / 'cache'}"]
    return [*given, f"sample.out={folder / name}", f"run_dir={folder}"]


class Rendering(Program):
    """A rendering of two long videos by two processes, of which both are in the midst."""

    def __init__(self, folder: Path, name: str, *more: str) -> None:
        self.folder = folder / name
        # Ten times and more what the slower of two processes may be behind the other one when they start.
        layout = {"parallel.num_processes": 2, "parallel.context": 2, "parallel.timeout_seconds": 20}
        arguments = ["sample", "conf=toy_lora", *settings(folder, name, layout), *more]
        super().__init__(arguments, folder / f"{name}.log")
        self.wait_until(lambda: re.search(r"1/[12]:", self.err) is not None)
        self.ranks = sorted(psutil.Process(self.pid).children(), key=lambda p: int(p.environ()["RANK"]))
        # Some of its steps; it has far more of them than could be made meanwhile.
        time.sleep(0.5)

    def end(self) -> tuple[int, str]:
        """Returns the exit code and the last line; no process may be left."""
        code = self.wait()
        wait_for_end(self.ranks)
        return code, self.err.splitlines()[-1]


LONG = ("sample.steps=10000",)


def test_a_rank_that_is_killed_ends_all_and_is_named(folder):
    rendering = Rendering(folder, "killed", *LONG)
    rendering.ranks[1].send_signal(signal.SIGKILL)
    code, line = rendering.end()
    assert code == 2 and "rank 1 was ended by SIGKILL" in line
    assert not list(rendering.folder.rglob("*.*"))


def test_a_rank_that_hangs_ends_all_and_is_named(folder):
    rendering = Rendering(folder, "hung", *LONG)
    rendering.ranks[1].send_signal(signal.SIGSTOP)
    code, line = rendering.end()
    assert code == 2 and "rank 1 did not answer" in line
    assert not list(rendering.folder.rglob("*.*"))


def test_a_ctrl_c_keeps_what_is_finished(folder):
    # As a terminal sends it: to the process that was started, while the second video is under way.
    rows = [{"prompt": PROMPTS[0], "steps": 2}, {"prompt": PROMPTS[1], "steps": 10000}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rendering = Rendering(folder, "stopped", f"sample.prompts={folder / 'rows.jsonl'}")
    rendering.wait_until(lambda: "2/2:" in rendering.err)
    time.sleep(0.5)
    rendering.send(signal.SIGINT)
    code, line = rendering.end()
    assert code == 130 and line == "mochi-tune: interrupted"
    assert sorted(p.suffix for p in rendering.folder.iterdir()) == [".json", ".mp4", ".safetensors"]
    [video] = rendering.folder.glob("a_red_circle*.mp4")
    assert len(read_frames(video)) == 37


@pytest.mark.parametrize(("layout", "kept"), [("data", "0 of 1 video"), ("context", "1 of 2 videos")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_alone_is_the_exit_code_of_all(folder, layout, kept, number):
    """Rank 1 gets it while it samples the second video; finished videos are counted and kept."""
    # Only rank 0 shows its bar. When its own 40 steps are decoded, rank 1 has begun the other video long ago.
    rows = [{"prompt": PROMPTS[0], "steps": 40}, {"prompt": PROMPTS[1], "steps": 10000}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = [] if layout == "context" else ["parallel.context=1", "parallel.guidance=1", "parallel.data=2"]
    rendering = Rendering(folder, f"{layout}_{number}", f"sample.prompts={folder / 'rows.jsonl'}", *more)
    begun = r"2/2:" if layout == "context" else r"decode: [\d.]+ s, peak"
    rendering.wait_until(lambda: re.search(begun, rendering.err) is not None)
    time.sleep(0.5)
    rendering.ranks[1].send_signal(number)
    code, line = rendering.end()
    assert code == 128 + number and line == "mochi-tune: interrupted", rendering.err
    rank = {"data": 1, "context": 0}[layout]
    assert f"stopped: {kept} finished and kept by rank {rank}\n" in rendering.err
    assert [path.name[:12] for path in rendering.folder.glob("*.mp4")] == ["a_red_circle"]


@pytest.mark.parametrize("more", [(), ("parallel.shard=1/1",)])
def test_one_process_that_is_asked_to_stop_says_by_which_signal(folder, more):
    name = f"terminated_{len(more)}"
    arguments = [a for a in settings(folder, name, {}) if "num_processes" not in a]
    program = Program(["sample", "conf=toy_lora", *arguments, *LONG, *more], folder / f"{name}.log")
    program.wait_until(lambda: "1/2:" in program.err)
    time.sleep(0.5)
    program.send(signal.SIGTERM)
    assert program.wait() == 128 + signal.SIGTERM and program.err.splitlines()[-1] == "mochi-tune: interrupted"


def test_a_rank_that_is_stopped_with_a_video_of_its_own_is_named(folder):
    rendering = Rendering(folder, "stopped_alone", *LONG, "parallel.context=1", "parallel.guidance=1")
    rendering.ranks[1].send_signal(signal.SIGSTOP)
    code, line = rendering.end()
    assert code == 2 and "rank 1 did not answer" in line


def start_two(folder: Path, name: str, is_importing: bool) -> tuple[Program, list[psutil.Process]]:
    """Starts a rendering by two processes and returns when these are there, or also have loaded torch; not met yet."""
    arguments = settings(folder, name, {"parallel.num_processes": 2, "parallel.context": 2})
    program, ranks = Program(["sample", "conf=toy_lora", *arguments, *LONG], folder / f"{name}.log"), []

    def are_there() -> bool:
        ranks[:] = psutil.Process(program.pid).children()
        maps = [Path(f"/proc/{rank.pid}/maps").read_text() for rank in ranks]
        return len(ranks) == 2 and (not is_importing or all("libtorch" in text for text in maps))

    program.wait_until(are_there)
    return program, ranks


@pytest.mark.parametrize("is_importing", [False, True])
def test_a_ctrl_c_while_processes_start_ends_at_once(folder, is_importing):
    program, ranks = start_two(folder, f"early_{is_importing}", is_importing)
    program.send(signal.SIGINT)
    assert program.wait() == 130 and program.err.splitlines()[-1] == "mochi-tune: interrupted", program.text()
    wait_for_end(ranks)


@pytest.mark.parametrize("is_importing", [False, True])
def test_no_process_outlives_the_one_that_started_it(folder, is_importing):
    """Killed while its processes start, when they have not met yet, and later."""
    program, ranks = start_two(folder, f"orphan_{is_importing}", is_importing)
    program.kill()
    wait_for_end(ranks)
