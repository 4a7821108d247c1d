import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest

from mochi_tune.errors import TrainingError
from mochi_tune.files import read_json_lines
from mochi_tune.training.evaluate import validation_line
from mochi_tune.training.metrics import FILES, Metrics, comparable
from mochi_tune.ui.runs import best_step

# Simulates a disk that is full for a while: a file size limit, which cuts off rows and is lifted later.
FULL_FOR_A_WHILE = """
import resource, sys
from pathlib import Path
from mochi_tune.training.metrics import Metrics

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

folder = Path(sys.argv[1])
with Metrics(folder, 0) as metrics:
    limit(50)
    for step in (1, 2, 3):
        metrics.log({"step": step, "loss": step / 10})
    metrics.log_validation({"step": 3, "validation_loss": 0.5})
    whole = (folder / "metrics.jsonl").read_text()
    assert whole == '{"step": 1, "loss": 0.1}\\n{"step": 2, "loss": 0.2}\\n', whole
    # Rows are written in order: later rows wait for the first one that waits.
    assert not (folder / "validation.jsonl").read_text() and metrics.is_validated(3)
    try:
        metrics.flush_to_disk()
    except OSError as error:
        print("refused:", error.strerror)
    limit(resource.RLIM_INFINITY)
    metrics.log({"step": 4, "loss": 0.4})
    metrics.flush_to_disk()
    limit(110)
    metrics.log({"step": 5, "loss": 0.5})
"""


