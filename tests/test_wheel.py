"""A wheel holds all that mochi-tune needs, and its first commands run from it in an empty folder."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Builds the wheel from a copy of what git would ship, so that the working tree stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("mochi_tune", "recipes", "data_prep", "conf"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Returns the Python of a new environment with the wheel, which sees this environment's other packages.

    A line of a .pth file adds a folder alone, and not what .pth files in it add: so not the working tree.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    return folder / "bin" / "python"


def run(python: Path, cwd: Path, *arguments: str) -> str:
    """Runs the new environment's Python and returns its stdout."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, *arguments], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    installed_as = {"mochi_tune": "mochi_tune"} | {
        name: f"mochi_tune/{name}" for name in ("recipes", "data_prep", "conf")
    }
    here = {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in installed_as.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert here - held == set(), "not in the wheel"
    assert held - here == set(), "in the wheel alone"


def test_the_first_commands_run_in_an_empty_folder(python, tmp_path):
    where = run(python, tmp_path, "-c", "import mochi_tune; print(mochi_tune.__file__)")
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    assert "mochi-tune prepare" in run(python, tmp_path, "-m", "mochi_tune.cli", "--help")
    run(python, tmp_path, "-m", "mochi_tune.cli", "init", "first")
    assert (tmp_path / "conf" / "first.yaml").is_file() and (tmp_path / "videos").is_dir()
    assert "name: first" in run(python, tmp_path, "-m", "mochi_tune.cli", "train", "conf=first", "--cfg")
    assert "out=" in run(python, tmp_path, "-m", "mochi_tune.cli", "demo", "--help")


def test_the_wheel_renders_with_the_models_that_it_holds(python, tmp_path):
    sample = "sample conf=toy_lora model=tiny adapter=none prompt=x steps=1 num_frames=1 height=16 width=16 out=x.png"
    run(python, tmp_path, "-m", "mochi_tune.cli", *sample.split())
    assert (tmp_path / "x.png").is_file()
