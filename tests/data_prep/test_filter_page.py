from mochi_tune.data_prep.clip_scores import Scores
from mochi_tune.data_prep.filter import FilterLimits, Judged
from mochi_tune.data_prep.filter_page import make_page


def test_the_distance_of_a_duplicate_is_called_one():
    scores = Scores(48, 32, 13, 0.43, 0.0, 0.0, 1.0, 50.0, 0, 0, 0, 0, (), ())
    judged = Judged("a.mp4", scores, ("duplicate",), nearest=0.0, duplicate_of="b.mp4")
    page = make_page([judged], vars(FilterLimits()), "videos", {})
    assert "<h3>Distance</h3>" in page and "distance 0<" in page
