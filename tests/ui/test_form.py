"""The fields and the conf agree, by the functions that the page's events call."""

import os

import pytest

pytest.importorskip("gradio")

from mochi_tune.config.load import load_config
from mochi_tune.ui.form import SettingsForm
from mochi_tune.ui.page import build_page

WITH_BLANKS = """defaults: [base, _self_]
name: cats
data: {caption_prefix: "TOK, ", caption_suffix: " in rain "}
train: {sample_prompts: ["a cup ", " b"]}
sample: {prompt: "a cup "}
"""


@pytest.fixture
def form(tmp_path, monkeypatch):
    import gradio as gr

    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    with gr.Blocks(analytics_enabled=False):
        return SettingsForm(tmp_path)


def test_a_conf_that_nobody_touched_stays_though_its_words_end_in_blanks(form, tmp_path):
    (tmp_path / "conf" / "cats.yaml").write_text(WITH_BLANKS)
    form.save(("cats", *form.filled("cats")), replaces=False)
    assert (tmp_path / "conf" / "cats.yaml").read_text() == WITH_BLANKS


def test_blanks_alone_are_nothing_and_blanks_after_a_number_a_slip(form):
    texts = {"data.caption_prefix": "  ", "train.steps": " 7 ", "data.videos": "clips "}
    values = ["cats", *(texts.get(key, "") for key in form.fields), "  train.warmup_steps=3 \n  "]
    form.save(tuple(values), replaces=False)
    config = load_config("cats", [])
    assert (config.data.caption_prefix, config.data.videos) == ("", "clips")
    assert (config.train.steps, config.train.warmup_steps) == (7, 3)


def test_a_page_opens_with_the_lora_that_the_browser_keeps(tmp_path):
    (tmp_path / "conf").mkdir(exist_ok=True)
    for number, name in enumerate(("cats", "dogs")):
        (tmp_path / "conf" / f"{name}.yaml").touch()
        os.utime(tmp_path / "conf" / f"{name}.yaml", (number, number))
    open_page = next(each.fn for each in build_page(tmp_path).fns.values() if each.api_name == "open_page")
    assert open_page is not None
    assert [open_page(kept).value for kept in ("cats", "", "gone")] == ["cats", "dogs", "dogs"]


def test_a_conf_that_cannot_be_read_shows_its_mistake_and_no_settings_of_another_lora(form, tmp_path):
    (tmp_path / "conf" / "typo.yaml").write_text("train: {stepz: 3}")
    assert list(form.filled("typo")) == [""] * (len(form.fields) + 1)
    line = form.message("typo", *form.filled("typo"))
    assert "note error" in line and "train.stepz is not a setting; did you mean train.steps?" in line


def test_the_line_names_what_is_called_by_another_name(form, tmp_path):
    (tmp_path / "conf" / "cats.yaml").write_text("name: dogs\n")
    line = form.message("cats", *form.filled("cats"))
    assert "conf/cats.yaml has name=dogs: its run folder, cache and adapter take that name" in line
    assert "Every setting fits" in line
