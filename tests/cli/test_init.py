import os
from pathlib import Path

import pytest

from mochi_tune.cli.main import run
from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError


def test_init_writes_files_that_load_and_replaces_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["init", "teacups"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("wrote videos/README.md\nwrote conf/teacups.yaml\n") and "inspect conf=teacups" in out
    config = load_config("teacups", [])
    assert (config.name, config.data.videos) == ("teacups", "videos")
    assert "conf=teacups" in Path("videos/README.md").read_text()
    before = Path("conf/teacups.yaml").read_text()
    assert before.startswith("# One file is one LoRA: run every verb with conf=teacups. ")
    with pytest.raises(ConfigError, match="never replaced"):
        run(["init", "teacups"])
    assert Path("conf/teacups.yaml").read_text() == before


def test_an_init_that_was_killed_is_repeated_and_writes_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    # A file gets its name only with its content, and the conf last.
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            run(["init", "teacups"])
    assert run(["init", "teacups"]) == 0
    assert Path("videos/README.md").exists() and load_config("teacups", []).name == "teacups"


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["../x"], ["--force"]])
def test_init_takes_one_name(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="takes one NAME"):
        run(["init", *arguments])
    assert not list(tmp_path.iterdir())


def test_a_name_is_text_whatever_yaml_makes_of_it_and_base_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("no", "007", "1e5", "null"):
        assert run(["init", name]) == 0
        assert load_config(name, []).name == name
    with pytest.raises(ConfigError, match="init base is not possible"):
        run(["init", "base"])
    assert not Path("conf/base.yaml").exists()
    Path("conf/keep.yml").write_text("name: keep")
    with pytest.raises(ConfigError, match=r"conf/keep.yml exists and is never replaced"):
        run(["init", "keep"])
