"""How pools assign tasks, and what a worker refuses; tests/faults tests the processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_prepare import TINY

from mochi_tune.data.parts import PartsFolder
from mochi_tune.data.rows import CacheSettings
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.pools import Death, WorkerPool, make_worker, run_caught
from mochi_tune.data_prep.tasks import CaptionTask, Worker, WorkerSettings
from mochi_tune.errors import ParallelError
from mochi_tune.weights.paths import WeightsPaths

TASKS = [CaptionTask(str(number), f"caption {number}", f"{number}.mp4") for number in range(7)]


class Workers(WorkerPool):
    """Workers without processes; the newest task finishes first, and some workers die on some tasks."""

    def __init__(self, count: int, deaths: dict[str, int]) -> None:
        super().__init__(count)
        self.deaths, self.in_hand, self.given = dict(deaths), {}, []

    def __exit__(self, *_: object) -> None:
        self.in_hand.clear()

    def _submit(self, slot, task, ahead) -> None:
        assert slot not in self.in_hand and slot < self.count
        self.in_hand[slot] = task
        self.given.append(task.key)

    def _wait(self, seconds):
        slot, task = self.in_hand.popitem()
        if self.deaths.get(task.key, 0):
            self.deaths[task.key] -= 1
            return slot, Death("killed by SIGKILL")
        return slot, []


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_every_task_is_done_once_whoever_dies(count):
    counted = []
    with Workers(count, {"0": 2, "3": 1, "6": 2}) as pool:
        done = [task.key for task, _ in pool.run(TASKS, counted.append)]
    assert sorted(done) == [task.key for task in TASKS] and sum(counted) == len(TASKS)
    assert sorted(pool.given) == sorted([*done, "0", "0", "3", "6", "6"])


def test_a_task_that_three_workers_died_on_ends_the_run_and_is_named():
    with Workers(2, {"5": 3}) as pool, pytest.raises(ParallelError, match=r"3 workers died on 5\.mp4; .* by SIGKILL"):
        list(pool.run(TASKS, lambda _: None))


def test_a_task_that_is_long_in_hand_is_told_once(capsys):
    with Workers(3, {}) as pool:
        pool.patience = 0.0
        list(pool.run(TASKS, lambda _: None))
    told = [line.split(" ")[0] for line in capsys.readouterr().out.splitlines()]
    # The newest task finishes first: the first two run longest.
    assert told == ["1.mp4", "0.mp4"] or told == ["0.mp4", "1.mp4"]
    with Workers(3, {}) as pool:
        list(pool.run(TASKS, lambda _: None))
    assert not capsys.readouterr().out


def settings_for(folder: Path, t5: str) -> WorkerSettings:
    settings = CacheSettings(transform={}, vae="v" * 64, vae_dtype="fp32", t5=t5, t5_dtype="fp32")
    return WorkerSettings(WeightsPaths(TINY), settings, folder, "cpu", 600, 1)


def test_a_worker_with_other_weights_than_the_main_process_refuses_and_encodes_nothing(tmp_path):
    with ClipDecoder(600) as decoder:
        worker = make_worker(settings_for(tmp_path, "f" * 64), decoder)
        error = run_caught(worker, TASKS[0], None)
        worker.close()
    assert isinstance(error, ParallelError) and "the weights of the text_encoder" in str(error)
    assert "ffffffffffffffff… in the main process" in str(error) and not list(tmp_path.iterdir())


# Ctrl-C while the worker imports, which the main process survives here, and after it has encoded something.
STOPPED = """
import signal, threading
from test_pools import *
from mochi_tune.data_prep.pools import ProcessPool
from mochi_tune.weights.folder import WeightsFolder
with ProcessPool(settings_for(Path("parts"), WeightsFolder(WeightsPaths(TINY)).fingerprint("text_encoder")), 1) as pool:
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Timer(1, os.killpg, (0, signal.SIGINT)).start()
    for task, _ in pool.run(TASKS, lambda _: None):
        raise KeyboardInterrupt
"""


def test_a_stopped_worker_says_nothing_and_leaves_nothing_that_python_warns_of(tmp_path):
    (tmp_path / "parts").mkdir()
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    command = [sys.executable, "-c", STOPPED]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, start_new_session=True
    )
    # It has loaded the encoder and reported progress.
    assert list((tmp_path / "parts").iterdir()) and done.stderr.rstrip().endswith("KeyboardInterrupt"), done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr


def test_what_a_worker_has_encoded_before_it_does_not_encode_again(tmp_path):
    (tmp_path / f"text-{TASKS[0].key}.safetensors").write_bytes(b"")
    with ClipDecoder(600) as decoder:
        worker = Worker(settings_for(tmp_path, ""), PartsFolder(tmp_path), decoder, checks_weights=True)
        assert worker.run(TASKS[0]) == []
        worker.close()
