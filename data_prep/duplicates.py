"""Finds clips that show the same: by the hashes of their pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mochi_tune.data_prep.clip_scores import NUM_SAMPLES

# Fewer pictures in common that have a hash tell nothing.
MIN_PICTURES = 4
NO_DISTANCE = 1.0


def find_nearest(hashes: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns for each clip the distance to the clip that is most like it: the share of bits that differ, 0 to 1.

    Args:
        hashes: of each clip, hex digits of eight pictures, or "".
    """
    names, bits, valid = _arrays(hashes)
    nearest = {}
    for number, name in enumerate(names):
        distances = _distances(bits, valid, number)
        distances[number] = NO_DISTANCE
        nearest[name] = round(float(distances.min()), 4)
    return nearest


def find_duplicates(hashes: Mapping[str, Sequence[str]], limit: float) -> dict[str, str]:
    """Returns of each clip that shows the same as a better one the name of that one.

    Args:
        hashes: of each clip, the best one first.
        limit: clips that differ in a smaller share of their bits show the same.
    """
    names, bits, valid = _arrays(hashes)
    duplicates: dict[str, str] = {}
    for number, name in enumerate(names):
        if name in duplicates:
            continue
        for other in np.flatnonzero(_distances(bits, valid, number) < limit):
            if other > number:
                duplicates.setdefault(names[other], name)
    return duplicates


def _arrays(hashes: Mapping[str, Sequence[str]]) -> tuple[list[str], Any, Any]:
    """Returns names, hashes as uint64 (clips, NUM_SAMPLES), and which of them are there."""
    bits = np.zeros((len(hashes), NUM_SAMPLES), np.uint64)
    valid = np.zeros((len(hashes), NUM_SAMPLES), bool)
    for row, values in enumerate(hashes.values()):
        # Of a clip of fewer pictures, or with black ones among them, the places do not compare.
        if len(values) == NUM_SAMPLES:
            bits[row] = [int(value or "0", 16) for value in values]
            valid[row] = [bool(value) for value in values]
    return list(hashes), bits, valid


def _distances(bits: Any, valid: Any, number: int) -> Any:
    """Returns the distance of each clip to one of them."""
    differing = np.bitwise_count(bits ^ bits[number])
    both = valid & valid[number]
    count = both.sum(1)
    shares = (differing * both).sum(1) / np.maximum(count, 1) / 64
    return np.where(count >= MIN_PICTURES, shares, NO_DISTANCE)
