"""The verdicts of `filter` on scores: limits, the best of duplicates, what is measured again and what is moved."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from mochi_tune.data_prep.clip_scores import Scores
from mochi_tune.data_prep.filter import Filter, FilterLimits, Judged, _measure_all, _move_all, judge


def scores(**changed) -> Scores:
    """Returns the scores of a good clip of one scene, so that each one is a duplicate of any other."""
    good = {
        "width": 96, "height": 64, "frames": 30, "seconds": 1.0, "black": 0.0, "frozen": 0.0, "motion": 9.0,
        "sharpness": 100.0, "left": 0, "top": 0, "right": 0, "bottom": 0,
        "hashes": ("0123456789abcdef",) * 8, "timeline": "",
    }  # fmt: skip
    return Scores(**(good | changed))


def test_a_score_at_its_limit_is_not_flagged():
    at_limits = scores(black=0.1, frozen=0.2, sharpness=10.0, motion=0.3, left=4)
    assert FilterLimits().flags(at_limits) == []
    black = scores(black=1.0, motion=0.0)
    assert FilterLimits().flags(black) == ["black"]
    for limit in (1, None):
        assert FilterLimits(max_black=limit).flags(black) == ["still"]


@pytest.mark.parametrize(
    ("other", "best"),
    [
        ({"width": 112}, "b"), ({"width": 48, "frames": 99}, "a"), ({"frames": 31}, "b"),
        ({"frames": 29, "sharpness": 900.0}, "a"), ({"sharpness": 200.0}, "b"),
        # As much as another encoding of the same clip may differ.
        ({"sharpness": 110.0}, "a"), ({"width": 192, "motion": 0.0}, "a"),
    ],
)  # fmt: skip
def test_the_best_of_duplicates_is_kept(other, best):
    one, two = judge({"a": scores(), "b": scores(**other)}, FilterLimits())
    assert (one.duplicate_of, two.duplicate_of) == (("b", "") if best == "b" else ("", "a"))


def test_only_new_and_changed_clips_are_measured(tmp_path):
    clip, measured = tmp_path / "a.mp4", []

    def measure(_, path, __):
        measured.append(path)
        yield asdict(scores())

    for text, count in (("one", 1), ("one", 1), ("another", 2)):
        if not measured or text == "another":
            clip.write_text(text)
        found = _measure_all(tmp_path / "scores.jsonl", {"a.mp4": clip}, SimpleNamespace(run=measure))
        assert found == {"a.mp4": scores()} and len(measured) == count


def test_a_clip_that_cannot_be_read_is_not_moved(tmp_path):
    clip, report = tmp_path / "a.mp4", tmp_path / "report"
    clip.touch()
    report.mkdir()
    settings = Filter(tmp_path / "videos", report, move=tmp_path / "moved")
    assert _move_all(settings, {"a.mp4": clip}, [Judged("a.mp4", None, ("unreadable",))]) == []
    assert clip.exists() and not list(report.iterdir())
