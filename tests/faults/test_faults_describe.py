"""`describe` that is killed or interrupted goes on, and asks nothing twice that it has written."""

import json
import signal
from collections import Counter

from helpers_chat import CAPTION, ChatServer, Reply
from helpers_prepare import TINY
from helpers_process import Disturbance, Program, run
from helpers_video import write_video

NUM_CLIPS = 8


def test_killed_and_interrupted_it_goes_on_with_the_clips_that_have_no_caption(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(NUM_CLIPS):
        write_video(videos / f"{number}.mp4", 1, first_number=number)
    asked = []

    def answer(request, number):
        asked.append(request.clip)
        return Reply(f"Ball {request.clip}. {CAPTION}")

    def texts() -> dict[str, str]:
        return {path.stem: path.read_text() for path in videos.glob("*.txt")}

    with ChatServer(answer) as server:
        command = ["describe", f"videos={videos}", f"endpoint={server.url}", "model=seer", f"model.weights={TINY}"]
        # Killed before the first caption takes its name.
        killed = Program([*command, "workers=1"], tmp_path / "killed", Disturbance(videos, 0, ".write_new.tmp", 2))
        assert killed.wait() == -signal.SIGKILL
        # It may have asked for the next one by then.
        assert not texts() and asked in ([0], [0, 1]) and len(list(videos.glob(".write_new.*.tmp"))) == 1
        with (videos / "describe.jsonl").open("a") as log:
            log.write('{"clip": "half of a li')

        def stalling(request, number):
            asked.append(request.clip)
            return Reply(f"Ball {request.clip}. {CAPTION}", wait_seconds=600 if request.clip == 3 else 0)

        server.answer = stalling
        interrupted = Program([*command, "workers=1"], tmp_path / "interrupted")
        interrupted.wait_until(lambda: len(texts()) == 3 and asked[-1] == 3)
        interrupted.send(signal.SIGINT)
        assert interrupted.wait() == 130
        assert interrupted.err.splitlines()[-1] == "mochi-tune: interrupted" and "Traceback" not in interrupted.text()
        assert f"3 clips described, 0 had a caption, {NUM_CLIPS - 3} not yet tried" in interrupted.out
        first = texts()
        server.answer = answer
        done = run(*command, "workers=3")
        assert done.returncode == 0 and f"{NUM_CLIPS - 3} clips described, 3 had a caption" in done.stdout
    assert texts() == {str(number): f"Ball {number}. {CAPTION}\n" for number in range(NUM_CLIPS)}
    assert all(texts()[name] == text for name, text in first.items())
    # Those that were under way when the runs ended were asked for twice.
    counts = Counter(asked)
    assert counts.pop(1) in (1, 2)
    assert counts == {number: 2 if number in (0, 3) else 1 for number in range(NUM_CLIPS) if number != 1}
    assert not list(videos.glob(".*.tmp"))
    lines = (videos / "describe.jsonl").read_text().splitlines()
    assert lines[0] == '{"clip": "half of a li'
    assert sorted(json.loads(line)["clip"] for line in lines[1:]) == [f"{number}.mp4" for number in range(NUM_CLIPS)]
