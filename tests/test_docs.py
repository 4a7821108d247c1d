"""Links in the README and on the pages of docs lead to files and headings that exist; the library's example runs."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from mochi_tune.adapters.files import Adapter, LoraLayer, save_adapter
from mochi_tune.adapters.lora import linear_shapes, select_layers
from mochi_tune.config.load import load_config, weights_paths
from mochi_tune.sampling.video import read_frames
from mochi_tune.weights.folder import WeightsFolder

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def anchors(page: Path) -> set[str]:
    """Returns the names that links to a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"(?:\]\(|src=\")([^)\"]+)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / link).resolve() for link in links(ROOT / "README.md") if not link.startswith("https://")}
    assert {page.resolve() for page in PAGES} - linked == {(ROOT / "README.md").resolve()}


def test_the_site_lists_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    parts = [[part] if isinstance(part, str) else next(iter(part.values())) for part in site["nav"]]
    listed = [name for part in parts for name in part]
    made_when_built = {"index.md", "api.md", "changelog.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.name for page in (ROOT / "docs").glob("*.md")} | made_when_built


def test_the_code_that_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`(\w+/[\w/]+\.(?:py|yaml|json|md))(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, name in ((file, name) for file, name in named if "NAME" not in file):
        assert (ROOT / file).is_file(), file
        defined = rf"^(def|class) {name}\b|^{name}\b.*= "
        assert not name or re.search(defined, (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_every_room_is_on_the_page():
    rooms = re.findall(r"^\| \d \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    named = {name for room in rooms for name in re.findall(r"`([^`]+)`", room)}
    folders = {f"mochi_tune/{path.name}" for path in (ROOT / "mochi_tune").iterdir() if (path / "__init__.py").exists()}
    assert named == folders - {"mochi_tune/assets"} | {
        "recipes", "data_prep", "mochi_tune/errors.py", "mochi_tune/files.py",
    }  # fmt: skip


def test_the_code_of_the_library_page_runs(tmp_path):
    """As it stands, but for the files, and the number of frames and steps."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    config, generator = load_config("toy_lora", []), torch.Generator().manual_seed(0)
    shapes = linear_shapes(WeightsFolder(weights_paths(config)).dit_skeleton())
    layers = {
        name: LoraLayer(torch.randn(2, shapes[name][1], generator=generator), torch.ones(shapes[name][0], 2), 2.0)
        for name in select_layers(shapes, config.lora.targets)
    }
    save_adapter(tmp_path / "adapter.safetensors", Adapter(layers, {}))
    for old, new in (
        ('load_config("toy_lora", [])', 'load_config("toy_lora", ["sample.steps=2", "data.num_frames=7"])'),
        ("runs/toy_lora/adapter.safetensors", str(tmp_path / "adapter.safetensors")),
        ("circle.mp4", str(tmp_path / "circle.mp4")),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    names, base = {}, {}
    exec(compile(code, "page", "exec"), names)
    frames = read_frames(tmp_path / "circle.mp4")
    assert len(frames) == 7 and frames[0].size == (96, 64)
    exec(compile(code.replace("strength=1.0", "strength=0.0"), "page", "exec"), base)
    assert not torch.equal(names["latents"], base["latents"])
