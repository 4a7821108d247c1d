"""Links in the README and on the pages of docs lead to files and headings that exist."""

import re
from pathlib import Path

import pytest
import yaml

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
