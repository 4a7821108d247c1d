"""Every command that a page shows survives being pasted into bash and into zsh.

zsh, and bash with failglob, refuse a word with an unquoted [, * or ? that matches no file.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Returns the commands of a page's code blocks and in its text."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.partition("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [
        " ".join(each.split())
        for each in (*lines, *inline)
        if re.match(r"(mochi-tune|sample|pip|srun|torchrun) ", each)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_survive_a_shell(page, tmp_path):
    for command in commands(page):
        # The words are made and nothing is run.
        script = f": {command}"
        done = subprocess.run(
            ["bash", "-O", "failglob", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and not done.stderr, f"{page.name}: {command}: {done.stderr}"
