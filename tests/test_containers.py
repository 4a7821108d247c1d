"""The files for containers name what exists. Docker itself is not asked."""

import re
from pathlib import Path

import pytest
import yaml

from mochi_tune.cli.options import UI_OPTIONS, plain_options
from mochi_tune.cli.ui import run_ui
from mochi_tune.errors import ConfigError

ROOT = Path(__file__).parent.parent
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]


def instructions(name: str) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(name):
    lets_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [source for word, rest in instructions(name) if word == "COPY" for source in rest.split()[:-1]]
    assert set(copied) == lets_in
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_it_does_not_run_as_root_and_has_the_pinned_torch(name):
    lines = instructions(name)
    assert [rest for word, rest in lines if word == "USER"] == ["mochi"]
    pinned = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert any(word == "RUN" and re.search(rf"{re.escape(pinned)}(\+cpu)?$", rest) for word, rest in lines)


def test_the_page_does_not_start_without_a_password(monkeypatch, tmp_path):
    """With the command and the environment of compose, the variable being unset there."""
    pytest.importorskip("gradio")
    ui = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["ui"]
    verb, *arguments = ui["command"]
    options = plain_options(verb, arguments, UI_OPTIONS)
    assert verb == "ui" and options["host"] == "0.0.0.0" and not options["password"]
    unset = {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in ui["environment"].items()}
    assert unset == {"MOCHI_TUNE_UI_PASSWORD": ""}
    for name, value in unset.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="lets other machines in"):
        run_ui(arguments)


def test_the_page_has_the_given_password_and_a_port_of_this_machine_alone():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert services["ui"]["environment"]["MOCHI_TUNE_UI_PASSWORD"].startswith("${MOCHI_TUNE_UI_PASSWORD:")
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {
        "ui": ["127.0.0.1:7860:7860"]
    }


def test_compose_needs_no_variable():
    """Compose fills in the whole file: a variable that one service needs would stop `build` and all others."""
    used = re.findall(r"\$\{(\w+)(:?[-?+]?)", (ROOT / "compose.yaml").read_text())
    assert used and all(operator == ":-" for _, operator in used)


def test_what_compose_mounts_is_made_in_the_image():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    targets = {volume.split(":")[1] for service in services for volume in service["volumes"]}
    for name in DOCKERFILES:
        made = next(rest for word, rest in instructions(name) if word == "RUN" and "useradd" in rest)
        assert targets <= set(made.split())
