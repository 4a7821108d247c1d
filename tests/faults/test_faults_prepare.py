"""`prepare` that is doubled, killed, deceived and fed with bad files: the cache is a clean one's, or there is none."""

import csv
import json
import os
import shutil
import signal
import socket
import unicodedata
from pathlib import Path

import pytest
import torch
from helpers_cache import BUCKETS
from helpers_process import Disturbance, Program
from helpers_road import SIZES
from helpers_video import write_bad_video, write_video

from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache import open_cache
from mochi_tune.files import file_sha256

WRITER_BUSY = "another `mochi-tune prepare` is writing to the cache"


def add_clip(folder: Path, name: str, caption: str | None, first_number: int = 0) -> Path:
    path = write_video(folder / name, 8, width=48, height=32, first_number=first_number)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def settings(videos: Path, cache: Path) -> list[str]:
    return ["conf=my_lora", *SIZES, f"data.videos={videos}", f"data.cache={cache}", f"run_dir={cache}_run"]


def prepare(videos: Path, cache: Path, *more: str, log: str = "", **options) -> Program:
    """Starts a `prepare` that may be disturbed at a change of its cache; its log stands beside that."""
    log = cache.with_name(f"{cache.name}{log}.log")
    return Program(["prepare", *settings(videos, cache), *more], log, Disturbance(cache, **options))


