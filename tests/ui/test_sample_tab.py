"""The history of videos: the conf for rendering a video again, and links to grids."""

import json
import os
from dataclasses import replace

import pytest

pytest.importorskip("gradio")

from mochi_tune.files import file_sha256
from mochi_tune.ui.confs import MAIN_KEYS, Form, save_conf
from mochi_tune.ui.page import build_page
from mochi_tune.ui.renders import SampleForm, list_grids, run_of
from mochi_tune.ui.sample_tab import SampleFields, conf_to_choose, grids_html
from mochi_tune.ui.server import served_file


def test_a_video_is_made_again_with_the_conf_of_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cups, form = "runs/cups_tiny", Form("cups", {"model": "tiny"}, "device=cpu")
    save_conf(tmp_path, form, replaces=False)
    save_conf(tmp_path, Form("a_first", {"model": "tiny"}), replaces=False)
    (tmp_path / "conf" / "a_broken.yaml").write_text("train: {stepps: 1}\n")
    assert run_of(tmp_path, tmp_path / cups / "grids" / "g" / "cells" / "a.mp4") == cups
    # Settings with that run folder are kept, even if they are not saved.
    assert conf_to_choose(tmp_path, replace(form, more="seed=7"), cups) == ("cups", "")
    for other in (Form("a_first", {"model": "tiny"}), Form("cups", {"model": "toy"}), Form("no name!")):
        assert conf_to_choose(tmp_path, other, cups) == ("cups", ", and conf/cups.yaml is chosen")
    assert conf_to_choose(tmp_path, form, "runs/gone")[0] == ""
    assert "run_dir=runs/gone" in conf_to_choose(tmp_path, form, "runs/gone")[1]


def test_the_strength_of_the_runs_own_adapter_is_kept():
    form = SampleForm("a", adapters=(("", "0.5"),))
    assert SampleFields.form_of(SampleFields.values_of(form)).adapters == form.adapters


def test_a_video_whose_adapter_has_changed_is_not_made_again_without_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, video = tmp_path / "runs" / "cups", "runs/cups/samples/a.mp4"
    (run / "samples").mkdir(parents=True)
    (tmp_path / video).touch()
    for name in ("adapter.safetensors", "start.mp4"):
        (run / name).write_text("old")
    old = {"sha256": file_sha256(run / "adapter.safetensors")}
    adapters = [{"file": "runs/cups/adapter.safetensors", **old}, {"file": "gone", **old}, {"file": "/etc/passwd"}]
    record = {"prompt": "a", "adapters": adapters, "init_video": {"file": str(run / "start.mp4"), **old}}
    (run / "samples" / "a.json").write_text(json.dumps(record))
    again = next(each.fn for each in build_page(tmp_path).fns.values() if each.api_name == "again")
    settings = ("cups", *[""] * len(MAIN_KEYS), "")
    assert again and "filled in" in again(video, *settings)[0] and "changed" not in again(video, *settings)[0]
    (run / "adapter.safetensors").write_text("new")
    assert "changed since this video was made: runs/cups/adapter.safetensors: " in again(video, *settings)[0]
    (run / "start.mp4").write_text("new")
    assert "adapter.safetensors, runs/cups/start.mp4: " in again(video, *settings)[0]
    record["adapters"] = adapters * 2
    (run / "samples" / "a.json").write_text(json.dumps(record))
    assert "a.mp4 has 6 adapters, and this page takes 4" in again(video, *settings)[0]


def test_finished_grids_are_linked(tmp_path):
    assert list_grids(tmp_path) == [] and grids_html(tmp_path, []) == ""
    for number in range(8):
        grid = tmp_path / "runs" / "cups_tiny" / "grids" / f"grid_{number}"
        (grid / "cells").mkdir(parents=True)
        (grid / "cells" / "a.json").touch()
        if number:
            (grid / "index.html").touch()
            os.utime(grid / "index.html", (number, number))
    (tmp_path / "runs" / "cups_tiny" / "grids" / "grid_7" / "grid.mp4").touch()
    found = list_grids(tmp_path)
    assert [grid.page.parent.name[-1] for grid in found] == list("7654321") and found[0].num_cells == 1
    made = grids_html(tmp_path, found)
    assert '<a href="/files/runs/cups_tiny/grids/grid_7/index.html?v=7"' in made and made.count(">grid.mp4<") == 1
    assert "grid_1" not in made and "1 older ones" in made
    assert served_file(tmp_path, "runs/cups_tiny/grids/grid_7/index.html") == found[0].page.resolve()
