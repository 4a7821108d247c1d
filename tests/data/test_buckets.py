import pytest

from mochi_tune.data.buckets import Bucket, Footage, auto_buckets, choose_bucket, read_buckets
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.models.latents import check_geometry

AUTO = auto_buckets(37, 480, 848)


def test_automatic_buckets_fit_the_models_and_have_about_the_same_area():
    assert len(AUTO) == len(set(AUTO)) and Bucket(37, 480, 848) in AUTO
    for bucket in AUTO:
        check_geometry(bucket.num_frames, bucket.height, bucket.width)
        assert abs(bucket.height * bucket.width / (480 * 848) - 1) < 0.05
        assert Bucket(bucket.num_frames, bucket.width, bucket.height) in AUTO
    assert {bucket.num_frames for bucket in AUTO} == {1, 7, 19, 37}
    assert {bucket.num_frames for bucket in auto_buckets(163, 480, 848)} == {1, 7, 19, 37, 79, 163}
    assert {bucket.num_frames for bucket in auto_buckets(1, 64, 64)} == {1}


@pytest.mark.parametrize(
    ("footage", "bucket"),
    [
        (Footage(300, 1080, 1920), Bucket(37, 480, 848)),  # a film
        (Footage(300, 1920, 1080), Bucket(37, 848, 480)),  # a phone
        (Footage(300, 1080, 1440), Bucket(37, 560, 736)),  # 4:3
        (Footage(300, 1080, 1080), Bucket(37, 640, 640)),
        (Footage(20, 1080, 1920), Bucket(19, 480, 848)),  # shorter than the longest
        (Footage(1, 2000, 3000, is_still=True), Bucket(1, 528, 784)),
    ],
)
def test_a_clip_goes_where_it_loses_least(footage, bucket):
    assert choose_bucket(footage, AUTO, may_enlarge=False) == bucket


def test_of_equal_losses_the_larger_bucket_is_taken_unless_it_would_enlarge():
    buckets = [Bucket(7, 32, 48), Bucket(7, 64, 96)]
    assert choose_bucket(Footage(9, 64, 96), buckets, False) == Bucket(7, 64, 96)
    assert choose_bucket(Footage(9, 63, 95), buckets, False) == Bucket(7, 32, 48)
    assert choose_bucket(Footage(9, 63, 95), buckets, True) == Bucket(7, 64, 96)
    # The smaller one keeps 0.1 % more, which does not count.
    nearly = [Bucket(37, 240, 424), Bucket(37, 544, 960)]
    assert choose_bucket(Footage(37, 566, 1000), nearly, False) == Bucket(37, 544, 960)
    # Each keeps half: the one of more pixels, which is not the one of more rows.
    assert choose_bucket(Footage(7, 100, 100), [Bucket(7, 64, 32), Bucket(7, 48, 96)], False) == Bucket(7, 48, 96)


def test_frames_count_as_pixels_do():
    long, wide = Bucket(37, 64, 64), Bucket(7, 64, 128)
    # From 37 frames at 1:2, the long bucket keeps half of each frame, the wide one a fifth of all.
    assert choose_bucket(Footage(37, 64, 128), [long, wide], False) == long
    # 8 frames only have 7 to lose.
    assert choose_bucket(Footage(8, 64, 128), [long, wide], False) == wide


def test_a_video_becomes_a_still_only_where_nothing_else_is_asked_for():
    with pytest.raises(DataError, match=r"is too short: has 5 frames at 30 fps, needs 7"):
        choose_bucket(Footage(5, 600, 900), AUTO, False)
    assert choose_bucket(Footage(5, 64, 64), [Bucket(1, 64, 64)], False) == Bucket(1, 64, 64)


def test_what_fits_nowhere_is_refused_with_what_to_do():
    only = [Bucket(7, 32, 48)]
    with pytest.raises(DataError, match=r"is a still picture, and no bucket has one frame: use data.buckets=auto"):
        choose_bucket(Footage(1, 64, 64, is_still=True), only, False)
    with pytest.raises(DataError, match=r"has 6 frames at 30 fps, needs 7: use a longer clip or a smaller data.num_fr"):
        choose_bucket(Footage(6, 64, 64), only, False)
    with pytest.raises(DataError, match=r"use a longer clip or shorter buckets in data.sources\[1\]"):
        choose_bucket(Footage(6, 64, 64), only, False, "shorter buckets in data.sources[1]")
    with pytest.raises(DataError, match=r"is 47x64 pixels, too small for 48x32: .*data.allow_upscale=true"):
        choose_bucket(Footage(7, 64, 47), only, False)


def test_lists_of_buckets_are_checked():
    assert read_buckets([[7, 32, 48], [1, 64, 64]], "data.buckets") == [Bucket(7, 32, 48), Bucket(1, 64, 64)]
    with pytest.raises(ConfigError, match=r"a bucket is .frames, height, width."):
        read_buckets([[7, 32]], "data.buckets")
    with pytest.raises(ConfigError, match=r"num_frames=8 does not fit"):
        read_buckets([[8, 32, 48]], "data.buckets")
    for wrong in ([], [[7, 32, 48], [7, 32, 48]]):
        with pytest.raises(ConfigError, match=r"list one or more buckets, each once"):
            read_buckets(wrong, "data.buckets")