def tree(cache: Path) -> dict[str, bytes]:
    """Returns all files, except the one that says when the videos were changed."""
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.name != ".files.json"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def report_of(cache: Path) -> dict[str, dict[str, str]]:
    with (cache / "report.csv").open(newline="") as file:
        return {record["clip"]: record for record in csv.DictReader(file)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        add_clip(folder, f"{number}.mp4", f"a ball number {number}", first_number=20 * number)
    return folder


@pytest.fixture(scope="module")
def clean(videos, tmp_path_factory) -> Path:
    """The cache of a `prepare` that nothing has happened to; its changes stand beside it."""
    cache = tmp_path_factory.mktemp("clean") / "cache"
    done = prepare(videos, cache)
    assert done.wait() == 0, done.text()
    return cache


def changes_of(cache: Path) -> list[str]:
    """Returns the changes that a `prepare` has made in its cache, "os.rename NAME" and so on."""
    lines = cache.with_name(f"{cache.name}.log.changes").read_text().splitlines()
    return [f"{event} {Path(path).name.lstrip('.')}" for event, path in map(json.loads, lines)]


def test_of_two_one_refuses_and_a_trainer_too_and_a_killed_ones_lock_is_no_lock(videos, clean, tmp_path):
    cache = tmp_path / "cache"
    first = prepare(videos, cache, signal_at=len(changes_of(clean)) // 3, signal=signal.SIGSTOP)
    first.wait_until_stopped()
    second = prepare(videos, cache, log="2")
    trainer = Program(["train", *settings(videos, cache)], tmp_path / "trainer")
    assert WRITER_BUSY in second.refusal
    assert f"the cache {cache} is incomplete" in trainer.refusal and not Path(f"{cache}_run").exists()
    first.kill()
    third = prepare(videos, cache, log="3")
    assert third.wait() == 0, third.text()
    assert tree(cache) == tree(clean)


def test_a_trainer_sees_the_committed_cache_until_the_next_one_is_begun(videos, clean, tmp_path):
    cache, more = tmp_path / "cache", tmp_path / "videos"
    shutil.copytree(clean, cache)
    shutil.copytree(videos, more)
    add_clip(more, "new.mp4", "a new ball", first_number=100)
    # When it has a folder for what it encodes, and nothing is in that yet.
    writer = prepare(more, cache, signal_at=2, signal=signal.SIGSTOP)
    writer.wait_until_stopped()
    assert len(open_cache(cache, BUCKETS)) == 4
    writer.kill()
    assert prepare(more, cache, log="2").wait() == 0
    assert len(open_cache(cache, BUCKETS)) == 5


def test_a_kill_at_any_point_costs_the_item_in_hand_and_the_end_is_the_same(videos, clean, tmp_path):
    names = [change.split("-")[0] for change in changes_of(clean)]
    before = [("os.rename latents", 3), ("os.rename text", 2)]
    before += [("open report.csv.tmp", 1), ("os.rename data.new", 1), ("open manifest.json.tmp", 1)]
    steps = [[i for i, name in enumerate(names, 1) if name == change][nth - 1] for change, nth in before]
    caches = [tmp_path / f"killed_at_{step}" for step in steps]
    killed = [prepare(videos, cache, signal_at=step) for cache, step in zip(caches, steps, strict=True)]
    assert [one.wait() for one in killed] == [-signal.SIGKILL] * len(steps)
    kept = [
        tuple(len(list(cache.glob(f"parts/{kind}-*.safetensors"))) for kind in ("latents", "text")) for cache in caches
    ]
    # The last one was killed when the parts were gone and the shards in place.
    assert kept == [(2, 0), (4, 1), (4, 4), (4, 4), (0, 0)]
    again = [prepare(videos, cache, log="again") for cache in caches]
    for one, expected, cache in zip(again, [(2, 4), (0, 3), (0, 0), (0, 0), (0, 0)], caches, strict=True):
        assert one.wait() == 0, one.text()
        assert "encoded now: {} clips and {} captions".format(*expected) in one.out
        assert tree(cache) == tree(clean), cache


def test_a_video_that_is_replaced_under_the_same_name_and_size_is_found(videos, clean, tmp_path):
    folder, cache = tmp_path / "videos", tmp_path / "cache"
    shutil.copytree(videos, folder)
    target, other = folder / "2.mp4", add_clip(tmp_path, "other.mp4", None, first_number=200)
    size = max(target.stat().st_size, other.stat().st_size)
    for path in (target, other):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    before = target.stat()
    # Stopped when every video has been hashed and none decoded.
    running = prepare(folder, cache, signal_before="..scans.json.tmp", signal=signal.SIGSTOP)
    running.wait_until_stopped()
    content, _ = other.read_bytes(), target.write_bytes(other.read_bytes())
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert target.stat().st_size == before.st_size
    running.send(signal.SIGCONT)
    assert running.wait() == 1, running.text()
    assert "2.mp4: was changed while it was read: run the same command again." in running.out
    report = report_of(cache)
    assert {name: report[name]["status"] for name in report} == {
        "0.mp4": "kept", "1.mp4": "kept", "2.mp4": "refused", "3.mp4": "kept",
    }  # fmt: skip
    again = prepare(folder, cache, log="again")
    assert again.wait() == 0 and "encoded now: 1 clip and 1 caption," in again.out, again.text()
    found = open_cache(cache, BUCKETS)
    assert found.rows[2].source_sha256 == file_sha256(target) and target.read_bytes() == content
    # What a run over the new video alone makes of it.
    (tmp_path / "alone").mkdir()
    shutil.copy(target, tmp_path / "alone" / "2.mp4")
    assert prepare(tmp_path / "alone", tmp_path / "one", "data.allow_empty_captions=true").wait() == 0
    assert torch.equal(found.read(2)["mean"], open_cache(tmp_path / "one", BUCKETS).read(0)["mean"])


def test_bad_files_of_every_kind_are_reported_and_the_others_finish(tmp_path):
    folder, cache = tmp_path / "videos", tmp_path / "cache"
    folder.mkdir()
    for name in ("a", "z"):
        write_video(folder / f"{name}.mp4", 90, width=48, height=32)
    for kind in ("damaged", "no moov", "audio", "garbage"):
        (tmp_path / kind).mkdir()
        write_bad_video(tmp_path / kind, kind).rename(folder / f"{kind}.mp4")
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    (folder / "link.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.mp4"))
        # So many that the damage in the middle of a clip of 90 is among them.
        done = prepare(folder, cache, "data.allow_empty_captions=true", "data.num_frames=61")
        assert done.wait() == 1, done.text()
    report = report_of(cache)
    bad = {"damaged", "no moov", "audio", "garbage", "empty", "link", "pipe", "socket"}
    assert {name for name, record in report.items() if record["status"] == "refused"} == {f"{n}.mp4" for n in bad}
    assert {name for name, record in report.items() if record["status"] == "kept"} == {"a.mp4", "z.mp4"}
    for name in bad:
        reason = report[f"{name}.mp4"]["reason"]
        assert reason.startswith(f"{folder / name}.mp4: ") and f"refused: {reason}\n" in done.out
    assert "is a pipe" in report["pipe.mp4"]["reason"]
    assert "2 clips kept, 8 refused" in done.out
    assert len(open_cache(cache, {"": [Bucket(61, 32, 48)]})) == 2


def test_names_and_captions_of_every_kind_come_out_as_they_went_in(tmp_path):
    folder, cache = tmp_path / "videos", tmp_path / "cache"
    folder.mkdir()
    accent = "caf\u00e9"
    stems = ["with space", "'single' \"double\"", "line\nbreak", "-rf", "$(touch pwned);`x`", "日本語 🎬", "a,b;c\td"]
    stems += [
        "%s{0}",
        unicodedata.normalize("NFC", accent),
        unicodedata.normalize("NFD", accent),
        "Twin",
        "twin",
        "x" * 251,
    ]
    captions = {f"{stem}.mp4": f"about number {number}" for number, stem in enumerate(stems)}
    captions["with space.mp4"] = "\ufeffwith a mark of byte order"
    captions["-rf.mp4"] = "so many words " * 3000
    source = add_clip(tmp_path, "source.mp4", None)
    for name, caption in captions.items():
        assert len(name.encode()) <= 255
        shutil.copy(source, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    done = prepare(folder, cache)
    assert done.wait() == 0, done.text()
    assert "encoded now: 1 clip and 13 captions" in done.out and "captions cut to 256 tokens: -rf.mp4 by" in done.out
    found, report = open_cache(cache, BUCKETS), report_of(cache)
    expected = {name: text.strip().lstrip("\ufeff") for name, text in captions.items()}
    assert {row.path: row.captions[0] for row in found.rows} == expected and report.keys() == expected.keys()
    assert len(found) == 13 and all(report[name]["status"] == "kept" for name in expected)
    assert len(found.read([row.path for row in found.rows].index("-rf.mp4"))["prompt_embeds"]) == 256
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
    # One of ten million characters, one with NUL and one that is no text cost their own clips alone.
    (folder / "twin.txt").write_text("so many words " * (10 * 2**20 // 14))
    (folder / "Twin.txt").write_text("a\0nul")
    (folder / "-rf.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    again = prepare(folder, cache, log="again")
    assert again.wait() == 1 and "10 clips kept, 3 refused; encoded now: 0 clips and 0 captions" in again.out
    assert len(open_cache(cache, BUCKETS)) == 10
    reasons = {name: row["reason"] for name, row in report_of(cache).items() if row["status"] == "refused"}
    assert reasons.keys() == {"twin.mp4", "Twin.mp4", "-rf.mp4"}
    assert "twin.mp4: has a caption of 10485" in reasons["twin.mp4"] and "contains NUL" in reasons["Twin.mp4"]
    assert "is not UTF-8 (byte 0)" in reasons["-rf.mp4"]
