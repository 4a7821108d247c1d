"""The form reports the same errors as the command line, and writes files that the command line reads."""

import os
from dataclasses import replace
from typing import get_type_hints

import pytest
from helpers_jobs import put

from mochi_tune.config.load import load_config
from mochi_tune.config.settings import sections
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.ui.confs import (
    PATHS,
    Form,
    as_text,
    check_form,
    conf_mistake,
    list_confs,
    newest_conf,
    read_form,
    save_conf,
    videos_of,
)
from mochi_tune.ui.jobs import Job

PROMPTS = ['it\'s "so" \\ and', "b, [c]"]
FORM = Form(
    "cats",
    {
        "model": "tiny",
        "lora": "attention_mlp",
        "lora.rank": "4",
        "train.sample_prompts": as_text(PROMPTS),
        "memory": "",
    },
    "train.warmup_steps=3\n# a remark\nlora.rank_pattern={'blocks\\.0\\..*': 8}\n"
    "data.sources=[{folder: 'a b', repeats: 2}]\nparallel=data",
)


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_conf_says_what_the_form_says(tmp_path):
    path = save_conf(tmp_path, FORM, replaces=False)
    assert path == tmp_path.resolve() / "conf" / "cats.yaml"
    assert load_config("cats", []) == check_form(tmp_path, FORM)
    config = load_config("cats", [])
    assert config.train.sample_prompts == PROMPTS
    assert (config.model.name, config.lora.rank, config.train.warmup_steps) == ("tiny", 4, 3)
    assert config.run_dir == "runs/cats_tiny" and config.data.sources[0].folder == "a b"
    assert list_confs(tmp_path) == ["cats"]


def test_a_form_is_read_back_from_its_conf(tmp_path):
    save_conf(tmp_path, FORM, replaces=False)
    again = read_form(tmp_path, "cats")
    assert again.prompts == tuple(PROMPTS)
    assert check_form(tmp_path, again) == check_form(tmp_path, FORM)
    # Nothing has changed, so nothing is replaced.
    before = (tmp_path / "conf" / "cats.yaml").read_bytes()
    save_conf(tmp_path, again, replaces=False)
    assert (tmp_path / "conf" / "cats.yaml").read_bytes() == before


def test_a_conf_with_other_settings_stays_unless_asked(tmp_path):
    (tmp_path / "conf").mkdir()
    mine = tmp_path / "conf" / "cats.yaml"
    mine.write_text("defaults: [base, _self_]\nname: cats # mine\ntrain: {steps: 7}\n")
    with pytest.raises(ConfigError, match="other settings"):
        save_conf(tmp_path, FORM, replaces=False)
    assert "# mine" in mine.read_text()
    save_conf(tmp_path, FORM, replaces=True)
    assert load_config("cats", []) == check_form(tmp_path, FORM)


@pytest.mark.parametrize(("text", "name"), [("name: dogs\n", "dogs"), ("", "my_lora")])
def test_a_conf_with_another_name_than_its_file_is_trained_as_it_is(tmp_path, text, name):
    (tmp_path / "conf").mkdir()
    mine = tmp_path / "conf" / "cats.yaml"
    mine.write_text(f"defaults: [base, _self_]\n{text}train: {{steps: 7}}\n")
    form = read_form(tmp_path, "cats")
    assert form.more == f"name={name}" and check_form(tmp_path, form).run_dir == f"runs/{name}"
    save_conf(tmp_path, form, replaces=False)
    assert mine.read_text().endswith("train: {steps: 7}\n")
    save_conf(tmp_path, replace(form, more=""), replaces=True)
    assert load_config("cats", []).name == "cats"
    with pytest.raises(ConfigError, match="name is given twice"):
        check_form(tmp_path, Form("cats", {}, "name=a\nname=b"))


def test_the_form_of_a_conf_over_others_has_their_settings(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "own.yaml").write_text("defaults: [toy_lora, _self_]\ntrain: {steps: 7}\n")
    (tmp_path / "conf" / "cats.yaml").write_text("defaults: [own, _self_]\nname: cats\nlora: {rank: 3}\n")
    form = read_form(tmp_path, "cats")
    assert form.main["model"] == "toy" and form.main["train.steps"] == "7" and form.main["lora.rank"] == "3"
    path = str(tmp_path / "conf" / "cats.yaml")
    assert load_config("base", form.overrides()) == load_config(path, [])


