"""What is said while adapters are read and computed: notices, and bars of what takes long."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

BAR_DELAY = 2


def notify(text: str) -> None:
    """Writes a notice of one line to stderr, above any progress bar."""
    tqdm.write(f"mochi-tune: {' '.join(text.split())}", file=sys.stderr)


def layer_bar(what: str, names: Iterable[str]) -> Iterable[str]:
    """Yields each name once, with a progress bar if it takes longer than BAR_DELAY seconds and stderr is a terminal."""
    return tqdm(dict.fromkeys(names), what, unit="layer", leave=False, delay=BAR_DELAY, disable=None)
