"""The gallery: its descriptions of clips, and captions that are written next to them."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_calls import count_calls
from helpers_video import write_video

from mochi_tune.config.schema import DataConfig
from mochi_tune.data_prep.clips import decode_clip
from mochi_tune.data_prep.probe import scan_video
from mochi_tune.errors import DataError
from mochi_tune.ui import clips, html
from mochi_tune.ui.clips import (
    Gallery,
    changed_captions,
    list_videos,
    read_captions,
    take_uploads,
    write_caption,
)
from mochi_tune.ui.posters import posters

DATA = DataConfig(num_frames=7, height=32, width=48)


def test_cards_say_what_each_file_is(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "good.mp4", 15, width=96, height=64)
    write_video(videos / "small.mp4", 15, width=32, height=32)
    (videos / "broken.mp4").write_bytes(b"no video")
    (videos / "good.txt").write_text("a cat\n")
    (tmp_path / "elsewhere.mp4").write_bytes(b"")
    found = list_videos(tmp_path, "videos")
    broken, good, small = Gallery(tmp_path).cards(videos, read_captions(tmp_path, videos, found, DATA), DATA)
    assert (good.name, good.length, good.size, good.refused) == ("good.mp4", "0.5 s at 30 fps", "96 x 64", "")
    assert good.bucket == "7 frames, 48 x 32" and good.thumbnail.read_bytes()[:2] == b"\xff\xd8"
    assert "no caption" not in [flag.text for flag in good.flags]
    assert broken.refused and broken.thumbnail is None
    assert "32" in small.refused and small.size == "32 x 32" and small.thumbnail is not None
    with pytest.raises(DataError, match="outside of"):
        list_videos(tmp_path, "..")


def test_a_video_that_was_replaced_is_read_again(tmp_path, monkeypatch):
    # In this process, to avoid the child's start.
    decoder = SimpleNamespace(scan=scan_video, cut=decode_clip)
    monkeypatch.setattr(clips, "ClipDecoder", lambda seconds: contextlib.nullcontext(decoder))
    gallery, lengths = Gallery(tmp_path), []
    for num_frames in (15, 30):
        write_video(tmp_path / "a.mp4", num_frames)
        lengths += [card.length for card in gallery.cards(tmp_path, {tmp_path / "a.mp4": ""}, DATA)]
    assert lengths == ["0.5 s at 30 fps", "1.0 s at 30 fps"]


def test_a_link_out_of_the_folder_is_no_clip(tmp_path):
    (tmp_path / "outside").mkdir()
    write_video(tmp_path / "outside" / "a.mp4", 8)
    (tmp_path / "page" / "videos").mkdir(parents=True)
    write_video(tmp_path / "page" / "videos" / "b.mp4", 8)
    (tmp_path / "page" / "videos" / "a.mp4").symlink_to(tmp_path / "outside" / "a.mp4")
    assert [path.name for path in list_videos(tmp_path / "page", "videos")] == ["b.mp4"]


def test_captions_are_read_and_written_beside_the_clips(tmp_path, monkeypatch):
    video, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    video.touch()
    other.touch()
    (tmp_path / "captions.csv").write_text("file_name,caption\na.mp4,from the table\n")
    assert read_captions(tmp_path, tmp_path, [video, other], DATA) == {video: "from the table", other: ""}
    write_caption(tmp_path, video, "  a ‹new› one \n")
    assert (tmp_path / "a.txt").read_text() == "a ‹new› one\n"
    synced = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
        write_caption(tmp_path, video, "a ‹new› one")
    assert any("/.a.txt." in path for path in synced), "it may replace the only caption"
    assert read_captions(tmp_path, tmp_path, [video], DATA) == {video: "a ‹new› one"}
    for text in ("x" * 60_000, "a\0b", "half \ud800"):
        with pytest.raises(DataError, match="cannot be a caption"):
            write_caption(tmp_path, video, text)
    video.unlink()
    with pytest.raises(DataError, match="vanished"):
        write_caption(tmp_path, video, "x")


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption"])
def test_captions_behind_links_out_of_the_folder_are_not_read(tmp_path, suffix):
    page, secret = tmp_path / "page", tmp_path / "secret.txt"
    videos = page / "videos"
    (page / "texts").mkdir(parents=True)
    videos.mkdir()
    secret.write_text("secret")
    (page / "texts" / "b.txt").write_text("a dog")
    for name in "ab":
        (videos / f"{name}.mp4").touch()
    found = list_videos(page, "videos")
    (videos / "b.txt").symlink_to(page / "texts" / "b.txt")
    (videos / f"a{suffix}").symlink_to(secret)
    assert list(read_captions(page, videos, found, DATA).values()) == ["", "a dog"]
    (videos / f"a{suffix}").unlink()
    # A list of captions.
    (videos / "videos.txt").write_text("a.mp4\n")
    (videos / "prompts.txt").symlink_to(secret)
    assert list(read_captions(page, videos, found, DATA).values()) == ["", "a dog"]
    (videos / "prompts.txt").unlink()
    (videos / "prompts.txt").write_text("a cat")
    # It is no caption, so it hides none.
    (videos / "LICENSE.txt").symlink_to(secret)
    assert list(read_captions(page, videos, found, DATA).values()) == ["a cat", "a dog"]


def test_find_and_replace_and_prefix(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    texts = {a: "a cat", b: "zap, a dog", c: ""}
    assert changed_captions(texts, "a ", "the ", "") == {a: "the cat", b: "zap, the dog"}
    assert changed_captions(texts, "", "", "zap, ") == {a: "zap, a cat"}
    assert changed_captions({a: "one\ntwo"}, "", "", "x ") == {a: "x one\nx two"}
    assert changed_captions(texts, "none of it", "x", "") == {}


def upload(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"of {folder.name}/{name}")
    return [folder / name for name in names]


def test_uploads_go_to_the_videos_under_a_free_clean_name(tmp_path):
    for expected in ("a.mp4", "a_2.mp4"):
        assert take_uploads(tmp_path, "videos", upload(tmp_path / "up", "a.mp4")) == ([expected], [])
    for folder, name in (("..", "a.mp4"), ("videos", "a.sh"), ("/tmp", "a.mp4")):
        files = upload(tmp_path / "up", name)
        taken, [why] = take_uploads(tmp_path, folder, files)
        assert not taken and files[0].exists() and ("is outside of" in why or "cannot be uploaded" in why)


def test_a_clip_and_its_caption_keep_one_name(tmp_path):
    """If another clip has the name, the caption is renamed with its own clip, and never goes to the other one."""
    videos = tmp_path / "videos"
    upload(videos, "clip.mp4")
    taken, _ = take_uploads(tmp_path, "videos", upload(tmp_path / "up", "clip.mp4", "clip.txt", "dog.mov", "dog.txt"))
    assert sorted(taken) == ["clip_2.mp4", "clip_2.txt", "dog.mov", "dog.txt"]
    assert (videos / "clip_2.txt").read_text() == "of up/clip.txt" and not (videos / "clip.txt").exists()
    # A caption alone is for the existing clip.
    assert take_uploads(tmp_path, "videos", upload(tmp_path / "up", "clip.txt")) == (["clip.txt"], [])
    assert sorted(take_uploads(tmp_path, "videos", upload(tmp_path / "up", "dog.mp4", "dog.txt"))[0]) == [
        "dog_2.mp4",
        "dog_2.txt",
    ]


def test_many_files_are_added_with_one_listing_of_the_folder(tmp_path):
    files = upload(tmp_path / "up", *(f"{n}{suffix}" for n in range(20) for suffix in (".mp4", ".txt")), "no.sh")
    with count_calls(os.listdir, os.scandir) as calls:
        taken, [why] = take_uploads(tmp_path, "videos", files)
    assert calls.total() == 1 and len(taken) == 40 and "no.sh" in why
    # A wrong folder is one line for all files.
    taken, [why] = take_uploads(tmp_path, "..", upload(tmp_path / "up", "a.mp4", "b.mp4"))
    assert not taken and "is outside of" in why


@pytest.mark.parametrize(
    "names",
    [
        ("का.mp4", "की.mp4", "की.txt"),
        ("a+.mp4", "a=.mp4", "a=.txt"),
        ("a=.txt", "a+.mp4", "a=.mp4"),
        ("x" * 220 + "1.mp4", "x" * 220 + "2.mp4", "x" * 220 + "2.txt"),
        # The caption of a clip that was not added.
        ("a+.mp4", "a=.txt"),
        ("a=.txt", "a+.mp4"),
    ],
)
def test_names_that_are_one_when_they_are_clean_stay_apart(tmp_path, names):
    files = upload(tmp_path / "up", *names)
    taken, refused = take_uploads(tmp_path, "videos", files)
    assert len(taken) == len(names) and not refused
    origins = {}
    for path in (tmp_path / "videos").iterdir():
        origins.setdefault(path.stem, set()).add(Path(path.read_text()).stem)
    assert all(len(stems) == 1 for stems in origins.values()), origins
    assert len(origins) == len({file.stem for file in files})


def test_a_caption_of_one_of_two_clips_of_one_name_is_refused(tmp_path):
    twice = [upload(tmp_path / folder, "a.mp4")[0] for folder in ("one", "two")]
    caption = upload(tmp_path / "one", "a.txt")
    taken, [why] = take_uploads(tmp_path, "videos", [*twice, *caption])
    assert not taken and "a.mp4 was added twice" in why and caption[0].exists()
    assert take_uploads(tmp_path, "videos", twice) == (["a.mp4", "a_2.mp4"], [])


def test_a_video_that_vanishes_after_it_was_listed_is_one_line(tmp_path):
    (tmp_path / "videos").mkdir()
    video = tmp_path / "videos" / "a.mp4"
    write_video(video, 8)
    found = list_videos(tmp_path, "videos")
    video.unlink()
    (card,) = Gallery(tmp_path).cards(tmp_path / "videos", dict.fromkeys(found, ""), DATA)
    assert card.refused == "it has vanished: press Refresh."
    assert html.address(tmp_path, video) == "/files/videos/a.mp4?v=0"
    assert posters(tmp_path, [video]) == [None]


def test_a_poster_is_a_frame_of_the_middle(tmp_path):
    from PIL import Image

    write_video(tmp_path / "a.mp4", 9, width=96, height=64)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    poster, nothing = posters(tmp_path, [tmp_path / "a.mp4", tmp_path / "broken.mp4"])
    assert nothing is None and Image.open(poster).size == (96, 64)
    assert posters(tmp_path, [tmp_path / "a.mp4"]) == [poster]
