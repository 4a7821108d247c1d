"""Finds clips that show the same: by the hashes of their pictures."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from mochi_tune.data_prep.clip_scores import NO_HASH, NUM_SAMPLES

# Fewer pictures in common that have a hash tell nothing.
MIN_PICTURES = 4
NO_DISTANCE = 1.0
# Clips that are nearer than this are compared at every shift in time: where much moves, a copy that begins later is no
# nearer. Clips that have nothing in common are at 0.5.
CANDIDATE = 0.35
# Of the shorter one, so much must be in both; and pictures, 0.1 s apart.
MIN_OVERLAP, MIN_SHIFTED_PICTURES = 0.5, 8


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


def find_duplicates(
    hashes: Mapping[str, Sequence[str]], limit: float, timelines: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Returns of each clip that shows the same as a better one the name of that one.

    Args:
        hashes: of each clip, the best one first.
        limit: clips that differ in a smaller share of their bits show the same.
        timelines: of each clip, as in `Scores`; by these a copy is found that begins earlier or later.
    """
    names, bits, valid = _arrays(hashes)
    duplicates: dict[str, str] = {}
    for number, name in enumerate(names):
        if name in duplicates:
            continue
        distances = _distances(bits, valid, number)
        for other in np.flatnonzero(distances < max(limit, CANDIDATE if timelines else 0)):
            if other <= number or names[other] in duplicates:
                continue
            if distances[other] < limit or shifted_distance(timelines[name], timelines[names[other]]) < limit:
                duplicates[names[other]] = name
    return duplicates


def shifted_distance(one: str, other: str) -> float:
    """Returns the share of bits in which two clips differ at the shift in time at which they differ least.

    Args:
        one: a timeline, as in `Scores`.
        other: of another clip.
    """
    (bits, valid), (other_bits, other_valid) = _read_timeline(one), _read_timeline(other)
    shorter = min(len(bits), len(other_bits))
    least, needed = NO_DISTANCE, max(MIN_SHIFTED_PICTURES, -int(-shorter * MIN_OVERLAP // 1))
    for shift in range(needed - len(other_bits), len(bits) - needed + 1):
        start, end = max(shift, 0), min(shift + len(other_bits), len(bits))
        ours, theirs = slice(start, end), slice(start - shift, end - shift)
        both = valid[ours] & other_valid[theirs]
        if (count := int(both.sum())) >= needed:
            differing = np.bitwise_count(bits[ours] ^ other_bits[theirs])
            least = min(least, int((differing * both).sum()) / count / 64)
    return least


def _read_timeline(timeline: str) -> tuple[Any, Any]:
    """Returns the hashes of a timeline as uint64, and which of them are there."""
    each = [timeline[i : i + len(NO_HASH)] for i in range(0, len(timeline), len(NO_HASH))]
    valid = np.array([value != NO_HASH for value in each], bool)
    return np.array([int(value, 16) if value != NO_HASH else 0 for value in each], np.uint64), valid


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
