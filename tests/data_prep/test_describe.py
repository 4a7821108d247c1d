import csv
import errno
import fcntl
import json
import os
import resource
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from helpers_chat import CAPTION, ChatServer, Reply
from helpers_prepare import TINY
from helpers_process import Disturbance, run
from helpers_video import frame_number, is_upright, write_video

from mochi_tune.cli.main import run as run_here
from mochi_tune.data_prep.captions import CaptionRules, load_captions
from mochi_tune.data_prep.describe import find_clips
from mochi_tune.data_prep.describe_tally import open_log
from mochi_tune.data_prep.finding import find_videos
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.files import temporary_name

QUICK = ["timeout_seconds=10", "clip_seconds=60", "backoff_seconds=0.01", f"model.weights={TINY}"]


def describe(videos: Path, url: str, *more: str) -> list[str]:
    return ["describe", f"videos={videos}", f"endpoint={url}", "model=seer", *QUICK, *more]


def rows_of(videos: Path) -> list[dict]:
    return [json.loads(line) for line in (videos / "describe.jsonl").read_text().splitlines()]


def caption_of(number: int) -> str:
    return f"Ball number {number} is red. {CAPTION}"


def test_clips_get_captions_and_nothing_that_is_there_is_touched(tmp_path, capsys):
    videos = tmp_path / "videos"
    for folder in ("sub", "table", "lines"):
        (videos / folder).mkdir(parents=True)
    # The numbers on the pictures tell the server which clip it sees.
    for name, number in {
        "plain.mp4": 0, "mine.mp4": 20, "empty.mp4": 30, "raced.mp4": 40, "table/told.mp4": 50, "lines/told.webm": 60,
    }.items():  # fmt: skip
        write_video(videos / name, 12, first_number=number)
    write_video(videos / "sub" / "turned.mp4", 12, width=96, height=160, rotation=90, first_number=70)
    (videos / "mine.txt").write_text("my words")
    (videos / "empty.txt").write_text(" \n")
    (videos / "broken.mp4").write_bytes(b"no video")
    os.mkfifo(videos / "pipe.mp4")
    with (videos / "table" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], ["told.mp4", "told by a table"]])
    row = json.dumps({"video": "told.webm", "caption": "told by a line"})
    (videos / "lines" / "captions.jsonl").write_text(row)
    write_video(tmp_path / "still.mp4", 1, first_number=90)
    kept = {path: path.read_bytes() for path in videos.rglob("*.*") if path.suffix not in (".mp4", ".webm")}

    def answer(request, number):
        if request.clip // 10 == 4:
            (videos / "raced.txt").write_text("theirs")
        return Reply("I'm sorry, I can't see it.") if number == 0 else Reply(caption_of(request.clip))

    with ChatServer(answer) as server:
        command = describe(
            videos, server.url, "num_frames=3", "image_size=80", "workers=3", "price_in=2", "price_out=4"
        )
        assert run_here(command) == 1
    assert all(path.read_bytes() == content for path, content in kept.items())
    texts = {path.relative_to(videos).as_posix(): path.read_text() for path in videos.rglob("*.txt")}
    assert texts == {
        "mine.txt": "my words",
        "empty.txt": " \n",
        "raced.txt": "theirs",
        # The middles of three equal parts of 12 frames are frames 2, 6 and 10.
        "plain.txt": caption_of(2) + "\n",
        "sub/turned.txt": caption_of(72) + "\n",
    }
    for chat in server.chats:
        assert [frame_number(image) % 10 for image in chat.images] == [2, 6, 0]
        assert all(is_upright(image) for image in chat.images)
        assert chat.images[0].shape == ((80, 48, 3) if chat.clip == 72 else (64, 64, 3))
    rows = {row["clip"]: row for row in rows_of(videos)}
    assert len(rows) == len(rows_of(videos)) == 6
    assert {name: row["status"] for name, row in rows.items()} == {
        "empty.mp4": "refused", "plain.mp4": "described", "sub/turned.mp4": "described",
        "raced.mp4": "failed", "broken.mp4": "failed", "pipe.mp4": "failed",
    }  # fmt: skip
    assert "empty.txt: exists but has no caption" in rows["empty.mp4"]["error"]
    assert "written by another program" in rows["raced.mp4"]["error"] and rows["raced.mp4"]["text"] == caption_of(42)
    assert "broken.mp4" in rows["broken.mp4"]["error"] and "is not a file" in rows["pipe.mp4"]["error"]
    assert sum(row.get("retries", 0) for row in rows.values()) == 1
    out = capsys.readouterr().out
    # Four chats of 1000 and 50 tokens, at 2 and 4 for a million.
    assert "2 clips described, 3 had a caption, 4 without one; 4 requests, including 1 retries" in out
    assert "4,000 + 200 tokens; price 0.0088" in out
    found = load_captions(videos, find_videos(videos), CaptionRules())
    assert found.texts[videos / "sub" / "turned.mp4"] == (caption_of(72),)
    assert not list(videos.rglob(".*"))


