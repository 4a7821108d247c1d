"""Every command that a page shows survives being pasted into bash and into zsh.

zsh, and bash with failglob, refuse a word with an unquoted [, * or ? that matches no file.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Returns the commands of a page's code blocks and in its text."""
    text = page.read_text()
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if language in ("", "bash", "sh")]
    lines = [line.partition("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [
        " ".join(each.split())
        for each in (*lines, *inline)
        if re.match(r"(mochi-tune|sample|pip|srun|torchrun) ", each)
    ]


def refusals(shell: list[str], page: Path, folder: Path) -> str:
    """Returns what a shell says of a page's commands; their words are made and nothing is run."""
    # Each is read by itself, as a shell reads what is pasted, and not within a larger script.
    lines = "".join(
        f"eval {shlex.quote(f': {command}')} || echo {shlex.quote(command)} >&2\n" for command in commands(page)
    )
    done = subprocess.run([*shell, "-c", lines], cwd=folder, capture_output=True, text=True, check=False)
    return done.stderr


def test_lists_and_mappings_are_quoted_wherever_a_setting_is_shown():
    """A shell would eat the quotes within them, or take the spaces in them for ends of words."""
    for page in PAGES:
        # The help texts that settings.md is made of name values, and not words of a command.
        if page.name != "settings.md":
            assert not re.findall(r"`[\w.]+=[\[{][^`]*`", page.read_text()), page.name
            assert not [each for each in commands(page) if re.search(r" [\w.]+=[\[{]", each)], page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_survive_a_shell(page, tmp_path):
    assert not refusals(["bash", "-O", "failglob"], page, tmp_path)
    if shutil.which("zsh"):  # Which CI installs.
        assert not refusals(["zsh", "-f"], page, tmp_path)
