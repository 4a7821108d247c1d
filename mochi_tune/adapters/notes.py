"""Notices about adapters that are used nevertheless."""

import sys

from tqdm import tqdm


def notify(text: str) -> None:
    """Writes a notice of one line to stderr, above any progress bar."""
    tqdm.write(f"mochi-tune: {' '.join(text.split())}", file=sys.stderr)
