"""Split, filter and describe from the page: arguments of the verbs, and links to their results."""

import pytest
from helpers_video import write_video

from mochi_tune.cli.footage import run_filter
from mochi_tune.cli.options import DESCRIBE_OPTIONS, FILTER_OPTIONS, SPLIT_OPTIONS
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.ui.confs import Form
from mochi_tune.ui.footage_tab import DESCRIBE, FILTER, SPLIT, footage_arguments, links_html


@pytest.mark.parametrize(
    ("fields", "options"), [(SPLIT, SPLIT_OPTIONS), (FILTER, FILTER_OPTIONS), (DESCRIBE, DESCRIBE_OPTIONS)]
)
def test_the_fields_are_settings_of_the_verb_with_its_defaults(fields, options):
    for key, (_, default, _) in fields.items():
        assert options[key][0] in (default, None), key


def test_arguments_leave_out_what_is_empty_and_name_the_folder(tmp_path):
    (tmp_path / "films").mkdir()
    texts = {"in": "films", "threshold": "", "max_seconds": "4"}
    assert footage_arguments(tmp_path, "split", "videos", texts) == ["in=films", "max_seconds=4", "out=videos"]
    assert footage_arguments(tmp_path, "filter", "videos", {"undo": "true"}) == ["undo=true", "videos=videos"]
    texts = {"endpoint": "http://localhost:1/v1", "model": "m", "trigger": "a b", "dry_run": "true"}
    assert footage_arguments(tmp_path, "describe", "v", texts)[2:] == ["trigger=a b", "dry_run=true", "videos=v"]


@pytest.mark.parametrize(
    ("verb", "videos", "texts", "line"),
    [
        ("split", "videos", {"in": ""}, "Films is empty"),
        ("split", "videos", {"in": "none"}, "none does not exist"),
        ("split", "videos", {"in": "../films"}, "outside of"),
        ("split", "/tmp", {"in": "films"}, "outside of"),
        ("filter", "..", {}, "outside of"),
        ("describe", "videos", {"endpoint": "local", "model": ""}, "fill in both"),
    ],
)
def test_what_is_missing_or_outside_is_one_line(tmp_path, verb, videos, texts, line):
    with pytest.raises((ConfigError, DataError), match=line):
        footage_arguments(tmp_path, verb, videos, texts)


def test_what_filter_has_left_is_linked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", 15, width=96, height=64)
    outside = Form("a", {"data.videos": "../videos"})
    assert links_html(tmp_path, Form("a")) == "" and links_html(tmp_path, outside) == ""
    assert run_filter(footage_arguments(tmp_path, "filter", "videos", {"max_black": "0.5"})) == 0
    made = links_html(tmp_path, Form("a"))
    assert "/files/videos_filter/filter.html?v=" in made and "/files/videos_filter/filter.csv?v=" in made
    assert "scenes.csv" not in made
