"""Trackers in their process: each step arrives once, and their failures do not affect the run."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers_process import PATIENCE, wait_for_end
from helpers_trackers import (
    RECORDER,
    environment,
    fake_wandb,
    processes_of,
    read_rows,
    run,
    start,
    wait_until,
    wandb_history,
)
from PIL import Image

from mochi_tune.config.schema import LogConfig
from mochi_tune.sampling.video import write_video
from mochi_tune.training.trackers import check_trackers


def assert_whole(run_dir: Path, steps: int) -> None:
    """The JSONL files have every row."""
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == list(range(1, steps + 1))
    assert [row["step"] for row in read_rows(run_dir / "validation.jsonl")] == list(range(0, steps + 1, 2))


def recorded(run_dir: Path) -> tuple[list[int], list[int]]:
    """Returns the steps and the validations' steps that were sent to the recorder."""
    rows = [row for row in read_rows(run_dir / "trackers" / "recorded.jsonl") if "row" in row]
    validations = [row["row"]["validation/step"] for row in rows if "validation/step" in row["row"]]
    return [row["step"] for row in rows if "metrics/loss" in row["row"]], validations


def test_wandb_offline_has_every_step_once_after_a_resume(tmp_path):
    # The first run ends during a validation, which the second one repeats.
    for last_step, steps, left_out in ((0, 6, 6), (4, 6, 6), (6, 10, None)):
        lines = run(tmp_path / "run", last_step, steps, wandb="offline", left_out=left_out)
        assert "stopped" not in "".join(lines)
    # The second start had no new rows.
    first, second = sorted((tmp_path / "run" / "trackers").glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name
    rows = [*wandb_history(first), *wandb_history(second)]
    # W&B accepts each step once.
    assert [row["_step"] for row in rows] == list(range(11))
    losses = [(row["_step"], row["metrics/loss"]) for row in rows if "metrics/loss" in row]
    assert losses == [(step, step / 8) for step in range(1, 11)]
    validations = [row for row in rows if "validation/step" in row]
    assert [row["validation/step"] for row in validations] == [0, 2, 4, 6, 8, 10]
    assert [row["_step"] for row in validations] == [0, 2, 4, 7, 8, 10]
    assert [row["validation/bins/0.125"] for row in validations] == [0, 1, 2, 3, 4, 5]
    assert not [key for row in rows for key in row if "clips" in key or "sigmas" in key]


def test_tensorboard_has_every_step_once_after_a_resume_and_a_loss_of_memory(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    lines = run(run_dir, 0, 5, tensorboard=True)
    assert "stopped" not in "".join(lines)
    # As if the tracker had been killed before it noted the last two steps; of those, the checkpoint has none.
    memory = run_dir / "trackers" / "tensorboard.json"
    memory.write_text(json.dumps({**json.loads(memory.read_text()), "metrics": 3, "validation": 2}))
    run(run_dir, 3, 8, tensorboard=True)
    events = EventAccumulator(str(run_dir / "trackers" / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("metrics/loss")]
    assert losses == [(step, step / 8) for step in range(1, 9)]
    bins = [(event.step, event.value) for event in events.Scalars("validation/bins/0.125")]
    assert bins == [(step, step / 2) for step in (0, 2, 4, 6, 8)]
    assert set(events.Tags()["scalars"]) == {
        *("metrics/loss", "metrics/lr", "validation/validation_loss", "validation/bins/0.125")
    }


def write_videos(run_dir: Path, steps: Sequence[int]) -> None:
    """Writes eval videos of two prompts."""
    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    for step in steps:
        for prompt in range(2):
            frames = torch.full((7, 32, 96, 3), 40 * step % 250 + prompt, dtype=torch.uint8)
            write_video(run_dir / "samples" / f"step_{step:06d}_prompt_{prompt}.mp4", [frames])


def test_wandb_and_tensorboard_have_every_eval_video_once_at_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    write_videos(run_dir, [0, 2, 4])
    assert "stopped" not in "".join(run(run_dir, 0, 4, wandb="offline", tensorboard=True))
    # A video of a later step waits for the row of that step.
    write_videos(run_dir, [6, 99])
    assert "stopped" not in "".join(run(run_dir, 4, 6, wandb="offline", tensorboard=True))
    events = EventAccumulator(str(run_dir / "trackers" / "tensorboard"), {"images": 0})
    events.Reload()
    for prompt in range(2):
        images = events.Images(f"samples/prompt_{prompt}")
        assert [image.step for image in images] == [0, 2, 4, 6]
        with Image.open(io.BytesIO(images[1].encoded_image_string)) as gif:
            assert (gif.format, gif.size) == ("GIF", (96, 32))
            assert abs(gif.convert("RGB").getpixel((40, 16))[0] - 80 - prompt) < 8
    rows = [row for f in sorted(run_dir.glob("trackers/wandb/offline-run-*/run-*.wandb")) for row in wandb_history(f)]
    shown = [(row["_step"], row["samples/step"]) for row in rows if "samples/step" in row]
    assert shown == [(0, 0), (2, 2), (4, 4), (6, 6)]
    assert rows[0]["samples/prompt_0/_type"] == "video-file" and rows[0]["samples/prompt_1/caption"] == "a cat"
    assert json.loads((run_dir / "trackers" / "wandb.json").read_text())["metrics"] == 6


def test_trackio_has_every_step_once_after_a_resume(tmp_path):
    env = environment(TRACKIO_DIR=str(tmp_path / "trackio"))
    for last_step, steps in ((0, 5), (4, 8)):
        lines = run(tmp_path / "run", last_step, steps, env, trackio=True, project="p")
        assert "stopped" not in "".join(lines)
    read = "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as storage; "
    read += "[one] = trackio.Api().runs('p'); print(json.dumps(storage.get_logs('p', one.name)))"
    rows = json.loads(subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, check=True).stdout)
    losses = [(row["step"], row["metrics/loss"]) for row in rows if "metrics/loss" in row]
    assert losses == [(step, step / 8) for step in range(1, 9)]
    assert [row["step"] for row in rows if "validation/bins/0.125" in row] == [0, 2, 4, 6, 8]


def test_a_run_that_begins_again_is_another_one_to_the_tracker(tmp_path):
    env, run_dir = fake_wandb(tmp_path, RECORDER), tmp_path / "run"
    run(run_dir, 0, 3, env, wandb="offline")
    run(run_dir, 2, 4, env, wandb="offline")
    (run_dir / "validation.jsonl").unlink()
    run(run_dir, 0, 2, env, wandb="offline")
    assert recorded(run_dir) == ([1, 2, 3, 4, 1, 2], [0, 2, 4, 0, 2])
    # A moved folder is a new run for the trackers.
    run_dir.rename(tmp_path / "copy")
    run(tmp_path / "copy", 2, 3, env, wandb="offline")
    assert recorded(tmp_path / "copy")[0][-3:] == [1, 2, 3]
    rows = read_rows(tmp_path / "copy" / "trackers" / "recorded.jsonl")
    first, second, third, fourth = [row["id"] for row in rows if "id" in row]
    assert first == second and len({first, third, fourth}) == 3


FAULTS = {
    "hangs at its start": ("import time\ntime.sleep(10**6)", "did not take the last rows within 1 s"),
    "hangs in a log": (RECORDER.replace("self.write(row=row, step=step)", "__import__('time').sleep(10**6)"), "1 s"),
    "hangs at its end": (RECORDER.replace("self.write(finished=True)", "__import__('time').sleep(10**6)"), "1 s"),
    "refuses": ("Settings = dict\ndef init(**_): raise RuntimeError('401:\\n no such user')", "(401: no such user)"),
    "has a full disk": (
        RECORDER.replace("self.write(row=row, step=step)", "raise OSError(28, 'No space left on device')"),
        "No space left on device",
    ),
    "is killed": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "(ended by SIGKILL)"),
    "ends": ("import os\nos._exit(3)", "(exit code 3, see "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tracker_that_fails_costs_the_run_a_line(tmp_path, fault):
    code, reason = FAULTS[fault]
    env, run_dir = fake_wandb(tmp_path, code), tmp_path / "run"
    # It would wait for one that hangs for ever, if it waited for one; the others have the time that they take to fail.
    lines = run(run_dir, 0, 20, env, wandb="offline", close_seconds=1 if "hangs" in fault else 300, pause=0.05)
    assert_whole(run_dir, 20)
    [line] = lines
    assert line.startswith("mochi-tune: log.wandb stopped (") and reason in line and "metrics.jsonl" in line
    assert processes_of(run_dir) == []


def test_a_tracker_that_has_failed_is_started_again_later_and_has_every_step(tmp_path):
    fails_once = """
import os
if not os.path.exists(flag := os.path.join(os.path.dirname(__file__), "flag")):
    open(flag, "w").close()
    raise OSError("no network")
"""
    env, run_dir = fake_wandb(tmp_path, fails_once + RECORDER), tmp_path / "run"
    trainer = start(run_dir, 0, 10**6, env, wandb="offline", pause=0.02, retry=0.5, until=str(tmp_path / "enough"))
    wait_until(lambda: (run_dir / "trackers" / "recorded.jsonl").exists() and recorded(run_dir)[0])
    (tmp_path / "enough").touch()
    _, line = trainer.communicate(timeout=PATIENCE)
    assert trainer.returncode == 0 and line.count("\n") == 1 and "log.wandb stopped (no network)" in line
    steps = len(read_rows(run_dir / "metrics.jsonl"))
    assert_whole(run_dir, steps)
    assert recorded(run_dir) == (list(range(1, steps + 1)), list(range(0, steps + 1, 2)))


@pytest.mark.parametrize("what", ["trackers", "trackers/follower.log", "trackers/wandb.json"])
def test_a_place_that_cannot_be_written_costs_the_run_a_line(tmp_path, what):
    env, run_dir = fake_wandb(tmp_path, RECORDER), tmp_path / "run"
    # Nobody can write a file in a file's place, or over a folder; not even root, who may run this.
    (run_dir / what).parent.mkdir(parents=True)
    if what == "trackers":
        (run_dir / what).write_text("a file")
    else:
        (run_dir / what).mkdir()
    lines = run(run_dir, 0, 20, env, wandb="offline")
    assert_whole(run_dir, 20)
    [line] = lines
    assert line.startswith("mochi-tune: log.wandb stopped (") and what in line
    assert processes_of(run_dir) == []


def test_a_tracker_is_killed_while_the_run_goes_on_and_the_next_start_sends_what_is_missing(tmp_path):
    run_dir = tmp_path / "run"
    trainer = start(run_dir, 0, 10**6, tensorboard=True, pause=0.02, until=str(tmp_path / "enough"))
    memory = run_dir / "trackers" / "tensorboard.json"
    wait_until(lambda: memory.exists() and json.loads(memory.read_text())["metrics"] > 0)
    os.kill(processes_of(run_dir)[0].pid, signal.SIGKILL)
    wait_until(lambda: processes_of(run_dir) == [])
    sent = json.loads(memory.read_text())["metrics"]
    wait_until(lambda: len((run_dir / "metrics.jsonl").read_text().splitlines()) > sent)
    (tmp_path / "enough").touch()
    _, err = trainer.communicate(timeout=PATIENCE)
    assert trainer.returncode == 0 and err.count("\n") == 1 and "log.tensorboard stopped (ended by SIGKILL)" in err
    steps = len(read_rows(run_dir / "metrics.jsonl"))
    assert_whole(run_dir, steps)
    assert json.loads(memory.read_text())["metrics"] == sent < steps
    run(run_dir, steps, steps + 2, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "trackers" / "tensorboard"), {"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("metrics/loss")] == list(range(1, steps + 3))


def test_the_rows_of_a_trainer_that_was_killed_still_arrive_and_no_process_is_left(tmp_path):
    env, run_dir = fake_wandb(tmp_path, RECORDER), tmp_path / "run"
    trainer = start(run_dir, 0, 10**6, env, wandb="offline", pause=0.01)
    wait_until(lambda: (run_dir / "trackers" / "recorded.jsonl").exists() and recorded(run_dir)[0])
    trainer.kill()
    trainer.communicate()
    wait_until(lambda: processes_of(run_dir) == [])
    assert recorded(run_dir)[0] == [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]
    assert read_rows(run_dir / "trackers" / "recorded.jsonl")[-1] == {"finished": True}
    # The next start continues from there.
    steps = len(recorded(run_dir)[0])
    run(run_dir, steps // 2, steps + 5, env, wandb="offline")
    assert recorded(run_dir)[0] == list(range(1, steps + 6))


def test_a_tracker_that_hangs_ends_by_itself_when_its_trainer_was_killed(tmp_path):
    env, run_dir = fake_wandb(tmp_path, "import subprocess\nsubprocess.run(['sleep', '1000'])"), tmp_path / "run"
    trainer = start(run_dir, 0, 10**6, env, wandb="offline", pause=0.01, close_seconds=1)
    wait_until(lambda: len(processes_of(run_dir)) == 2)
    left = processes_of(run_dir)
    trainer.kill()
    trainer.communicate()
    wait_for_end(left)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_everybody_leaves_the_tracker_time_for_the_last_rows(tmp_path, number):
    env, run_dir = fake_wandb(tmp_path, RECORDER), tmp_path / "run"
    trainer = start(run_dir, 0, 10**6, env, wandb="offline", pause=0.01)
    wait_until(lambda: (run_dir / "trackers" / "recorded.jsonl").exists() and recorded(run_dir)[0])
    for process in processes_of(run_dir):
        assert os.getsid(process.pid) != os.getsid(trainer.pid)
        # A cluster signals every process of a job, whatever its session.
        process.send_signal(number)
    os.killpg(trainer.pid, signal.SIGINT)
    _, err = trainer.communicate(timeout=PATIENCE)
    # No line is printed, because nothing was lost.
    assert trainer.returncode == 0 and err == ""
    assert recorded(run_dir)[0] == list(range(1, len(read_rows(run_dir / "metrics.jsonl")) + 1))
    assert processes_of(run_dir) == []


def check(*arguments: str, env: dict[str, str]) -> str:
    """Returns the error of a check of the trackers in a process of its own, or an empty text."""
    code = "from mochi_tune.training.trackers import check_trackers\nfrom mochi_tune.errors import ConfigError\n"
    # Not the config's own section, which needs more packages.
    code += "class Log: wandb, tensorboard, trackio = 'disabled', False, False\n"
    code += f"{'; '.join(f'Log.{argument}' for argument in arguments)}\n"
    code += "try: check_trackers(Log)\nexcept ConfigError as error: print(error)"
    done = subprocess.run([sys.executable, *env.pop("FLAGS", "").split(), "-c", code], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def test_a_package_that_is_not_installed_is_reported_before_the_start(tmp_path):
    # Without the installed packages, but for those that are always needed.
    for name in ("psutil", "tqdm"):
        (tmp_path / name).symlink_to(Path(__import__(name).__file__).parent)
    (tmp_path / "mochi_tune").symlink_to(Path(__import__("mochi_tune").__file__).parent)
    env = {"FLAGS": "-S", "PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    assert "pip install 'mochi-tune[trackio]'" in check("trackio=True", env=dict(env))
    assert check("tensorboard=True", env=dict(env)) == (
        "log.tensorboard=true needs a package that is not installed: run pip install tensorboard."
    )
    assert check("wandb='disabled'", env=dict(env)) == ""
    check_trackers(LogConfig(wandb="offline", tensorboard=True))


def test_wandb_online_without_a_login_is_reported_before_the_start_and_without_a_network(tmp_path):
    # An address without a server.
    env = environment(HOME=str(tmp_path), WANDB_BASE_URL="https://192.0.2.1")
    env = {key: value for key, value in env.items() if key not in ("WANDB_API_KEY", "NETRC")}
    assert "log.wandb=online: No API key configured" in check("wandb='online'", env=dict(env))
    assert "invalid" in check("wandb='online'", env={**env, "WANDB_API_KEY": "short"})
    assert check("wandb='online'", env={**env, "WANDB_API_KEY": "a" * 40}) == ""
    (tmp_path / ".netrc").write_text("machine 192.0.2.1\n  login user\n  password " + "a" * 40 + "\n")
    assert check("wandb='online'", env=dict(env)) == ""
