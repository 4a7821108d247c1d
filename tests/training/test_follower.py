"""What the follower of a run reads and records, without a process."""

import json
from types import SimpleNamespace

import pytest

from mochi_tune.training import follower

OPTIONS = {"begun": None, "prompts": ["a cat"]}


class Recorder:
    """A tracker that keeps what it is given in `sent`, and fails when that has `most` entries.

    As TensorBoard does, it removes what it has of later steps when it starts again.
    """

    sent, most = [], 10**6

    def __init__(self, _folder, _run_id, _options, last_step):
        self.sent[:] = [entry for entry in self.sent if entry[1] <= last_step]

    def send(self, file, step, _numbers):
        self.show(file, step)

    def show(self, name, step, *_):
        if len(self.sent) == self.most:
            raise OSError("no room")
        self.sent.append((name, step))

    def flush(self):
        return True

    def finish(self):
        pass


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(follower.TRACKERS, "tensorboard", Recorder)
    monkeypatch.setattr(Recorder, "sent", [])
    return Recorder


@pytest.fixture
def run_dir(tmp_path):
    """A run of six steps with validations and videos of every other one."""
    for folder in ("trackers", "samples"):
        (tmp_path / folder).mkdir()
    for name, steps in (("metrics", range(1, 7)), ("validation", range(0, 7, 2))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"step": step, "x": 1}) + "\n" for step in steps))
    for step in (0, 2, 4, 6):
        (tmp_path / "samples" / f"step_{step:06d}_prompt_0.mp4").write_bytes(b"video")
    return tmp_path


def everything(steps):
    rows = [("validation", 0), ("samples/prompt_0", 0)]
    for step in steps:
        rows += [("metrics", step), *([("validation", step), ("samples/prompt_0", step)] if step % 2 == 0 else [])]
    return rows


def test_the_validation_of_a_step_whose_video_fails_is_sent_once(run_dir, recorder, monkeypatch):
    """The row of the step was recorded before, so that nothing of the step is removed at the next start."""
    validation = run_dir / "validation.jsonl"
    rows = validation.read_text()
    validation.write_text("")
    for video in (run_dir / "samples").iterdir():
        video.write_bytes(b"")
    monkeypatch.setattr(recorder, "most", 10)

    def add(_seconds):
        validation.write_text(rows)
        (run_dir / "samples" / "step_000006_prompt_0.mp4").write_bytes(b"video")
        return False

    with pytest.raises(OSError, match="no room"):
        follower.follow(run_dir, "tensorboard", OPTIONS, add)
    assert recorder.sent[6:] == [("validation", step) for step in (0, 2, 4, 6)]
    monkeypatch.setattr(recorder, "most", 100)
    follower.follow(run_dir, "tensorboard", OPTIONS, lambda _: True)
    assert recorder.sent[6:] == [*(("validation", step) for step in (0, 2, 4, 6)), ("samples/prompt_0", 6)]


@pytest.mark.parametrize("seconds", [0, 2])
@pytest.mark.parametrize("most", range(13))
def test_a_tracker_that_is_ended_amid_many_rows_goes_on_from_there(run_dir, recorder, monkeypatch, most, seconds):
    monkeypatch.setattr(follower, "RECORD_SECONDS", seconds)
    monkeypatch.setattr(follower, "time", SimpleNamespace(monotonic=lambda: len(recorder.sent)))  # A second per row.
    monkeypatch.setattr(recorder, "most", most)
    with pytest.raises(OSError, match="no room"):
        follower.follow(run_dir, "tensorboard", OPTIONS, lambda _: True)
    state = json.loads((run_dir / "trackers" / "tensorboard.json").read_text())
    if most == 7:
        assert (state["metrics"], state["validation"], len(state["samples"])) == (3, 2, 2)
    monkeypatch.setattr(recorder, "most", 100)
    follower.follow(run_dir, "tensorboard", OPTIONS, lambda _: True)
    assert recorder.sent == everything(range(1, 7))


def test_a_run_that_ends_before_its_first_row_keeps_the_validation_of_step_0(run_dir, recorder):
    rows = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text("")
    (run_dir / "samples" / "step_000000_prompt_1.mp4").touch()  # A crash has left it empty.
    follower.follow(run_dir, "tensorboard", OPTIONS, lambda _: True)
    assert recorder.sent == everything([])
    (run_dir / "metrics.jsonl").write_text(rows)
    follower.follow(run_dir, "tensorboard", OPTIONS, lambda _: True)
    assert recorder.sent == everything(range(1, 7))


def test_videos_are_listed_only_when_there_are_new_rows(run_dir, recorder, monkeypatch):
    find, listed, polls = follower.find_eval_videos, [], iter([False] * 8 + [True] * 3)

    def poll(_seconds):
        is_over = next(polls)
        if is_over and len(recorder.sent) == len(everything(range(1, 7))):
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write('{"step": 7}\n')
        return is_over

    monkeypatch.setattr(follower, "find_eval_videos", lambda folder: listed.append(1) or find(folder))
    follower.follow(run_dir, "tensorboard", OPTIONS, poll)
    assert recorder.sent == everything(range(1, 8)) and len(listed) == 3


def test_the_video_of_a_later_step_waits_for_the_row_of_that_step(run_dir, recorder):
    (run_dir / "samples" / "step_000008_prompt_0.mp4").write_bytes(b"video")
    polls = iter([False, True, True])

    def poll(_seconds):
        is_over = next(polls)
        if not is_over:
            assert recorder.sent == everything(range(1, 7))
            (run_dir / "metrics.jsonl").open("a").write('{"step": 7}\n{"step": 8}\n')
        return is_over

    follower.follow(run_dir, "tensorboard", OPTIONS, poll)
    assert recorder.sent == [*everything(range(1, 8)), ("metrics", 8), ("samples/prompt_0", 8)]
