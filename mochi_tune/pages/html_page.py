"""Common parts of the project's HTML pages: style, head, and screenshots."""

import base64
import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mochi_tune.errors import MochiTuneError

SCREEN_WIDTH, TIMEOUT_SECONDS = 1200, 60
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
# Maximum height of a screenshot in pixels: browsers draw no larger picture without a GPU.
MAX_PICTURE_HEIGHT = 16_000

STYLE = """
:root{color-scheme:light dark;--back:#fcfcfa;--ink:#1c2127;--soft:#626a75;--rule:#e3e4de;--accent:#0b6b94}
@media(prefers-color-scheme:dark){
:root{--back:#14171b;--ink:#e6e8ea;--soft:#98a0aa;--rule:#2c3138;--accent:#5dbde6}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1148px;padding:3.5rem 1.5rem 4rem;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{margin:0 0 .8rem;font-size:clamp(1.7rem,4.5vw,2.4rem);line-height:1.15;letter-spacing:-.02em}
h2{margin:0 0 .25rem;font-size:1.3rem;letter-spacing:-.01em}
h3{margin:0 0 .6rem;font-size:.95rem;font-weight:600}
p{margin:0;max-width:70ch;text-wrap:pretty}section{margin-top:3.2rem}.note{margin-bottom:1.4rem;color:var(--soft)}
.figures{display:grid;gap:1.8rem 2rem;margin:2.4rem 0 0;padding:1.8rem 0;border:solid var(--rule);border-width:1px 0;
grid-template-columns:repeat(auto-fit,minmax(max(8.5rem,100%/(var(--n) + .9)),1fr))}
.figures div{display:flex;flex-direction:column}.figures dd{margin:0}
.figures .value{order:-1;font-size:2.1rem;font-weight:600;line-height:1.2;letter-spacing:-.02em;color:var(--accent);
font-variant-numeric:tabular-nums}
.figures dt{font-weight:600;font-size:.95rem}.figures .meaning{color:var(--soft);font-size:.85rem;line-height:1.4}
figure{margin:0}
figcaption{margin-top:.4rem;color:var(--soft);font-size:.85rem;line-height:1.35}
.charts{display:grid;gap:2.5rem 1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
.charts figure{max-width:30rem}.charts h3{margin:0}
svg{display:block;width:100%;height:auto;margin-top:.5rem;font-size:11.5px;fill:var(--soft);
font-variant-numeric:tabular-nums}

"""


@dataclass(frozen=True)
class Head:
    """The top of a page.

    Attributes:
        title: title of the page.
        summary: one or two sentences.
        figures: label -> value as text, and its meaning.
        lead: HTML between the summary and the figures.
    """

    title: str
    summary: str
    figures: Mapping[str, tuple[str, str]]
    lead: str = ""


def document(head: Head, style: str, content: str) -> str:
    """Returns a self-contained page.

    Args:
        head: top of the page, as plain text.
        style: CSS besides `STYLE`.
        content: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(head.title)}</title><style>{STYLE}{style}</style></head>\n<body><header>"
        f"<h1>{escape(head.title)}</h1><p>{escape(head.summary)}</p>{head.lead}</header>\n"
        f"<main>{figures_list(head.figures)}\n"
        f"{content}</main></body></html>\n"
    )


def figures_list(figures: Mapping[str, tuple[str, str]]) -> str:
    """Returns figures as HTML: large values with their labels and meanings."""
    count = len(figures)
    listed = "".join(
        f'<div><dt>{escape(label)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="meaning">{escape(meaning)}</dd></div>'
        for label, (value, meaning) in figures.items()
    )
    return f'<dl class="figures" style="--n:{count if count <= 4 else math.ceil(count / 2)}">{listed}</dl>'


def section(heading: str, note: str, content: str) -> str:
    """Returns a section: a heading and a note, both plain text, and HTML content below."""
    return f'<section><h2>{escape(heading)}</h2><p class="note">{escape(note)}</p>{content}</section>'


def scrollable(label: str, content: str) -> str:
    """Returns HTML content in an area of class "scroll", which the keyboard reaches; its name is plain text."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def data_uri(kind: str, content: bytes) -> str:
    """Returns content as a data: URI of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_png(page: Path, png: Path) -> bool:
    """Writes a screenshot of a page, of at most its first 16,000 pixels, with the poster in place of each video.

    Args:
        page: self-contained HTML file.
        png: picture to write or replace; its folder exists.

    Returns:
        Whether the picture was written. It is not if neither Chromium nor Chrome is on the path.

    Raises:
        MochiTuneError: the browser fails, or runs for more than a minute.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return False
    # A packaged browser may not see the system's temporary folder.
    with tempfile.TemporaryDirectory(prefix="screenshot_", dir=png.parent) as scratch:
        still, shot = Path(scratch).resolve() / "still.html", Path(scratch).resolve() / "shot.png"
        measure = "addEventListener('load',()=>document.body.dataset.height=document.documentElement.offsetHeight)"
        text = re.sub(r'(<video\b[^>]*?) src="[^"]*"', r"\1", page.read_text(encoding="utf-8"))
        still.write_text(text.replace("</body>", f"<script>{measure}</script></body>"), encoding="utf-8")
        dom = _browse(browser, still, f"--window-size={SCREEN_WIDTH},1000", "--dump-dom")
        height = re.search(r'data-height="(\d+)"', dom)
        if height:
            shown = min(int(height[1]), MAX_PICTURE_HEIGHT)
            _browse(browser, still, f"--window-size={SCREEN_WIDTH},{shown}", f"--screenshot={shot}")
        if not shot.is_file():
            raise MochiTuneError(f"{browser} ended without a picture of {page}: open the page itself.")
        shot.replace(png)
    return True


def _browse(browser: str, page: Path, *arguments: str) -> str:
    """Runs the browser without a window and returns its output."""
    profile, output, errors = (page.parent / name for name in ("profile", "output", "errors"))
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    with open(output, "wb") as stdout, open(errors, "wb") as stderr:
        # The browser starts processes that may outlive it and write to the profile.
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            code = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            message = f"{browser} has not drawn the page in {TIMEOUT_SECONDS} seconds: open the page itself."
            raise MochiTuneError(message) from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        said = errors.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise MochiTuneError(f"{browser} ended with {code} ({said[0]}): open the page itself.")
    return output.read_text(encoding="utf-8")
