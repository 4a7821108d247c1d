"""The first start is short: nothing heavy is imported for it, and what an extra brings is asked for by name."""

import json
import subprocess
import sys

import pytest

from mochi_tune.cli.main import run
from mochi_tune.config.schema import LogConfig
from mochi_tune.data_prep.decord_frames import check_decord
from mochi_tune.data_prep.ray_pool import RayPool
from mochi_tune.data_prep.scenes import check_scenedetect
from mochi_tune.errors import ConfigError
from mochi_tune.recipes.doctor import EXTRAS
from mochi_tune.training.accelerator import check_deepspeed
from mochi_tune.training.optim import check_installed
from mochi_tune.training.trackers import check_trackers

HEAVY = """torch numpy datasets wandb deepspeed gradio transformers peft accelerate hydra av tensorboard ray diffusers
huggingface_hub PIL pandas pyarrow scipy safetensors bitsandbytes trackio decord torchao""".split()
# What the command line's main does, with the names of what is imported by then as the last line.
MAIN = """
import json, sys
from mochi_tune.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("\\n" + json.dumps([name for name in sys.modules if "." not in name]))
"""


def imported(code: str, *arguments: str) -> set[str]:
    command = [sys.executable, "-c", code, *arguments]
    return set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))


def test_the_package_imports_nothing():
    names = imported("import json, sys, mochi_tune; print(json.dumps(list(sys.modules)))")
    assert "mochi_tune" in names and not names & {*HEAVY, "pydantic"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["verify", "--help"], ["completion", "bash"]])
def test_help_imports_nothing_heavy(arguments):
    names = imported(MAIN, *arguments)
    assert "mochi_tune" in names and not names & set(HEAVY)
    # The schema is made of it.
    assert arguments != ["--help"] or "pydantic" not in names


def enter_ray():
    with RayPool(None, 1, None):  # pyright: ignore[reportArgumentType]
        pass


@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ("bitsandbytes", lambda: check_installed("adamw_8bit")),
        ("trackio", lambda: check_trackers(LogConfig(trackio=True))),
        ("footage", check_scenedetect),
        ("ray", enter_ray),
        ("ui", lambda: run(["ui"])),
    ],
)
def test_an_extra_that_is_missing_is_named_with_its_command(monkeypatch, extra, use):
    for name in EXTRAS[extra][0]:
        # As Python has it: such a module is not there.
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install ['\"]mochi-tune\[{extra}\]['\"]\.$"):
        use()


@pytest.mark.parametrize(
    ("name", "use", "named"),
    [
        ("decord", check_decord, r"data.decoder=decord needs decord, .*: use data.decoder=auto"),
        ("deepspeed", lambda: check_deepspeed("zero2"), r"parallel.strategy=zero2 needs deepspeed, .* parallel=data"),
    ],
)
def test_a_package_that_one_setting_needs_is_named_if_it_is_missing(monkeypatch, name, use, named):
    use()
    check_deepspeed("data")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=named):
        use()


def test_every_extra_is_asked_for():
    [mark] = test_an_extra_that_is_missing_is_named_with_its_command.pytestmark
    assert {extra for extra, _ in mark.args[1]} == EXTRAS.keys()
