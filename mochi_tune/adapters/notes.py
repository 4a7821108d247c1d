"""What the user should know of an adapter that is used, and is no reason to refuse it."""

import sys

from tqdm import tqdm


def tell(text: str) -> None:
    """Writes a line to stderr, above a progress bar."""
    tqdm.write(f"mochi-tune: {' '.join(text.split())}", file=sys.stderr)
