import collections

import torch

from mochi_tune.toy.measure import Seen, colour_error, see
from mochi_tune.toy.world import (
    ALL_MOTIONS,
    ALL_SHAPES,
    HEIGHT,
    NEW_WORD,
    NUM_FRAMES,
    WIDTH,
    Words,
    all_words,
    draw_clips,
)

KINDS = ("colour", "shape", "motion", "background")


def draw(words: Words, seed: int = 0) -> torch.Tensor:
    return draw_clips([words], torch.Generator().manual_seed(seed))[0]


def test_of_a_thousand_clips_each_word_is_read_right_in_99_of_100():
    words = all_words(ALL_SHAPES, ALL_MOTIONS)
    wrong, count = collections.Counter(), 0
    for seed in range(2):
        for i in range(0, len(words), 20):
            group = words[i : i + 20]
            clips = draw_clips(group, torch.Generator().manual_seed(1000 * seed + i))
            for clip, said in zip(clips, group, strict=True):
                seen, count = see(clip), count + 1
                wrong.update(kind for kind in KINDS if getattr(seen, kind) != getattr(said, kind))
    assert count == 1008
    assert all(wrong[kind] <= 0.01 * count for kind in KINDS), wrong


def test_noise_and_an_empty_scene_show_nothing():
    noise = torch.randint(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0))
    assert see(noise.to(torch.uint8)).shape is None
    assert see(torch.full((NUM_FRAMES, HEIGHT, WIDTH, 3), 118, dtype=torch.uint8)) == Seen(None, None, None, "grey")


def test_a_clip_played_backwards_moves_the_other_way():
    pairs = (("moves left", "moves right"), ("moves up", "moves down"), ("gets bigger", "gets smaller"))
    for motion, opposite in pairs:
        clip = draw(Words("red", "circle", motion, "grey"))
        assert see(clip).motion == motion and see(clip.flip(0)).motion == opposite


def test_a_clip_that_stands_still_has_no_motion():
    clip = draw(Words("red", "circle", "moves left", "grey"))
    assert see(clip[:1].expand(NUM_FRAMES, -1, -1, -1)).motion is None


def test_two_shapes_at_once_are_no_shape():
    left = draw(Words("red", "circle", "moves left", "black"))
    assert see(left).shape == "circle"
    assert see(torch.maximum(left, left.flip(2))).shape is None


def test_only_one_way_aslant_is_the_new_motion():
    clip = draw(Words("green", "circle", NEW_WORD, "grey"))
    assert see(clip).motion == NEW_WORD
    for other in (clip.flip(0), clip.flip(1), clip.flip(2)):
        assert see(other).shape == "circle" and see(other).motion is None


def test_all_three_words_must_be_right():
    said = Words("red", "circle", "moves left", "grey")
    assert Seen("red", "circle", "moves left", "white").shows(said)
    for other in (("blue", "circle", "moves left"), ("red", "cross", "moves left"), ("red", "circle", None)):
        assert not Seen(*other, "grey").shows(said)


def test_the_colour_error_is_small_for_the_paint_itself_and_large_for_another():
    clip = draw(Words("red", "circle", "moves left", "grey"))
    assert colour_error(clip, "red") < 0.1
    assert colour_error(clip, "blue") > 0.4
