"""The README's commands and links are real."""

import re
import shlex
from pathlib import Path

import pytest
from helpers_process import run

from mochi_tune.cli.main import load
from mochi_tune.cli.options import BENCH_OPTIONS, plain_options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_there_are_two_commands_of_set_up_and_the_verbs():
    assert [c for c in COMMANDS if c.startswith("make")] == ["make demo", "make test"]
    verbs = [c.split()[1] for c in COMMANDS if c.startswith("mochi-tune")]
    assert verbs == ["weights", "prepare", "train", "sample", "export"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("mochi-tune")])
def test_every_command_is_understood(command, tmp_path):
    """Settings are composed and checked; the rest of each command is run by the tests of its story."""
    arguments = shlex.split(command)[1:]
    if arguments[0] in ("prepare", "train", "sample"):
        arguments.append("--cfg")
    elif arguments[0] == "weights":
        arguments.append("--help")
    done = run(*arguments, cwd=tmp_path)
    if arguments[0] == "export":
        assert done.returncode == 2 and "runs/my_lora/adapter.safetensors" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["sampling.md", "benchmarks.md", "training.md"])
def test_the_commands_of_the_docs_are_understood(page, tmp_path):
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.replace("-m mochi_tune.cli", "mochi-tune") for line in lines]
    commands = [re.sub(r"^(torchrun|srun) .*?(?=mochi-tune)", "", line) for line in lines if "mochi-tune" in line]
    assert len(commands) >= 3
    for command in commands:
        arguments = shlex.split(command)[1:]
        if arguments[0] in ("sample", "train"):
            load(arguments[0], [*arguments[1:], "--cfg"])
        elif arguments[0] == "replay":
            assert Path(arguments[1]).parent.name == "bundles"
        else:
            assert plain_options("bench", arguments[1:], BENCH_OPTIONS)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("sampling", "training", "benchmarks", "toy", "reliability"))]
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_the_settings_it_names_exist():
    from mochi_tune.config.load import SAMPLE_ALIASES
    from mochi_tune.config.schema import known_keys

    keys = {*known_keys(), *SAMPLE_ALIASES, "conf", "model", "lora", "to", "reference", "dtype", "device", "prompt"}
    for key in re.findall(r"`((?:data|train|lora|sample|parallel|memory|log)\.[a-z_]+)", README):
        assert key in keys, key
