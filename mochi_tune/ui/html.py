"""Pieces of HTML that several tabs share. They escape all text from files and users."""

import re
from html import escape
from pathlib import Path
from urllib.parse import quote

from mochi_tune.ui.folder import relative


def address(folder: Path, path: Path) -> str:
    """Returns the URL of a file on this server, which changes with the modification time of the file."""
    try:
        stamp = int(path.stat().st_mtime)
    except OSError:
        # The file has vanished since it was listed; the server reports that.
        stamp = 0
    return f"/files/{quote(relative(folder, path))}?v={stamp}"


def video(folder: Path, path: Path, poster: Path | None = None) -> str:
    """Returns a video with controls. Before it is played, it loads nothing if it has a poster, else its metadata."""
    picture = f' poster="{address(folder, poster)}"' if poster else ""
    preload = "none" if poster else "metadata"
    # Without a poster, the browser shows the picture at 0.1 seconds.
    source = address(folder, path) + ("" if poster else "#t=0.1")
    shown = f'src="{source}" aria-label="{escape(path.stem, quote=True)}"'
    return f'<video controls loop muted playsinline preload="{preload}"{picture} {shown}></video>'


def note(text: str, kind: str = "quiet") -> str:
    """Returns a line of text, "" for no text; `kind` is quiet, good, warning or error."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<p class="note {kind}"{role}>{_with_code(text)}</p>' if text else ""


def _with_code(text: str) -> str:
    """Returns a text as HTML, with code for text between backticks."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def facts(text: str) -> str:
    """Returns a line of facts in which sizes such as 848 x 480 do not wrap."""
    return escape(text).replace(" x ", "\u00a0x\u00a0")


def empty_state(title: str, text: str) -> str:
    """Returns the placeholder of an empty list, which says what to do next."""
    return f'<div class="empty"><strong>{escape(title)}</strong><p>{_with_code(text)}</p></div>'


def log_lines(lines: list[str]) -> str:
    """Returns the end of a log."""
    return f'<pre class="log" tabindex="0" aria-label="log">{escape(chr(10).join(lines))}</pre>' if lines else ""
