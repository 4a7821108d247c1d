"""Imports run downward only, and importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What a file may use on its own floor: one room in several files, and the objective the latent spaces.
ONE_ROOM = {
    "mochi_tune.config": {"mochi_tune.settings", "mochi_tune.lora_config", "mochi_tune.config_checks"},
    "mochi_tune.config_checks": {"mochi_tune.settings", "mochi_tune.lora_config"},
    "mochi_tune.lora_config": {"mochi_tune.settings"},
    "mochi_tune.job": {"mochi_tune.settings", "mochi_tune.config", "mochi_tune.lora_config"},
    "mochi_tune.requests": {"mochi_tune.settings", "mochi_tune.config", "mochi_tune.config_checks"},
    "mochi_tune.cli": {"mochi_tune.launch", "mochi_tune.options", "mochi_tune.streams"},
    "mochi_tune.adapters": {"mochi_tune.adapter_reading", "mochi_tune.adapter_alphas"},
    "mochi_tune.adapter_reading": {"mochi_tune.adapter_alphas"},
    "mochi_tune.weights": {"mochi_tune.weight_maps", "mochi_tune.weight_configs"},
    "mochi_tune.flow": {"mochi_tune.models", "mochi_tune.models.latents"},
    "mochi_tune.flops": {"mochi_tune.models", "mochi_tune.models.dit", "mochi_tune.models.layers"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "mochi_tune" else ("mochi_tune", *parts)).removesuffix(".__init__")


def floor(module: str) -> int:
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else ""
    if room in ("", "errors", "files", "assets", "conf"):
        return 0
    if room in ("models", "flow", "flops"):
        return 1
    fourth = ("settings", "config", "config_checks", "lora_config", "job", "requests", "rendering", "toy")
    floors = {"training": 3} | dict.fromkeys(fourth, 4)
    floors |= {"recipes": 5, "data_prep": 5, "launch": 6, "options": 6, "streams": 6, "cli": 6}
    return floors.get(room, 2)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    # A name imported from a module is no module of its own.
    return {name for name in found if not any(other != name and name == f"{other}.{name.rpartition('.')[2]}" and
            not is_module(name) for other in found)}  # fmt: skip


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    top = ROOT / name.removeprefix("mochi_tune.").replace(".", "/")
    return any(p.with_suffix(".py").exists() or p.is_dir() for p in (path, top))


FILES = sorted(p for folder in ("mochi_tune", "recipes", "data_prep") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downward(path):
    here = module_name(path)
    for module in {name for name in imports(path) if name.startswith("mochi_tune.") and is_module(name)}:
        mine, theirs = floor(here), floor(module)
        same_folder = here.split(".")[1] == module.split(".")[1] and here.split(".")[1] != "recipes"
        allowed = theirs < mine or same_folder or module in ONE_ROOM.get(here, ())
        assert allowed, f"{here} (floor {mine}) must not import {module} (floor {theirs})"


@pytest.mark.parametrize("path", [p for p in FILES if floor(module_name(p)) == 1], ids=module_name)
def test_models_are_pure_torch(path):
    for name in imports(path):
        top = name.partition(".")[0]
        allowed = top in sys.stdlib_module_names or top in ("torch", "mochi_tune")
        assert allowed or (path.name == "text_encoder.py" and top == "transformers"), f"{path} imports {name}"


def test_only_the_command_line_prints_and_reads_the_environment():
    for path in FILES:
        tree = ast.parse(path.read_text())
        prints = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        environment = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")]
        assert path.name in ("cli.py", "launch.py", "options.py") or not (prints or environment), path


def test_no_file_is_long():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("mochi_tune.models.dit", ("peft", "hydra", "transformers", "accelerate", "datasets", "diffusers")),
        ("mochi_tune.cli", ("torch", "hydra", "transformers")),
        ("mochi_tune.config", ("torch", "hydra", "transformers")),
        ("mochi_tune.recipes.verify", ("decord", "datasets", "av", "deepspeed", "hydra")),
        ("mochi_tune.recipes.bench", ("decord", "datasets", "av", "deepspeed", "hydra")),
    ],
)
def test_importing_brings_in_only_what_is_needed(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
