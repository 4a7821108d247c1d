import itertools
import random
import sys

from mochi_tune.data_prep import duplicates
from mochi_tune.data_prep.clip_scores import NO_HASH
from mochi_tune.data_prep.duplicates import find_duplicates, find_nearest, shifted_distance


def random_clips(num_clips: int, seed: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns hashes and timelines of clips with random starts in one film with hardly any motion."""
    draw = random.Random(seed)

    def hash_of(picture: int) -> str:
        flipped = sum(1 << bit for bit in range(64) if draw.random() < 0.06)
        return "" if draw.random() < 0.1 else f"{film[picture] ^ flipped:016x}"

    still = draw.getrandbits(64)
    film = [still ^ sum(1 << draw.randrange(64) for _ in range(6)) for _ in range(60)]
    hashes, timelines = {}, {}
    for number in range(num_clips):
        first, length = draw.randrange(20), draw.choice([0, 7, 8, 15, 31, 40])
        hashes[str(number)] = [hash_of(first + i) for i in range(8)]
        timelines[str(number)] = "".join(hash_of(first + i) or NO_HASH for i in range(length))
    return hashes, timelines


def least_distance(one: str, other: str) -> float:
    """Computes `shifted_distance` with a loop over pairs of pictures."""
    ours, theirs = ([text[i : i + 16] for i in range(0, len(text), 16)] for text in (one, other))
    shares = [1.0]
    for shift in range(-len(theirs), len(ours) + 1):
        pairs = [(a, theirs[i - shift]) for i, a in enumerate(ours) if 0 <= i - shift < len(theirs)]
        both = [(int(a, 16), int(b, 16)) for a, b in pairs if NO_HASH not in (a, b)]
        if len(both) >= max(8, min(len(ours), len(theirs)) / 2):
            shares.append(sum((a ^ b).bit_count() for a, b in both) / len(both) / 64)
    return min(shares)


def test_clips_compared_at_once_have_the_verdicts_of_each_pair(monkeypatch, capsys):
    hashes, timelines = random_clips(18, seed=2)
    monkeypatch.setattr(duplicates, "BAR_DELAY", 0)
    # Several blocks, the last one smaller.
    monkeypatch.setattr(duplicates, "BLOCK_PICTURES", 200)
    expected: dict[str, str] = {}
    for one, other in itertools.combinations(hashes, 2):
        distance = shifted_distance(timelines[one], timelines[other])
        assert distance == least_distance(timelines[one], timelines[other])
        near = find_nearest({"": hashes[one], "other": hashes[other]})[""]
        if {one, other}.isdisjoint(expected) and (near < 0.17 or (near < 0.35 and distance < 0.17)):
            expected[other] = one
    assert find_duplicates(hashes, 0.17, timelines) == expected and len(expected) == 8
    # A progress bar is shown: thousands of clips take minutes.
    shown = capsys.readouterr().err
    assert "nearest: 100%" in shown and "duplicates: 100%" in shown


def test_four_pictures_in_common_are_compared_and_three_are_not():
    for num_hashes, distance in ((4, 0.0), (3, 1.0)):
        hashes = [f"{7:016x}"] * num_hashes + [""] * (8 - num_hashes)
        assert find_nearest({"one": hashes, "other": hashes}) == {"one": distance, "other": distance}


def test_the_search_for_duplicates_takes_python_by_the_clip_and_not_by_the_pair():
    taken = []
    for num_clips in (10, 40):
        hashes, timelines = random_clips(num_clips, seed=3)
        calls = itertools.count()
        sys.setprofile(lambda *_, calls=calls: next(calls))
        try:
            find_nearest(hashes)
            find_duplicates(hashes, 0.01, timelines)
        finally:
            sys.setprofile(None)
        taken.append(next(calls))
    # There are 17 times as many pairs.
    assert taken[1] < 6 * taken[0], taken
