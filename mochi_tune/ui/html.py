"""Pieces of HTML that several tabs share. All that comes from files or users is escaped here."""

import re
from html import escape
from pathlib import Path
from urllib.parse import quote

from mochi_tune.ui.folder import relative


def address(folder: Path, path: Path) -> str:
    """Returns the address of a file of the folder on this server; another one after each change of the file."""
    try:
        stamp = int(path.stat().st_mtime)
    except OSError:
        # It has vanished since it was listed: the server says so.
        stamp = 0
    return f"/files/{quote(relative(folder, path))}?v={stamp}"


def video(folder: Path, path: Path, poster: Path | None = None) -> str:
    """Returns a video with controls; before it is played it loads nothing where it has a poster, else its beginning."""
    picture = f' poster="{address(folder, poster)}"' if poster else ""
    preload = "none" if poster else "metadata"
    # Without a poster, the picture at a tenth of a second is what stands there.
    source = address(folder, path) + ("" if poster else "#t=0.1")
    shown = f'src="{source}" aria-label="{escape(path.stem, quote=True)}"'
    return f'<video controls loop muted playsinline preload="{preload}"{picture} {shown}></video>'


def note(text: str, kind: str = "quiet") -> str:
    """Returns a line; `kind` is quiet, good, warning or error."""
    role = ' role="alert"' if kind == "error" else ""
    return f'<p class="note {kind}"{role}>{_with_code(text)}</p>' if text else ""


def _with_code(text: str) -> str:
    """Returns a text as HTML, with what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def facts(text: str) -> str:
    """Returns facts in a line, of which sizes are not broken apart."""
    return escape(text).replace(" x ", "\u00a0x\u00a0")


def empty_state(title: str, text: str) -> str:
    """Returns what stands in the place of a list that is empty: what to do next."""
    return f'<div class="empty"><strong>{escape(title)}</strong><p>{_with_code(text)}</p></div>'


def log_lines(lines: list[str]) -> str:
    """Returns the end of a log."""
    return f'<pre class="log" tabindex="0" aria-label="log">{escape(chr(10).join(lines))}</pre>' if lines else ""
