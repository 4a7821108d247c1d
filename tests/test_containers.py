"""The files for containers name what exists. Docker itself is not asked."""

import re
from pathlib import Path

import pytest
import yaml

from mochi_tune.cli.options import UI_OPTIONS, plain_options

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


def test_the_page_listens_with_a_password_that_must_be_given():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    verb, *arguments = services["ui"]["command"]
    assert verb == "ui" and plain_options(verb, arguments, UI_OPTIONS)["host"] == "0.0.0.0"
    assert services["ui"]["environment"]["MOCHI_TUNE_UI_PASSWORD"].startswith("${MOCHI_TUNE_UI_PASSWORD:?")
    assert services["ui"]["ports"] == ["127.0.0.1:7860:7860"]


def test_what_compose_mounts_is_made_in_the_image():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    targets = {volume.split(":")[1] for service in services for volume in service["volumes"]}
    for name in DOCKERFILES:
        made = next(rest for word, rest in instructions(name) if word == "RUN" and "useradd" in rest)
        assert targets <= set(made.split())
