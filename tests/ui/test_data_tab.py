"""A caption that two pages edit: nothing is lost, and the second page reports it."""

import os
from pathlib import Path

import pytest
from helpers_calls import count_calls

pytest.importorskip("gradio")

from mochi_tune.config.schema import DataConfig
from mochi_tune.ui.clips import list_videos, read_captions
from mochi_tune.ui.confs import MAIN_KEYS, Form, check_form, save_conf
from mochi_tune.ui.data_tab import NUM_CARDS, _page, save_caption
from mochi_tune.ui.jobs import list_jobs
from mochi_tune.ui.page import build_page


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    (tmp_path / "videos" / "a.txt").write_text("a cat\n")
    return tmp_path / "videos" / "a.txt"


def test_a_box_that_is_left_writes_what_has_changed_here(clip, tmp_path):
    name = "videos/a.mp4"
    assert save_caption(tmp_path, "a cat", name, "a cat") == ("", "a cat")
    said, begins = save_caption(tmp_path, "a dog ", name, "a cat")
    assert "is saved" in said and begins == "a dog" and clip.read_text() == "a dog\n"
    # The next change is relative to the saved text.
    assert save_caption(tmp_path, "", name, begins)[1] == "" and clip.read_text() == ""
    assert save_caption(tmp_path, "", "", "") == ("", "")


def test_a_caption_that_changed_elsewhere_stays(clip, tmp_path):
    clip.write_text("of another page\n")
    # An unchanged box writes nothing.
    assert save_caption(tmp_path, "a cat", "videos/a.mp4", "a cat") == ("", "a cat")
    said, begins = save_caption(tmp_path, "mine", "videos/a.mp4", "a cat")
    assert "changed elsewhere" in said and "of another page" in said and begins == "a cat"
    assert clip.read_text() == "of another page\n"


def test_a_caption_of_a_table_gets_a_file(clip, tmp_path):
    clip.unlink()
    assert "is saved" in save_caption(tmp_path, "mine", "videos/a.mp4", "from the table")[0]
    assert clip.read_text() == "mine\n"


@pytest.mark.parametrize(("name", "line"), [("../a.mp4", "outside of"), ("videos/gone.mp4", "has vanished")])
def test_a_clip_outside_or_gone_is_one_line(clip, tmp_path, name, line):
    said, begins = save_caption(tmp_path, "mine", name, "")
    assert line in said and begins == "" and "note error" in said


def test_a_page_that_is_no_more_is_the_last_one():
    videos = [Path(str(number)) for number in range(30)]
    assert [_page(number, videos) for number in (0, 2, 3)] == [0, 2, 2]
    assert _page(2, videos[:3]) == 0 == _page(1, [])


def acts_of(folder):
    """The functions of the page's events by name."""
    return {each.api_name: each.fn for each in build_page(folder).fns.values() if each.fn}


@pytest.fixture
def fields(clip, tmp_path, monkeypatch):
    """The values of all fields for a conf with data.sources."""
    monkeypatch.chdir(tmp_path)
    save_conf(tmp_path, Form("cats", {}, "data.sources=[{folder: cats}, {folder: dogs}]"), replaces=False)
    return ["cats", *[""] * len(MAIN_KEYS), "data.sources=[{folder: cats}, {folder: dogs}]"]


def test_a_conf_with_sources_leaves_the_folder_of_videos_alone(fields, tmp_path):
    """Covers the gallery, uploads, changes of many captions and jobs of footage, by the events of the page."""
    (tmp_path / "b.mp4").touch()
    (tmp_path / "films").mkdir()
    acts = acts_of(tmp_path)
    line = "takes its clips from cats, dogs; videos is not used"
    drawn = acts["draw"](0, *[""] * 24, *fields)
    assert line in drawn[0].value and not any(column.visible for column in drawn[1:-2:5])
    assert line in acts["add_files"]([str(tmp_path / "b.mp4")], 0, *fields)[0]
    assert line in acts["changed"]("cat", "dog", "", 0, *fields)[0]
    assert line in acts["started"]("films", "6", "1.25", "", "adaptive", *fields)
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["a.mp4", "a.txt"]
    assert (tmp_path / "videos" / "a.txt").read_text() == "a cat\n" and not list_jobs(tmp_path)


def test_a_caption_without_a_clip_is_reported(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("a.txt", "lonely.txt", "captions.txt")
    clip.unlink()
    for name in names:
        (tmp_path / name).write_text("a cat")
    add_files = acts_of(tmp_path)["add_files"]
    said, _ = add_files([str(tmp_path / name) for name in names], 0, "cats", *[""] * len(MAIN_KEYS), "")
    assert said.count("has no clip") == 1 and "lonely.txt has no clip of its name yet: add lonely.mp4." in said


def test_a_page_is_drawn_with_one_listing_of_the_folder_and_its_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    videos = tmp_path / "videos"
    videos.mkdir()
    names = [f"{number:02d}.mp4" for number in range(NUM_CARDS + 2)]
    for name in names:
        (videos / name).touch()
    (videos / "captions.csv").write_text("file_name,caption\n" + "".join(f"{name},of {name}\n" for name in names))
    with count_calls(os.scandir) as once:
        check_form(tmp_path, Form("cats", {}, ""))
        shown = list_videos(tmp_path, "videos")[NUM_CARDS:]
        read_captions(tmp_path, videos, shown, DataConfig())
    draw = acts_of(tmp_path)["draw"]
    with count_calls(os.scandir) as calls:
        drawn = draw(1, *[""] * 2 * NUM_CARDS, "cats", *[""] * len(MAIN_KEYS), "")
    assert calls == once and [column.visible for column in drawn[1:-2:5]] == [True] * 2 + [False] * (NUM_CARDS - 2)
    assert [box.value for box in drawn[3:12:5]] == ["of 12.mp4", "of 13.mp4"]
    assert "13 to 14 of 14" in drawn[-2] and drawn[-1] == 1
