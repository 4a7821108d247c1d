"""What the site needs beside the pages of docs: its first page, the changes, and links that leave docs.

The README is the first page and CHANGELOG.md the last one. Both stay where GitHub shows them, so their links are
rewritten here. A link to a file outside docs has no page on the site, and becomes its name.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)]+)\)")


def on_files(files, config):
    """Adds the README, the changelog and the page of the API, which is made of the rooms' docstrings."""
    for name, text in {
        "index.md": from_the_root((ROOT / "README.md").read_text()),
        "changelog.md": from_the_root((ROOT / "CHANGELOG.md").read_text()),
        "api.md": api_page(),
    }.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links that leave docs into what the site has, and the others into plain names."""
    if page.file.src_uri == "settings.md":
        markdown = markdown.replace("[/FILE][@REVISION]", r"\[/FILE\]\[@REVISION\]")  # which is no link
    return OUTSIDE.sub(lambda link: inside(link[1], link[2]), markdown)


def from_the_root(markdown: str) -> str:
    """Returns a page of the repository's root with links as a page of docs has them."""
    markdown = re.sub(r'(\]\(|src=")docs/', r"\1", markdown)
    return re.sub(r"\]\(((?:conf|recipes|mochi_tune)/[^)]+|[A-Z]\w+\.md[^)]*)\)", r"](../\1)", markdown)


def inside(words: str, target: str) -> str:
    """Returns a link to the site's page of a file outside docs, or its words alone where it has none."""
    name, _, anchor = target.partition("#")
    page = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}.get(name)
    return f"[{words}]({page}{'#' + anchor if anchor else ''})" if page else f"`{words.strip('`')}`"


def api_page() -> str:
    """Returns the page of the functions that a program may call; mkdocstrings fills it in."""
    rooms = {
        "Settings": ["config.load"],
        "Models": [
            *("models.dit", "models.vae", "models.vae_streaming", "models.text_encoder"),
            *("models.latents", "models.device"),
        ],
        "Adapters": ["adapters.files", "adapters.lora", "adapters.layers", "adapters.tools"],
        "Objective and draws": ["training.objective", "training.draws"],
        "Optimizers": ["training.optim"],
        "Sampling": ["sampling.requests", "sampling.sampler", "sampling.render", "sampling.video"],
        "Data": ["data.cache", "data.dataset", "data.buckets"],
        "Weights": ["weights.folder"],
        "Errors": ["errors"],
    }
    head = "# API\n\nMade of the docstrings of the modules that a program of your own may import.\n"
    parts = [
        f"\n## {title}\n\n" + "\n".join(f"::: mochi_tune.{module}\n" for module in modules)
        for title, modules in rooms.items()
    ]
    return head + "".join(parts)
