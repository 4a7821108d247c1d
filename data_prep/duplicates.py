"""Finds clips that show the same: by the hashes of their pictures."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from tqdm import tqdm

from mochi_tune.data_prep.clip_scores import NO_HASH, NUM_SAMPLES

# Fewer pictures in common that have a hash tell nothing.
MIN_PICTURES = 4
NO_DISTANCE = 1.0
# Clips that are nearer than this are compared at every shift in time: where much moves, a copy that begins later is no
# nearer. Clips that have nothing in common are at 0.5.
CANDIDATE = 0.35
# Of the shorter one, so much must be in both; and pictures, 0.1 s apart.
MIN_OVERLAP, MIN_SHIFTED_PICTURES = 0.5, 8
# Pictures of clips that one clip is compared with at once: some 2 MiB, which a processor's cache holds.
BLOCK_PICTURES = 2**16
# Seconds before a bar is drawn: every clip is compared with every other one, which is quick for some thousand.
BAR_DELAY = 1


def find_nearest(hashes: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns for each clip the distance to the clip that is most like it: the share of bits that differ, 0 to 1.

    Args:
        hashes: of each clip, hex digits of eight pictures, or "".
    """
    bits, valid = _arrays(hashes)
    nearest = np.full(len(hashes), NO_DISTANCE)
    for number in tqdm(range(len(hashes) - 1), desc="nearest", unit="clip", delay=BAR_DELAY):
        # A distance is one of both clips.
        distances = _distances_to_later(bits, valid, number)
        nearest[number] = min(nearest[number], distances.min())
        np.minimum(nearest[number + 1 :], distances, out=nearest[number + 1 :])
    return {name: round(float(distance), 4) for name, distance in zip(hashes, nearest, strict=True)}


def find_duplicates(
    hashes: Mapping[str, Sequence[str]], limit: float, timelines: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Returns of each clip that shows the same as a better one the name of that one.

    Args:
        hashes: of each clip, the best one first.
        limit: clips that differ in a smaller share of their bits show the same.
        timelines: of each clip, as in `Scores`; by these a copy is found that begins earlier or later.
    """
    names, (bits, valid) = list(hashes), _arrays(hashes)
    films = _Timelines(timelines[name] for name in names) if timelines else None
    # Of each clip the number of the better one, or -1.
    better = np.full(len(names), -1)
    for number in tqdm(range(len(names) - 1), desc="duplicates", unit="clip", delay=BAR_DELAY):
        if better[number] >= 0:
            continue
        distances, free = _distances_to_later(bits, valid, number), better[number + 1 :] < 0
        same = free & (distances < limit)
        better[number + 1 :][same] = number
        if films is not None:
            others = np.flatnonzero(free & ~same & (distances < CANDIDATE)) + number + 1
            better[others[films.distances(number, others) < limit]] = number
    # In the order in which they were found: those of the best clip first.
    found = sorted(np.flatnonzero(better >= 0).tolist(), key=better.__getitem__)
    return {names[number]: names[better[number]] for number in found}


def shifted_distance(one: str, other: str) -> float:
    """Returns the share of bits in which two clips differ at the shift in time at which they differ least.

    Args:
        one: a timeline, as in `Scores`.
        other: of another clip.
    """
    return float(_Timelines([one, other]).distances(0, np.array([1]))[0])


class _Timelines:
    """The hashes of many timelines, one clip's after the other's.

    Args:
        timelines: as in `Scores`.
    """

    def __init__(self, timelines: Iterable[str]) -> None:
        # The last hash, which is none, stands for those that a shorter clip lacks.
        each = [*map(_read_timeline, timelines), _read_timeline(NO_HASH)]
        self._bits, self._valid = (np.concatenate(arrays) for arrays in zip(*each, strict=True))
        self._lengths = np.array([len(bits) for bits, _ in each])
        self._starts = np.cumsum(self._lengths) - self._lengths

    def distances(self, clip: int, others: Any) -> Any:
        """Returns the share of bits in which a clip differs from others at the shift at which they differ least.

        Args:
            clip: its number.
            others: numbers of clips, (clips,).
        """
        found = np.full(len(others), NO_DISTANCE)
        lengths = self._lengths[others]
        # Clips of one length come together, so that few places of a block are empty.
        order = np.argsort(lengths, kind="stable")
        num_blocks = -(-len(others) * int(lengths.max(initial=0)) // BLOCK_PICTURES)
        for block in np.array_split(order, max(num_blocks, 1)):
            found[block] = self._distances(clip, others[block])
        return found

    def _distances(self, clip: int, others: Any) -> Any:
        start, length = int(self._starts[clip]), int(self._lengths[clip])
        lengths = self._lengths[others]
        longest = int(lengths.max(initial=0))
        # From the last picture to the first one, as (pictures, clips): then a picture of ours meets a shift a row.
        places = np.arange(longest)[::-1, None]
        places = np.where(places < lengths, self._starts[others] + places, len(self._bits) - 1)
        theirs, there = self._bits[places], self._valid[places].view(np.uint8)
        # By shift: bits that differ, and pictures that have a hash in both.
        differing = np.zeros((length + longest, len(others)), np.uint32)
        count = np.zeros_like(differing)
        for number in np.flatnonzero(self._valid[start : start + length]):
            differing[number : number + longest] += np.bitwise_count(theirs ^ self._bits[start + number]) * there
            count[number : number + longest] += there
        needed = np.maximum(MIN_SHIFTED_PICTURES, np.ceil(np.minimum(length, lengths) * MIN_OVERLAP))
        shares = differing / np.maximum(count, 1) / 64
        return np.where(count >= needed, shares, NO_DISTANCE).min(0, initial=NO_DISTANCE)


def _read_timeline(timeline: str) -> tuple[Any, Any]:
    """Returns the hashes of a timeline as uint64, and which of them are there."""
    each = [timeline[i : i + len(NO_HASH)] for i in range(0, len(timeline), len(NO_HASH))]
    valid = np.array([value != NO_HASH for value in each], bool)
    return np.array([int(value, 16) if value != NO_HASH else 0 for value in each], np.uint64), valid


def _arrays(hashes: Mapping[str, Sequence[str]]) -> tuple[Any, Any]:
    """Returns hashes as uint64 (NUM_SAMPLES, clips), and which of them are there."""
    bits = np.zeros((NUM_SAMPLES, len(hashes)), np.uint64)
    valid = np.zeros((NUM_SAMPLES, len(hashes)), bool)
    for clip, values in enumerate(hashes.values()):
        # Of a clip of fewer pictures, or with black ones among them, the places do not compare.
        if len(values) == NUM_SAMPLES:
            bits[:, clip] = [int(value or "0", 16) for value in values]
            valid[:, clip] = [bool(value) for value in values]
    return bits, valid


def _distances_to_later(bits: Any, valid: Any, number: int) -> Any:
    """Returns the distance of a clip to each of those that come after it."""
    later, own = slice(number + 1, None), slice(number, number + 1)
    both = valid[:, later] & valid[:, own]
    differing = np.bitwise_count(bits[:, later] ^ bits[:, own]) * both
    count = both.sum(0, dtype=np.uint8)
    # As many as 512 bits may differ.
    shares = differing.sum(0, dtype=np.uint16) / np.maximum(count, 1).astype(np.float64) / 64
    return np.where(count >= MIN_PICTURES, shares, NO_DISTANCE)
