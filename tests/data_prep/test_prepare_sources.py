"""`prepare`: which folders and files count as clips, their names, and the messages about them."""

import os

import pytest
from helpers_prepare import add_clip, config_for, report_of
from helpers_video import write_video

from mochi_tune.data_prep.inspection import inspect_clips
from mochi_tune.data_prep.inspection_page import make_page
from mochi_tune.data_prep.prepare import main, prepare
from mochi_tune.errors import DataError

SIZE = {"width": 96, "height": 72}
# The settings that use more footage.
ALL, SHORTER = "clips: all of a, b in data.sources", "shorter buckets in data.buckets"


def write_clip(path, num_frames=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, num_frames, **SIZE)
    path.with_suffix(".txt").write_text(f"a clip, {path.stem}")


def test_the_videos_of_a_run_below_the_clips_are_not_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clips" / "a.mp4")
    write_clip(tmp_path / "runs" / "my_lora" / "samples" / "step_00010.mp4")
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "runs" / "my_lora" / name).touch()
    config = config_for(tmp_path, videos=".", cache="cache")
    assert main(config) == 0 and main(config) == 0
    kept = [name for name, record in report_of(tmp_path).items() if record["status"] == "kept"]
    assert kept == ["clips/a.mp4"]
    lines = capsys.readouterr().out.splitlines()
    assert "not used: cache is a cache of mochi-tune, runs/my_lora is a run of mochi-tune" in lines
    # Files that `train` wrote there are not tables of captions either.
    assert not [line for line in lines if "without a video" in line]


def test_clips_of_the_working_folder_keep_apart_from_those_of_another_source(tmp_path, monkeypatch):
    write_clip(tmp_path / "cats" / "dogs" / "a.mp4")
    write_clip(tmp_path / "dogs" / "a.mp4", 8)
    monkeypatch.chdir(tmp_path / "cats")
    done = prepare(config_for(tmp_path, sources=[{"folder": "."}, {"folder": "../dogs"}]))
    assert (done.kept, done.clips_encoded) == (2, 2)
    assert set(report_of(tmp_path)) == {"cats/dogs/a.mp4", "dogs/a.mp4"}


def test_a_name_with_a_line_break_stays_on_the_line_of_its_note(tmp_path, capsys):
    add_clip(tmp_path, "whole.mp4", "a whole clip")
    add_clip(tmp_path, "short\nbroken.mp4", "a short clip", 3)
    whole = (tmp_path / "videos" / "whole.mp4").read_bytes()
    for name, content in ((b"odd\nbroken\xff.mp4", whole), (b"song\nbroken.mp3", b""), (b"alone\nbroken.txt", b"x")):
        with open(os.path.join(os.fsencode(tmp_path / "videos"), name), "wb") as file:
            file.write(content)
    assert main(config_for(tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("broken")]
    told = ("refused: ", "will be refused: ", "not used: ", "captions without a video")
    assert all(any(start in line and "broken" in line for line in lines) for start in told), lines


def test_numbers_in_the_names_of_folders_are_told_not_to_be_repeats(tmp_path, capsys):
    for name in ("1_cat", "2_bg", "5_ohwx/more"):
        write_clip(tmp_path / "videos" / name / "a.mp4")
    note = "folder names such as 2_bg are not read as repeats: set the repeats of each folder in data.sources\n"
    assert main(config_for(tmp_path)) == 0
    assert note in capsys.readouterr().out
    # With repeats as advised, no note; and none if another clip is next to the folders.
    sources = [{"folder": str(tmp_path / "videos" / name), "repeats": name[0]} for name in ("2_bg", "5_ohwx")]
    assert main(config_for(tmp_path, sources=sources)) == 0
    assert "not read as repeats" not in capsys.readouterr().out
    write_clip(tmp_path / "videos" / "b.mp4", 8)
    assert main(config_for(tmp_path)) == 0
    assert "not read as repeats" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "a smaller data.num_frames"),
        ({"buckets": [[13, 32, 48]]}, "shorter buckets in data.buckets"),
        ({"buckets": [[13, 32, 48], [19, 32, 48]]}, "shorter buckets in data.buckets"),
        ({"sources": [{"folder": "videos", "buckets": [[13, 32, 48]]}]}, "shorter buckets in data.sources[0].buckets"),
    ],
)
def test_a_clip_that_is_too_short_names_the_setting_that_decides(tmp_path, monkeypatch, settings, advice):
    monkeypatch.chdir(tmp_path)
    add_clip(tmp_path, "short.mp4", "a short clip", 5)
    with pytest.raises(DataError) as caught:
        prepare(config_for(tmp_path, **settings))
    assert str(caught.value).endswith(f"use a longer clip or {advice}.")


@pytest.mark.parametrize(
    ("modes", "length", "most", "advice"),
    [
        (
            ("all", "head"),
            13,
            None,
            f"clips: all of b in data.sources cuts 0.9 s of it, {SHORTER} would take 0.2 s of it",
        ),
        # A rest of one frame is shorter than any clip.
        (("all", "all"), 13, None, f"{SHORTER} would take 0.2 s of it"),
        (("all", "all"), 7, None, "the rest of each video, at most 6 frames, is too short for a clip"),
        (("head", "head"), 13, None, f"{ALL} cuts 1.3 s of it, {SHORTER} would take 0.2 s of it"),
        (("head", "head"), 13, 9, f"{ALL} without data.max_clips cuts 1.3 s of it, {SHORTER} would take 0.2 s of it"),
        # The rests of 2 and 9 frames are too short for another clip.
        (("head", "head"), 31, None, f"clips: all of b in data.sources and {SHORTER} would take 0.3 s of it"),
        (("all", "all"), 13, 1, "data.max_clips=1 leaves it out, a higher one cuts more"),
        # Both settings are needed to cut the rests of 8 and 15 frames.
        (("all", "all"), 25, 1, f"{SHORTER} and a higher data.max_clips would take it"),
        # Two clips leave 7 frames of a, and 14 of b.
        (
            ("uniform", "all"),
            13,
            2,
            "data.max_clips=2 leaves 0.5 s of it out, a higher one cuts more, clips: all of a in data.sources without "
            f"data.max_clips and {SHORTER} would take 0.2 s of it",
        ),
    ],
)
def test_what_would_use_the_footage_is_told_by_source(tmp_path, capsys, modes, length, most, advice):
    write_clip(tmp_path / "a" / "one.mp4", 33)
    write_clip(tmp_path / "b" / "two.mp4", 40)
    sources = [{"folder": str(tmp_path / name), "clips": mode} for name, mode in zip("ab", modes, strict=True)]
    assert main(config_for(tmp_path, sources=sources, buckets=[[length, 32, 48]], max_clips=most)) == 0
    assert f"s of footage are not used; {advice}\n" in capsys.readouterr().out


def test_a_source_of_validation_is_counted_apart_in_the_page_of_inspect(tmp_path):
    for name in ("a", "b"):
        write_clip(tmp_path / name / "a.mp4", 7 + (name == "b"))
    folders = [{"folder": str(tmp_path / name)} for name in ("a", "b")]
    config = config_for(tmp_path, sources=[folders[0] | {"repeats": 2}, folders[1] | {"validation": True}])
    page = make_page(inspect_clips(config.data, 0, None), "x", "")
    assert "of 2 of 2 files, 1 for validation" in page
    assert "held out for validation, never trained on: 1 clip of b" in page
    assert "an epoch takes the clips 2 x 1 of a<" in page