def test_a_folder_that_has_all_captions_asks_nobody(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", 7)
    (tmp_path / "a.txt").write_text("a ball")
    # The process that wrote the last caption was killed.
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / temporary_name("write_new", killed.pid)).touch()
    assert run_here(describe(tmp_path, "http://127.0.0.1:9/v1")) == 0
    assert "no clip to describe, with a caption: 1" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.txt"]


def test_many_at_once_lose_and_double_nothing(tmp_path):
    for number in range(12):
        write_video(tmp_path / f"{number}.mp4", 1, first_number=number)
    key = tmp_path / "key"
    key.write_text("secret\n")
    # Every third chat fails, whichever clip it is for.
    bad = [Reply({}, 500), Reply(""), Reply(hangs_up=True), Reply(wait_seconds=0.1)]
    with ChatServer(lambda r, n: bad[n // 3 % 4] if n % 3 == 0 else Reply(caption_of(r.clip))) as server:
        done = run(*describe(tmp_path, server.url, "workers=6", "retries=9", f"key_file={key}", "trigger=ohwx"))
    assert done.returncode == 0, done.stderr
    for number in range(12):
        text = (tmp_path / f"{number}.txt").read_text()
        # A slow answer is a caption too.
        assert text in (f"ohwx, {caption_of(number)}\n", f"ohwx, {CAPTION}\n")
    rows = rows_of(tmp_path)
    assert Counter(row["clip"] for row in rows) == {f"{number}.mp4": 1 for number in range(12)}
    assert sum(row["requests"] for row in rows) == len(server.chats)
    assert {request.key for request in server.requests} == {"secret"} and "secret" not in done.stdout + done.stderr


def test_an_endpoint_that_is_gone_ends_the_run_and_keeps_what_is_done(tmp_path):
    for number in range(14):
        write_video(tmp_path / f"{number:02}.mp4", 1, first_number=number)

    def answer(request, number):
        return Reply() if number < 2 else Reply(hangs_up=True)

    with ChatServer(answer) as server:
        done = run(*describe(tmp_path, server.url, "workers=1", "retries=0"))
        assert done.returncode == 2 and len(list(tmp_path.glob("*.txt"))) == 2
        assert "the endpoint did not answer for 10 clips in a row" in done.stderr.splitlines()[-1]
        # The worker continues until it is stopped.
        assert len(server.chats) >= 12
    assert "2 clips described, 0 had a caption, 10 without one, 2 not yet tried" in done.stdout


def test_a_key_that_is_refused_on_the_way_ends_the_run(tmp_path):
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", 1, first_number=number)
    with ChatServer(lambda request, number: Reply() if number == 0 else Reply({}, 401)) as server:
        env = {"OPENAI_API_KEY": "sk-1", "OPENAI_BASE_URL": server.url + "/"}
        done = run(*describe(tmp_path, server.url, "workers=1"), env=env)
    assert done.returncode == 2 and "refuses the key (401" in done.stderr.splitlines()[-1]
    assert len(server.chats) == 2 and {request.key for request in server.requests} == {"sk-1"}
    assert [path.name for path in tmp_path.glob("*.txt")] == ["0.txt"]


@pytest.mark.parametrize("named", ["", "{url}/other"])
def test_the_key_of_the_environment_goes_to_no_endpoint_that_it_does_not_name(tmp_path, monkeypatch, capsys, named):
    write_video(tmp_path / "a.mp4", 1)
    with ChatServer(lambda request, number: Reply()) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
        monkeypatch.setenv("OPENAI_BASE_URL", named.format(url=server.url))
        assert run_here(describe(tmp_path, server.url)) == 0
    assert {request.key for request in server.requests} == {""} and (tmp_path / "a.txt").is_file()
    assert f"not sent to endpoint={server.url}" in capsys.readouterr().out


def test_a_dry_run_shows_the_prompt_and_the_pictures_and_asks_nobody(tmp_path, capsys):
    videos, pictures = tmp_path / "videos", tmp_path / "pictures"
    videos.mkdir()
    write_video(videos / "a.mp4", 30, width=128, height=64)
    template = tmp_path / "prompt.txt"
    template.write_text("Tell {trigger} in {max_words} words.")
    more = ["dry_run=true", f"frames_out={pictures}", f"template={template}", "trigger=ohwx", "num_frames=2"]
    assert run_here(describe(videos, "http://127.0.0.1:9/v1", *more)) == 0
    out = capsys.readouterr().out
    assert "Tell ohwx in 150 words." in out and "1 clip to describe, with a caption: 0; 1 request" in out
    assert sorted(path.name for path in pictures.iterdir()) == ["a_01.jpg", "a_02.jpg"]
    assert [path.name for path in videos.iterdir()] == ["a.mp4"]
    for taken in (pictures, videos, template):
        more[1] = f"frames_out={taken}"
        with pytest.raises(ConfigError, match="is not an empty folder: name a new one"):
            run_here(describe(videos, "http://127.0.0.1:9/v1", *more))
    assert [path.name for path in videos.iterdir()] == ["a.mp4"]


def test_stills_are_described_where_that_is_asked_for(tmp_path):
    for name in ("a.mp4", "a.png", "b.png", "c.mp4", "c.txt"):
        (tmp_path / name).write_text("any")
    without = find_clips(tmp_path, with_stills=False)
    assert [path.name for path in without.without] == ["a.mp4"] and without.num_with == 1
    assert without.notes == ["2 stills are not described: stills=true describes them"]
    found = find_clips(tmp_path, with_stills=True)
    assert [path.name for path in found.without] == ["a.mp4", "b.png"]
    assert found.notes == ["a.png gets the caption of the other clip of that name"]


def test_a_name_that_is_not_utf_8_is_refused_in_letters(tmp_path):
    for name in (b"caf\xe9.mp4", b"a.mp4"):
        (tmp_path / os.fsdecode(name)).touch()
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"\0")
    found = find_clips(tmp_path, False)
    assert found.refused == {"caf\\udce9.mp4": "caf\\udce9.mp4: its name is not valid UTF-8: rename it."}
    assert [path.name for path in found.without] == ["a.mp4"]


def test_a_caption_does_not_become_a_list_of_captions(tmp_path):
    for name in ("video.mp4", "clip.mp4"):
        (tmp_path / name).touch()
    assert [path.name for path in find_clips(tmp_path, False).without] == ["clip.mp4", "video.mp4"]
    (tmp_path / "prompts.txt").write_text("what to sample")
    found = find_clips(tmp_path, False)
    assert [path.name for path in found.without] == ["clip.mp4"]
    assert "video.txt next to prompts.txt would be read as a list of clips" in found.refused["video.mp4"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["workers=0"], "workers=0 does not fit"),
        (["requests_per_minute=-1"], "requests_per_minute=-1 does not fit"),
        (["language=fr"], "language=fr is not possible: use en or any."),
        (["stills=yes"], "stills=yes is not possible"),
        (["template=nowhere.txt"], "template=nowhere.txt cannot be read (No such file or directory)"),
        (["key_file=nowhere.txt"], "key_file=nowhere.txt cannot be read"),
        (["frames_out=x"], "goes with dry_run=true"),
        (["price_in=cheap"], "price_in=cheap does not fit"),
        (["endpoint=localhost:8000"], "is not an address"),
        (["endpoint=http://127.0.0.1:9/v1"], "endpoint=http://127.0.0.1:9/v1 cannot be used (no connection"),
        (["endpoint=local"], "model=seer has no config.json"),
        (["videos=nowhere"], "videos=nowhere does not exist"),
        (["promt=x"], "promt= is not a setting of describe"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, more, text):
    write_video(tmp_path / "a.mp4", 7)
    done = run(*describe(tmp_path, "http://127.0.0.1:9/v1", *more))
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_of_two_on_one_folder_the_second_refuses(tmp_path):
    write_video(tmp_path / "a.mp4", 7)
    with ChatServer() as server, (tmp_path / "describe.jsonl").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = run(*describe(tmp_path, server.url))
    assert done.returncode == 2 and "another `mochi-tune describe` is writing it" in done.stderr
    assert not server.chats


def test_a_full_disk_is_one_line_before_anybody_is_asked(tmp_path):
    write_video(tmp_path / "a.mp4", 7)
    with ChatServer() as server:
        done = run(*describe(tmp_path, server.url), disturbance=Disturbance(file_bytes=0))
    assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert not server.chats and not list(tmp_path.glob("*.txt"))


def test_a_caption_that_finds_no_space_is_named_and_its_request_counted(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "a.mp4", 7)

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    monkeypatch.setattr("mochi_tune.data_prep.describe.write_new", refuse)
    with ChatServer() as server, pytest.raises(DataError, match=r"a\.txt: cannot be written \(No space left on device"):
        run_here(describe(tmp_path, server.url))
    assert "0 clips described, 0 had a caption, 1 without one; 1 request," in capsys.readouterr().out


def test_the_error_of_a_disk_that_becomes_full_names_the_log(tmp_path):
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, former[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, open_log(tmp_path / "describe.jsonl") as log:
            log({"clip": "a.mp4"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert caught.value.filename == str(tmp_path / "describe.jsonl")