def test_a_conf_over_another_conf_is_not_flattened(tmp_path):
    save_conf(tmp_path, Form("own"), replaces=False)
    (tmp_path / "conf" / "cats.yaml").write_text("defaults: [own, _self_]\nname: cats\n")
    with pytest.raises(ConfigError, match="is based on own"):
        save_conf(tmp_path, FORM, replaces=True)


@pytest.mark.parametrize(
    ("form", "line"),
    [
        (Form("cats", {"lora.rank": "0"}), "lora.rank=0 is not possible: it must be at least 1."),
        (Form("cats", {"train.steps": "many"}), "train.steps=many does not fit: it takes a whole number."),
        (Form("cats", {}, "train.stepps=3"), "train.stepps is not a setting; did you mean train.steps?"),
        (
            Form("cats", {"lora.rank": "4"}, "lora.rank=8"),
            "lora.rank is given twice: remove it from the other settings.",
        ),
        (Form("../cats"), "name=../cats is not possible: use letters, digits, - _ and ., at most 64."),
        (Form(""), "name= is not possible: use letters, digits, - _ and ., at most 64."),
        (Form("cats", {"model": "huge"}), "model=huge does not exist: use one of mochi_1, tiny, toy."),
    ],
)
def test_a_mistake_is_the_line_of_the_command_line(tmp_path, form, line):
    with pytest.raises(ConfigError) as error:
        check_form(tmp_path, form)
    assert str(error.value) == line
    with pytest.raises(ConfigError):
        save_conf(tmp_path, form, replaces=True)
    assert not (tmp_path / "conf").exists()


@pytest.mark.parametrize(
    "more",
    [*(f"{key}=../cache" for key in PATHS), "run_dir=/tmp/elsewhere", "data.preview=~/a", "sample.adapter=[a,../b]",
     "data.sources=[{folder: a}, {folder: ../b}]"],
)  # fmt: skip
def test_a_run_does_not_leave_the_folder(tmp_path, more):
    with pytest.raises(DataError, match="outside of"):
        check_form(tmp_path, Form("cats", {}, more))


def test_every_setting_that_names_a_path_is_checked(tmp_path):
    found = {
        f"{name}.{key}".lstrip(".")
        for name, section in sections().items()
        for key, kind in get_type_hints(section, include_extras=True).items()
        if "expanduser" in repr(kind) and name != "model"
    }
    assert found - {"parallel.ray_address"} <= {*PATHS}
    more = "model.weights=/weights\nsample.adapter=hub:a/b\nlora.init_from=a\nsample.adapter_strength=2"
    check_form(tmp_path, Form("cats", {}, more))


def test_many_threads_check_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        ranks = list(
            pool.map(lambda rank: check_form(tmp_path, Form("a", {"lora.rank": str(rank)})).lora.rank, range(1, 17))
        )
    assert ranks == list(range(1, 17))


def test_a_name_is_no_file_that_others_build_on(tmp_path):
    for name in ("base", "x.yaml", "x.yml"):
        with pytest.raises(ConfigError, match=f"name={name} is not possible: every conf is built on base"):
            save_conf(tmp_path, Form(name), replaces=True)
    save_conf(tmp_path, Form("1e3", {"data.caption_prefix": "007"}), replaces=True)
    config = load_config("1e3", [])
    assert (config.name, config.data.caption_prefix) == ("1e3", "007")


def test_the_page_opens_on_the_conf_that_was_changed_last_and_on_none_that_it_refuses(tmp_path):
    assert newest_conf(tmp_path) == "my_lora"
    (tmp_path / "conf").mkdir()
    for seconds, name in enumerate(("cats", "ants", "base", "of a clone", "x.yml")):
        path = tmp_path / "conf" / f"{name}.yaml"
        path.touch()
        os.utime(path, (seconds, seconds))
    assert list_confs(tmp_path) == ["ants", "cats"] and newest_conf(tmp_path) == "ants"
    # A link that leads out of the folder is left out.
    (tmp_path / "conf" / "zebra.yaml").symlink_to(tmp_path.parent / "elsewhere.yaml")
    (tmp_path.parent / "elsewhere.yaml").touch()
    assert list_confs(tmp_path) == ["ants", "cats"]
    os.utime(tmp_path / "conf" / "cats.yaml", (9, 9))
    assert newest_conf(tmp_path) == "cats"


