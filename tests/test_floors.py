"""Imports run downward only, and importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import rooms of lower floors; its own files may import each other.
FLOORS = {
    **dict.fromkeys(("cli", "ui"), 7),
    **dict.fromkeys(("recipes", "toy"), 6),
    **dict.fromkeys(("training",), 5),
    **dict.fromkeys(("sampling", "data_prep"), 4),
    **dict.fromkeys(("config", "weights", "data", "parallel"), 3),
    **dict.fromkeys(("models", "adapters", "pages"), 2),
    **dict.fromkeys(("errors", "files", "assets", "conf"), 1),
}
# The order of rooms that share a floor, where there is one: the first may import the second.
ORDER = {("cli", "ui"), ("toy", "recipes"), ("config", "data"), ("config", "weights"), ("files", "errors")}
FILES = sorted(p for folder in ("mochi_tune", "recipes", "data_prep") for p in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "mochi_tune" else ("mochi_tune", *parts)).removesuffix(".__init__")


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from mochi_tune import conf` is an import of the room conf.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= set(names) if node.module == "mochi_tune" else {node.module}
    return found


@pytest.mark.parametrize("path", [p for p in FILES if room_of(module_name(p))], ids=module_name)
def test_imports_run_downward(path):
    here = room_of(module_name(path))
    for module in {name for name in imports(path) if name.startswith("mochi_tune.")}:
        there = room_of(module)
        allowed = there == here or FLOORS[there] < FLOORS[here] or (here, there) in ORDER
        assert allowed, f"{module_name(path)} (floor {FLOORS[here]}) must not import {module} (floor {FLOORS[there]})"


def test_the_top_of_the_package_holds_rooms():
    entries = {p.name for p in (ROOT / "mochi_tune").iterdir() if p.name != "__pycache__"}
    assert {name for name in entries if name.endswith(".py")} == {"__init__.py", "errors.py", "files.py"}
    # py.typed says to type checkers that the package has type hints.
    assert {name for name in entries if not name.endswith(".py")} <= FLOORS.keys() | {"py.typed"}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(module_name(p)) == "models"], ids=module_name)
def test_models_are_pure_torch(path):
    for name in imports(path):
        top = name.partition(".")[0]
        allowed = top in sys.stdlib_module_names or top in ("torch", "mochi_tune")
        own = path.name == "text_encoder.py" and top == "transformers"
        own |= path.name.endswith("_kernels.py") and top == "triton"
        assert allowed or own, f"{path} imports {name}"


def test_only_the_command_line_prints_and_reads_the_environment():
    for path in [p for p in FILES if room_of(module_name(p)) != "cli"]:
        tree = ast.parse(path.read_text())
        prints = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        environment = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")]
        assert not (prints or environment), path


def test_only_the_page_imports_gradio():
    """The verb `ui` imports the page when it runs, so that no other verb waits for gradio or needs it."""
    for path in FILES:
        if room_of(module_name(path)) != "ui":
            assert not {name.partition(".")[0] for name in imports(path)} & {"gradio", "gradio_client"}, path
        if room_of(module_name(path)) == "cli":
            at_import = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
            assert not [node for node in at_import if node.module and node.module.startswith("mochi_tune.ui")], path


def test_no_file_is_long():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_config_leaves_its_floor_alone():
    """Below the stories, of which two are in data_prep, only the preflight of a training takes the whole RunConfig."""
    stories = {"mochi_tune.training.preflight", "mochi_tune.data_prep.prepare", "mochi_tune.data_prep.inspect_data"}
    for path in [p for p in FILES if FLOORS.get(room_of(module_name(p)), 6) <= 5]:
        if room_of(module_name(path)) != "config" and module_name(path) not in stories:
            names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
            assert "RunConfig" not in names, path


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("mochi_tune.models.dit", ("peft", "hydra", "transformers", "accelerate", "datasets", "diffusers")),
        ("mochi_tune.cli.main", ("torch", "hydra", "transformers")),
        ("mochi_tune.config.load", ("torch", "hydra", "transformers")),
        ("mochi_tune.recipes.verify", ("decord", "datasets", "av", "deepspeed", "hydra")),
        ("mochi_tune.recipes.bench", ("decord", "datasets", "av", "deepspeed", "hydra")),
        ("mochi_tune.recipes.gpu_check", ("torch", "decord", "datasets", "av", "deepspeed")),
    ],
)
def test_importing_brings_in_only_what_is_needed(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
