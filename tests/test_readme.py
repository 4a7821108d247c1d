"""The commands and settings that the README and the pages of docs show are real."""

import re
import shlex
from pathlib import Path

import pytest
from helpers_process import run

from mochi_tune.cli.lora import parse
from mochi_tune.cli.options import (
    BENCH_OPTIONS,
    DESCRIBE_OPTIONS,
    DOCTOR_OPTIONS,
    EXPERIMENT_OPTIONS,
    EXPORT_OPTIONS,
    FILTER_OPTIONS,
    PULL_OPTIONS,
    SPLIT_OPTIONS,
    TOY_OPTIONS,
    VERIFY_OPTIONS,
    load,
    plain_options,
)
from mochi_tune.config.load import load_config
from mochi_tune.parallel.forecast import GIB
from mochi_tune.recipes.plan import main as plan

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OPTIONS = {
    "bench": BENCH_OPTIONS,
    "describe": DESCRIBE_OPTIONS,
    "doctor": DOCTOR_OPTIONS,
    "experiment": EXPERIMENT_OPTIONS,
    "export": EXPORT_OPTIONS,
    "filter": FILTER_OPTIONS,
    "split": SPLIT_OPTIONS,
    "verify": VERIFY_OPTIONS,
}
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_there_are_two_commands_of_set_up_and_the_verbs():
    assert [c for c in COMMANDS if c.startswith("make")] == ["make demo", "make test"]
    verbs = [c.split()[1] for c in COMMANDS if c.startswith("mochi-tune")]
    assert verbs == ["weights", "inspect", "prepare", "train", "sample", "export"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("mochi-tune")])
def test_every_command_is_understood(command, tmp_path):
    """Settings are composed and checked; the rest of each command is run by the tests of its story."""
    arguments = shlex.split(command)[1:]
    if arguments[0] in ("inspect", "prepare", "train", "sample"):
        arguments.append("--cfg")
    elif arguments[0] == "weights":
        arguments.append("--help")
    done = run(*arguments, cwd=tmp_path)
    if arguments[0] == "export":
        assert done.returncode == 2 and "runs/my_lora/adapter.safetensors" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def commands_of(page: Path) -> list[list[str]]:
    """Returns the arguments of each `mochi-tune` command in a page's code blocks, without torchrun or srun."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if not language]
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.replace("-m mochi_tune.cli", "mochi-tune") for line in lines]
    commands = [re.sub(r"^(torchrun|srun) .*?(?=mochi-tune)", "", line) for line in lines if "mochi-tune" in line]
    return [shlex.split(command)[1:] for command in commands]


def test_the_commands_of_the_docs_are_found():
    assert sum(len(commands_of(page)) for page in PAGES) >= 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_docs_are_understood(page):
    for verb, *arguments in commands_of(page):
        if verb in ("inspect", "prepare", "train", "sample"):
            load(verb, [*arguments, "--cfg"])
        elif verb == "plan":
            load(verb, [a for a in arguments if not a.startswith("card")] + ["--cfg"])
        elif verb == "replay":
            assert Path(arguments[0]).parent.name == "bundles"
        elif verb == "lora":
            assert parse(arguments[0], arguments[1:])
        elif verb == "init":
            assert len(arguments) == 1 and arguments[0].isidentifier()
        elif verb == "toy":
            assert plain_options(verb, arguments[1:], TOY_OPTIONS[arguments[0]])
        elif verb == "weights":
            if arguments[0] == "check":
                load_config("base", arguments[1:])
            else:
                assert arguments[0] == "pull" and plain_options(verb, arguments[1:], PULL_OPTIONS)
        else:
            assert plain_options(verb, arguments, OPTIONS[verb])


def test_the_table_of_cards_is_what_the_plan_says():
    rows = re.findall(r"^\| \d+ GB \((\w+)\) \| ([\d.]+), ([\d.]+) \| ([\d.]+), ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for card, *figures in rows:
        stages = plan(
            load_config("my_lora", ["memory=auto", "data.videos=none", "data.cache=none"]), card.lower()
        ).stages
        train, denoise = (
            next(stage for stage in stages if stage.name == name) for name in ("train", "sample: denoise")
        )
        largest = max(stage.total for stage in stages if stage.name.startswith("sample"))
        planned = [train.total / GIB - 1, train.seconds, largest / GIB - 1, denoise.seconds]
        places = [len(figure.partition(".")[2]) for figure in figures]
        assert figures == [f"{each:.{place}f}" for each, place in zip(planned, places, strict=True)], card


def test_the_settings_it_names_exist():
    from mochi_tune.config.load import SAMPLE_ALIASES
    from mochi_tune.config.settings import known_keys

    keys = {*known_keys(), *SAMPLE_ALIASES, "conf", "model", "lora", "to", "reference", "dtype", "device", "prompt"}
    for page in [ROOT / "README.md", *PAGES]:
        for key in re.findall(
            r"`((?:data|train|lora|sample|parallel|memory|log|publish)\.[a-z0-9_]+)", page.read_text()
        ):
            assert key in keys, f"{page.name}: {key}"