@pytest.mark.parametrize("text", ["defaults: [", "train: {steps: x}", "train: {stepz: 3}", "[]"])
def test_a_conf_that_cannot_be_read_is_not_replaced(tmp_path, text):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "cats.yaml").write_text(text)
    for replaces in (False, True):
        with pytest.raises(ConfigError, match="does not replace this file: correct it, or choose another name"):
            save_conf(tmp_path, FORM, replaces)
    assert (tmp_path / "conf" / "cats.yaml").read_text() == text


@pytest.mark.parametrize(("text", "what"), [("- a", "a list"), ("a", "a single value")])
def test_a_conf_that_contains_no_mapping_is_reported(tmp_path, text, what):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "cats.yaml").write_text(text)
    assert f"cats.yaml contains {what} instead of settings: write lines of `key: value`." in conf_mistake(
        tmp_path, "cats"
    )


def test_a_conf_that_a_waiting_job_will_run_is_not_changed(tmp_path):
    save_conf(tmp_path, FORM, replaces=False)
    put(tmp_path, Job(7, "train", ["conf=cats"]))
    other = replace(FORM, main={**FORM.main, "lora.rank": "8"})
    with pytest.raises(ConfigError, match=r"job 7 is waiting to run conf/cats.yaml: save after that job"):
        save_conf(tmp_path, other, replaces=True)
    save_conf(tmp_path, FORM, replaces=True)
    put(tmp_path, Job(7, "train", ["conf=cats"], state="running"))
    save_conf(tmp_path, other, replaces=True)
    assert load_config("cats", []).lora.rank == 8


REFERRING = """defaults:
  - base
  - override model: tiny
  - _self_
name: first
run_dir: runs/${name}
data:
  cache: cache/${name}
  sources: [{folder: "clips/${name}"}]
  caption_suffix: ', \\${x}'
lora:
  rank: ${train.warmup_steps}
sample:
  prompt: 'it costs \\${x}'
train: {warmup_steps: 3}
"""


def test_another_name_gets_a_run_and_a_cache_of_its_own(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "first.yaml").write_text(REFERRING)
    form = read_form(tmp_path, "first")
    save_conf(tmp_path, form, replaces=False)
    assert (tmp_path / "conf" / "first.yaml").read_text() == REFERRING, "nothing has changed"
    for name in ("second", "third"):
        save_conf(tmp_path, replace(form, name=name), replaces=False)
        config = load_config(name, [])
        assert (config.run_dir, config.data.cache) == (f"runs/{name}", f"cache/{name}")
        assert config.data.sources[0].folder == f"clips/{name}" and config.lora.rank == 3
        assert (config.data.caption_suffix, config.sample.prompt) == (", ${x}", "it costs ${x}")
        assert "run_dir: runs/${name}" in (tmp_path / "conf" / f"{name}.yaml").read_text()
        form = read_form(tmp_path, name)


def test_a_new_name_does_not_go_on_with_the_run_of_another(tmp_path):
    save_conf(tmp_path, Form("first", {}, "run_dir=runs/mine"), replaces=False)
    for run_dir in ("runs/mine", "./runs/../runs/mine"):
        with pytest.raises(
            ConfigError, match=r"is the folder of conf/first.yaml, whose run would continue: choose another name"
        ):
            save_conf(tmp_path, Form("second", {}, f"run_dir={run_dir}"), replaces=True)
    assert not (tmp_path / "conf" / "second.yaml").exists()
    save_conf(tmp_path, Form("first", {"lora.rank": "4"}, "run_dir=runs/mine"), replaces=True)
    save_conf(tmp_path, Form("second"), replaces=False)
    # Nor does an existing one.
    with pytest.raises(ConfigError, match=r"is the folder of conf/first\.yaml"):
        save_conf(tmp_path, Form("second", {}, "run_dir=runs/mine"), replaces=True)


def test_the_folder_of_videos_is_none_where_sources_take_its_place(tmp_path):
    assert videos_of(tmp_path, Form("cats")) == "videos"
    assert videos_of(tmp_path, Form("cats", {"data.videos": "clips/${name}"})) == "clips/cats"
    with pytest.raises(ConfigError, match=r"takes its clips from a b; videos is not used: change the files of those"):
        videos_of(tmp_path, FORM)
    # A mistake in another setting does not matter, unless the folder depends on it.
    assert videos_of(tmp_path, Form("cats", {"data.videos": "v", "lora.rank": "0"})) == "v"
    for form in (replace(FORM, main={"lora.rank": "0"}), Form("cats", {"data.videos": "${name}", "lora.rank": "0"})):
        with pytest.raises(ConfigError, match=r"lora\.rank=0 is not possible"):
            videos_of(tmp_path, form)