def test_rows_after_the_checkpoint_and_an_unfinished_line_are_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    with Metrics(tmp_path, last_step=3) as metrics:
        metrics.log({"step": 4, "loss": 0.5})
        metrics.log_validation({"step": 4, "validation_loss": 1.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 0.5
    assert (tmp_path / "validation.jsonl").read_text() == '{"step": 4, "validation_loss": 1.0}\n'


def test_sums_are_those_of_all_rows_that_are_kept(tmp_path):
    def log(metrics: Metrics, step: int) -> None:
        metrics.log({"step": step, "sigmas": [step / 10, 1.0]})
        metrics.log_validation({"step": step, "validation_loss": abs(step - 3)})

    with Metrics(tmp_path, last_step=0) as metrics:
        for step in (1, 2, 3, 4):
            log(metrics, step)
        assert metrics.best_validated([1, 2, 4]) == 2 and metrics.best_validated([7]) is None
    with Metrics(tmp_path, last_step=2) as metrics:
        log(metrics, 5)
        assert metrics.num_rows() == {"metrics": 3, "validation": 3}
        assert metrics.sigma_histogram() == [0, 1, 1, 0, 0, 1, 0, 0, 0, 3]
        assert metrics.best_validated([1, 2, 3, 5]) == 2, "the rows of steps 3 and 4 were dropped"
        assert [metrics.is_validated(step) for step in (2, 3, 5)] == [True, False, True]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step, loss in ((1, 0.5), (2, float("nan")), (3, 0.7)):
            metrics.log_validation({"step": step, "validation_loss": loss})
        assert metrics.best_validation() == (1, 0.5) and metrics.best_validated([2, 3]) == 3


def test_losses_of_other_clips_are_not_compared(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step, loss, clips in ((1, 0.2, None), (2, 0.1, "old"), (3, 0.5, "new"), (4, 0.6, "new")):
            row = {"step": step, "validation_loss": loss, "measured_on": clips, "bins": {}}
            metrics.log_validation(row)
            line = validation_line(row, metrics.best_validation(), metrics.compares_with_none())
            assert line.endswith("are not compared with it") == (step == 3) and ("the best" in line) == (step < 3)
        assert metrics.best_validation() == (3, 0.5) and metrics.best_validated([1, 2, 4]) == 4
        assert metrics.is_validated(2)
    with Metrics(tmp_path, 4) as metrics:
        assert metrics.best_validated([2, 3, 4]) == 3
    assert best_step(tmp_path) == (3, 0.5)
    # Without the rows of step 3 and 4, those before are compared again.
    with Metrics(tmp_path, 2) as metrics:
        assert metrics.best_validation() == (2, 0.1)


@pytest.mark.parametrize("is_anew", [False, True])
def test_rows_that_do_not_say_what_they_measured_are_as_the_first_one_that_does_unless_it_measures_anew(
    tmp_path, is_anew
):
    mark = {"measures_anew": True} if is_anew else {}
    rows = [{"step": 1}, {"step": 2}, {"step": 3, "measured_on": "a"} | mark, {"step": 4, "measured_on": "b"}]
    with Metrics(tmp_path, 0) as metrics:
        for row in rows:
            metrics.log_validation({"validation_loss": row["step"] / 10, **row})
    for last, expected in ((2, [1, 2]), (3, [3] if is_anew else [1, 2, 3]), (4, [4])):
        assert [row["step"] for row in comparable(rows[:last])] == expected
    for last, expected in ((4, 4), (3, 3 if is_anew else 1), (2, 1)):
        with Metrics(tmp_path, last) as metrics:
            assert metrics.best_validated([1, 2, 3, 4]) == metrics.best_validation()[0] == expected
        assert best_step(tmp_path)[0] == expected


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with Metrics(tmp_path, last_step=0) as metrics:
        metrics.log({"step": 1, "loss": 0.5})
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5
        assert not metrics.is_validated(1)


def test_a_file_of_something_else_is_refused(tmp_path):
    for line in ("hello", '{"step": null}', "[1]"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(TrainingError, match="line 2 is no row"):
            Metrics(tmp_path, 2, {"metrics": 2})
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(TrainingError, match="line 1 is no row"):
            Metrics(tmp_path, 0)


@pytest.mark.parametrize("damage", [bytes(100), b"\xff\xfe\n", b'{"step": 3, "lo\n'])
def test_a_damaged_end_after_the_rows_of_the_checkpoint_is_dropped(tmp_path, damage):
    rows = b'{"step": 1}\n{"step": 2}\n'
    for name, content in (("metrics", rows), ("validation", b"")):
        (tmp_path / f"{name}.jsonl").write_bytes(content + damage + b'{"step": 2}\n')
    with Metrics(tmp_path, 2, {"metrics": 2, "validation": 0}) as metrics:
        assert metrics.num_rows() == {"metrics": 2, "validation": 0}
        assert metrics.state()["branch"] == hashlib.sha256(rows).hexdigest()
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows and not (tmp_path / "validation.jsonl").read_bytes()


def test_a_row_that_finds_no_space_waits_and_no_file_ends_with_a_half(tmp_path):
    command = [sys.executable, "-c", FULL_FOR_A_WHILE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused: File too large\n"
    # One line for each time that the disk is full.
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all("metrics.jsonl cannot be written (File too large)" in line for line in lines)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert (tmp_path / "validation.jsonl").read_text() == '{"step": 3, "validation_loss": 0.5}\n'


def test_the_entries_of_new_files_and_later_all_rows_are_synced(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    with Metrics(tmp_path, 0) as metrics:
        assert tmp_path.stat().st_ino in synced
        synced.clear()
        metrics.log({"step": 1, "loss": 0.5})
        metrics.flush_to_disk()
        assert synced == {(tmp_path / f"{name}.jsonl").stat().st_ino for name in FILES}
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error") as caught:
            patch.setattr(os, "fsync", fail)
            metrics.flush_to_disk()
        assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error") as caught:
        patch.setattr("mochi_tune.training.metrics.cut_after", lambda *_: [])
        patch.setattr(os, "fsync", fail)
        Metrics(tmp_path, 1)
    assert caught.value.filename == str(tmp_path)
    synced.clear()
    with Metrics(tmp_path, 1):
        assert (tmp_path / "metrics.jsonl").stat().st_ino in synced, "the rows that stay at a resume"


def test_a_part_of_a_row_that_could_not_be_removed_is_removed_before_the_next_write(tmp_path, monkeypatch):
    write = os.write

    def fail(*_) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def write_part(file: int, line: bytes) -> None:
        write(file, line[:5])
        fail()

    with Metrics(tmp_path, 0) as metrics:
        metrics.log({"step": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_part)
            patch.setattr(os, "truncate", fail)
            metrics.log({"step": 2})
        metrics.log({"step": 3})
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
