"""Finds duplicate clips by the perceptual hashes of their pictures."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from tqdm import tqdm

from mochi_tune.data_prep.clip_scores import NO_HASH, NUM_SAMPLES

# Minimum number of pictures with a hash in both clips; with fewer the distance is _NO_DISTANCE.
_MIN_PICTURES = 4
_NO_DISTANCE = 1.0
# Maximum distance of clips that are compared at every shift in time: with much motion, a copy that begins later is no
# nearer than this. Unrelated clips have a distance of about 0.5.
_CANDIDATE = 0.35
# Minimum overlap of two shifted timelines: as a share of the shorter one, and in pictures, 0.1 s apart.
_MIN_OVERLAP, _MIN_SHIFTED_PICTURES = 0.5, 8
# Number of pictures that one clip is compared with at a time: about 2 MiB, which fits a processor's cache.
BLOCK_PICTURES = 2**16
# Seconds until a progress bar is shown. All pairs of clips are compared, which is quick for some thousand clips.
BAR_DELAY = 1


def find_nearest(hashes: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns each clip's distance to the nearest other clip: the share of hash bits that differ, 0 to 1.

    Args:
        hashes: of each clip, hex digits of eight pictures; "" for a picture without a hash.
    """
    bits, valid = _arrays(hashes)
    nearest = np.full(len(hashes), _NO_DISTANCE)
    for number in tqdm(range(len(hashes) - 1), desc="nearest", unit="clip", delay=BAR_DELAY):
        # Distances are symmetric.
        distances = _distances_to_later(bits, valid, number)
        nearest[number] = min(nearest[number], distances.min())
        np.minimum(nearest[number + 1 :], distances, out=nearest[number + 1 :])
    return {name: round(float(distance), 4) for name, distance in zip(hashes, nearest, strict=True)}


def find_duplicates(
    hashes: Mapping[str, Sequence[str]], limit: float, timelines: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Returns for each duplicate the name of the better clip that it is a duplicate of.

    Args:
        hashes: of each clip, the best clip first.
        limit: clips with a smaller distance are duplicates.
        timelines: of each clip, as in `Scores`; they find copies that begin earlier or later.
    """
    names, (bits, valid) = list(hashes), _arrays(hashes)
    films = _Timelines(timelines[name] for name in names) if timelines else None
    # Number of the better clip of each clip, or -1.
    better = np.full(len(names), -1)
    for number in tqdm(range(len(names) - 1), desc="duplicates", unit="clip", delay=BAR_DELAY):
        if better[number] >= 0:
            continue
        distances, free = _distances_to_later(bits, valid, number), better[number + 1 :] < 0
        same = free & (distances < limit)
        better[number + 1 :][same] = number
        if films is not None:
            others = np.flatnonzero(free & ~same & (distances < _CANDIDATE)) + number + 1
            better[others[films.distances(number, others) < limit]] = number
    # Ordered by the better clip, the best first.
    found = sorted(np.flatnonzero(better >= 0).tolist(), key=better.__getitem__)
    return {names[number]: names[better[number]] for number in found}


def shifted_distance(one: str, other: str) -> float:
    """Returns the minimum distance of two clips over all shifts in time.

    Args:
        one: timeline of a clip, as in `Scores`.
        other: timeline of the other clip.
    """
    return float(_Timelines([one, other]).distances(0, np.array([1]))[0])


class _Timelines:
    """The concatenated hashes of many timelines.

    Args:
        timelines: as in `Scores`.
    """

    def __init__(self, timelines: Iterable[str]) -> None:
        # The last entry, without a hash, pads shorter clips.
        each = [*map(_read_timeline, timelines), _read_timeline(NO_HASH)]
        self._bits, self._valid = (np.concatenate(arrays) for arrays in zip(*each, strict=True))
        self._lengths = np.array([len(bits) for bits, _ in each])
        self._starts = np.cumsum(self._lengths) - self._lengths

    def distances(self, clip: int, others: Any) -> Any:
        """Returns a clip's minimum distance to each of some others over all shifts in time, (clips,).

        Args:
            clip: its number.
            others: numbers of the other clips, (clips,).
        """
        found = np.full(len(others), _NO_DISTANCE)
        lengths = self._lengths[others]
        # Sorted by length, so that blocks need little padding.
        order = np.argsort(lengths, kind="stable")
        num_blocks = -(-len(others) * int(lengths.max(initial=0)) // BLOCK_PICTURES)
        for block in np.array_split(order, max(num_blocks, 1)):
            found[block] = self._distances(clip, others[block])
        return found

    def _distances(self, clip: int, others: Any) -> Any:
        start, length = int(self._starts[clip]), int(self._lengths[clip])
        lengths = self._lengths[others]
        longest = int(lengths.max(initial=0))
        # (pictures, clips), last picture first: then each row of a comparison belongs to one shift.
        places = np.arange(longest)[::-1, None]
        places = np.where(places < lengths, self._starts[others] + places, len(self._bits) - 1)
        theirs, there = self._bits[places], self._valid[places].view(np.uint8)
        # By shift: number of differing bits, and of pictures with a hash in both clips.
        differing = np.zeros((length + longest, len(others)), np.uint32)
        count = np.zeros_like(differing)
        for number in np.flatnonzero(self._valid[start : start + length]):
            differing[number : number + longest] += np.bitwise_count(theirs ^ self._bits[start + number]) * there
            count[number : number + longest] += there
        needed = np.maximum(_MIN_SHIFTED_PICTURES, np.ceil(np.minimum(length, lengths) * _MIN_OVERLAP))
        shares = differing / np.maximum(count, 1) / 64
        return np.where(count >= needed, shares, _NO_DISTANCE).min(0, initial=_NO_DISTANCE)


def _read_timeline(timeline: str) -> tuple[Any, Any]:
    """Returns the hashes of a timeline as uint64, and whether each is valid."""
    each = [timeline[i : i + len(NO_HASH)] for i in range(0, len(timeline), len(NO_HASH))]
    valid = np.array([value != NO_HASH for value in each], bool)
    return np.array([int(value, 16) if value != NO_HASH else 0 for value in each], np.uint64), valid


def _arrays(hashes: Mapping[str, Sequence[str]]) -> tuple[Any, Any]:
    """Returns hashes as uint64 (NUM_SAMPLES, clips), and whether each is valid."""
    bits = np.zeros((NUM_SAMPLES, len(hashes)), np.uint64)
    valid = np.zeros((NUM_SAMPLES, len(hashes)), bool)
    for clip, values in enumerate(hashes.values()):
        # Clips with fewer hashes, because of black pictures, cannot be compared picture by picture.
        if len(values) == NUM_SAMPLES:
            bits[:, clip] = [int(value or "0", 16) for value in values]
            valid[:, clip] = [bool(value) for value in values]
    return bits, valid


def _distances_to_later(bits: Any, valid: Any, number: int) -> Any:
    """Returns the distances of a clip to all later ones."""
    later, own = slice(number + 1, None), slice(number, number + 1)
    both = valid[:, later] & valid[:, own]
    differing = np.bitwise_count(bits[:, later] ^ bits[:, own]) * both
    count = both.sum(0, dtype=np.uint8)
    # uint16, as up to 512 bits may differ.
    shares = differing.sum(0, dtype=np.uint16) / np.maximum(count, 1).astype(np.float64) / 64
    return np.where(count >= _MIN_PICTURES, shares, _NO_DISTANCE)
