import collections

import pytest
import torch

from mochi_tune.toy.world import (
    ALL_SHAPES,
    BACKGROUNDS,
    COLOURS,
    HEIGHT,
    MOTIONS,
    NEW_WORD,
    NUM_FRAMES,
    SHAPES,
    WIDTH,
    Words,
    all_words,
    draw_clips,
    ripple,
    split_words,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_clip_is_a_function_of_its_words_and_the_seed():
    words = all_words()[::100]
    first, again, other = (draw_clips(words, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == (len(words), NUM_FRAMES, HEIGHT, WIDTH, 3) and first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_a_caption_says_every_word():
    words = Words("red", "square", "moves up", "grey")
    assert words.caption == "a red square moves up over a grey background"
    assert len({w.caption for w in all_words()}) == 6 * 3 * 6 * 3


def test_the_base_knows_every_word_but_not_every_combination():
    seen, held_out = split_words()
    assert len(held_out) == 100 and len(seen) == 224
    assert not set(seen) & set(held_out) and set(seen) | set(held_out) == set(all_words())
    assert split_words() == (seen, held_out)
    for kind, words in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS), ("background", BACKGROUNDS)):
        counts = collections.Counter(getattr(w, kind) for w in seen)
        assert counts.keys() == set(words) and min(counts.values()) >= 30
    assert NEW_WORD not in {w.motion for w in seen}


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_a_shape_that_moves_stays_whole(shape):
    words = [Words("red", shape, motion, "grey") for motion in (*list(MOTIONS)[:4], NEW_WORD)]
    for seed in range(6):
        frames = draw_clips(words, generator(seed)).float()
        area = (frames.amax(-1) - frames.amin(-1) > 60).flatten(2).sum(2)
        assert (area.amin(1) > 0.9 * area.amax(1)).all(), f"{shape} is cut off: {area}"


def test_waves_change_a_clip_and_repeat_with_the_seed():
    [frames] = draw_clips(all_words()[:1], generator())
    rippled = ripple(frames, generator(3))
    assert rippled.shape == frames.shape and rippled.dtype == torch.uint8
    assert torch.equal(rippled, ripple(frames, generator(3)))
    assert (rippled.float() - frames.float()).abs().mean() > 2
