from fractions import Fraction

import pytest

from mochi_tune.data_prep.scenes import SceneRules, plan_scenes
from mochi_tune.errors import ConfigError


def plan(count, cuts, times=None, **rules):
    """Returns (number, part, start in frames of 1/30 s, frames, is_short) of each scene."""
    times = times or [Fraction(i, 30) for i in range(count)]
    settings = {"margin_seconds": 0, "min_seconds": 1, "max_seconds": 100} | rules
    scenes = plan_scenes(times, times[-1] + Fraction(1, 30), cuts, SceneRules(**settings))
    assert all(scene.end_seconds >= scene.start_seconds for scene in scenes)
    return [
        (s.number, s.part, round(s.start_seconds * 30), s.num_frames, s.is_short)
        for s in scenes
    ]  # fmt: skip


def test_scenes_lie_between_the_cuts_and_share_no_frame():
    assert plan(120, [40, 75]) == [(1, 0, 0, 40, False), (2, 0, 40, 35, False), (3, 0, 75, 45, False)]
    assert plan(30, []) == [(1, 0, 0, 30, False)]


def test_a_margin_is_left_out_at_cuts_and_not_at_the_films_ends():
    assert plan(120, [40, 80], margin_seconds=0.1) == [
        (1, 0, 0, 37, False), (2, 0, 43, 34, False), (3, 0, 83, 37, False),
    ]  # fmt: skip
    # A margin of a fractional number of frames also leaves out the frame that it ends in.
    assert plan(80, [40], margin_seconds=0.12) == [(1, 0, 0, 36, False), (2, 0, 44, 36, False)]


def test_short_scenes_are_marked_and_may_be_empty():
    assert plan(100, [40, 50], margin_seconds=0.2) == [
        (1, 0, 0, 34, False), (2, 0, 40, 0, True), (3, 0, 56, 44, False),
    ]  # fmt: skip
    assert plan(69, [40]) == [(1, 0, 0, 40, False), (2, 0, 40, 29, True)]


def test_a_long_scene_becomes_equal_parts():
    assert plan(100, [], max_seconds=2) == [(1, 1, 0, 50, False), (1, 2, 50, 50, False)]
    assert plan(120, [], max_seconds=2) == [(1, 1, 0, 60, False), (1, 2, 60, 60, False)]
    # No frame is lost if parts have a fractional number of frames.
    parts = plan(200, [], max_seconds=2)
    assert [part[3] for part in parts] == [50, 50, 50, 50]
    assert sum(part[3] for part in plan(199, [], max_seconds=2)) == 199


def test_where_equal_parts_would_be_too_short_the_rest_is_left_out():
    assert plan(200, [], min_seconds=5, max_seconds=6) == [(1, 0, 0, 180, False)]


def test_times_that_matroska_rounds_to_the_millisecond_change_nothing():
    times = [Fraction(round(i * 1000 / 30), 1000) for i in range(120)]
    assert plan(120, [40, 75], times, margin_seconds=0.1) == plan(120, [40, 75], margin_seconds=0.1)
    assert plan(30, [], times[:30]) == [(1, 0, 0, 30, False)]
    # A second that ends 0.7 ms too early is no short scene; one that ends too late is not divided.
    assert plan(41, [11], times[:41]) == [(1, 0, 0, 11, True), (2, 0, 11, 30, False)]
    assert plan(30, [], times[:30], max_seconds=1) == [(1, 0, 0, 30, False)]
    assert plan(120, [], times, max_seconds=2) == plan(120, [], max_seconds=2)


def test_lengths_are_seconds_where_the_frame_rate_varies():
    times = [*[Fraction(i) for i in range(4)], *[4 + Fraction(i, 10) for i in range(20)]]
    scenes = plan_scenes(times, Fraction(6), [4], SceneRules(margin_seconds=0.5, min_seconds=1, max_seconds=9))
    assert [(s.start_seconds, s.end_seconds, s.num_frames) for s in scenes] == [(0, 3, 3), (4.5, 6, 15)]


def test_a_longest_clip_that_is_shorter_than_the_shortest_is_refused():
    with pytest.raises(ConfigError, match=r"max_seconds=1 is less than min_seconds=2"):
        SceneRules(min_seconds=2, max_seconds=1).check()
