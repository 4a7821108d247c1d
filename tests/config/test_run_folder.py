"""A run's own config.yaml as conf=, in the folder that it names and in another one."""

from pathlib import Path

import pytest
from helpers_process import run

from mochi_tune.config.load import check_run_folder, config_yaml, load_config, run_config_yaml
from mochi_tune.errors import ConfigError


def make_run(folder: Path, run_dir: Path | str, record: str = "metrics.jsonl") -> str:
    """Makes a run folder whose config.yaml names `run_dir`; returns the path of that file."""
    folder.mkdir()
    (folder / record).parent.mkdir(exist_ok=True)
    (folder / record).touch()
    (folder / "config.yaml").write_text(config_yaml(load_config("my_lora", [f"run_dir={run_dir}"])))
    return str(folder / "config.yaml")


def check(conf: str, *given: str) -> None:
    check_run_folder(conf, given, load_config(conf, list(given)))


@pytest.mark.parametrize("record", ["metrics.jsonl", "history.jsonl", "checkpoints/step_000004"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_moved_run_is_refused_and_the_folder_is_named(tmp_path, record, is_there):
    if is_there:
        (tmp_path / "old").mkdir()
    conf = make_run(tmp_path / "moved", tmp_path / "old", record)
    with pytest.raises(ConfigError) as error:
        check(conf)
    assert f"set run_dir={tmp_path / 'moved'}, or" in str(error.value) and "\n" not in str(error.value)
    check(conf, f"run_dir={tmp_path / 'moved'}")
    check(conf, f"run_dir={tmp_path / 'old'}")


def test_a_projects_own_conf_beside_a_folder_of_checkpoints_is_of_no_run(tmp_path):
    conf = make_run(tmp_path / "project", "runs/my_lora", "checkpoints/flux.safetensors")
    check(conf)


def test_a_run_where_it_was_and_a_conf_of_no_run_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(make_run(tmp_path / "run", "run"))
    (tmp_path / "link").symlink_to("run")
    check("link/config.yaml")
    check(make_run(tmp_path / "conf", "elsewhere", "other.jsonl"))
    check("my_lora")


def test_a_runs_own_conf_does_not_repeat_how_one_start_resumed(tmp_path):
    given = ["resume=force", "resume_from=runs/a/checkpoints/step_000004"]
    config = load_config("my_lora", given)
    kept = run_config_yaml(config)
    assert "resume: auto" in kept and "resume_from: null" in kept
    # As earlier versions wrote it.
    conf, other = Path(make_run(tmp_path / "run", "run")), tmp_path / "my.yaml"
    for path in (conf, other):
        path.write_text(config_yaml(config))
    for path, more, found in ((conf, [], ("auto", None)), (conf, given, ("force", given[1][12:]))):
        assert (load_config(str(path), more).resume, load_config(str(path), more).resume_from) == found
    assert load_config(str(other), []) == config


def test_the_command_line_refuses_it_before_anything_is_made(tmp_path):
    conf = make_run(tmp_path / "moved", tmp_path / "old")
    for verb in ("train", "sample"):
        done = run(verb, f"conf={conf}", "sample.prompt=a cat" if verb == "sample" else "device=cpu")
        assert done.returncode == 2 and f"set run_dir={tmp_path / 'moved'}" in done.stderr, done.stderr
    assert not (tmp_path / "old").exists()


def test_the_folder_of_a_run_in_place_of_its_conf_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "moved", "moved")
    with pytest.raises(ConfigError, match=r"conf=moved is a folder: use conf=moved/config\.yaml\.$"):
        load_config("moved", [])
    with pytest.raises(ConfigError, match=r"conf=moved/metrics\.jsonl is not a \.yaml file: "):
        load_config("moved/metrics.jsonl", [])
