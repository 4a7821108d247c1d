import pytest

from mochi_tune.config.schema import DataConfig
from mochi_tune.data.buckets import Bucket
from mochi_tune.data_prep.clips import Cut
from mochi_tune.data_prep.probe import Scan
from mochi_tune.data_prep.windows import choose_cuts, decisive, num_used_frames
from mochi_tune.errors import DataError

BUCKETS = [Bucket(1, 32, 48), Bucket(7, 32, 48), Bucket(13, 32, 48), Bucket(13, 48, 32)]


def scan(num_frames: int, width: int = 96, height: int = 64, **more) -> Scan:
    values = {"source_seconds": num_frames / 30, "source_fps": 30.0, "is_30_fps": True, **more}
    return Scan(width=width, height=height, num_frames=num_frames, num_source_frames=num_frames, **values)


def windows(num_frames: int, mode: str, **data) -> list[tuple[int, int]]:
    cuts = choose_cuts(scan(num_frames), BUCKETS, mode, DataConfig(**data))
    return [(cut.start, cut.num_frames) for cut in cuts]


@pytest.mark.parametrize(
    ("mode", "data", "expected"),
    [
        ("head", {}, [(0, 13)]),
        ("uniform", {"max_clips": 3}, [(0, 13), (14, 13), (27, 13)]),
        ("uniform", {"max_clips": 1}, [(13, 13)]),
        ("uniform", {"max_clips": 9}, [(0, 13), (14, 13), (27, 13)]),
        ("slide", {}, [(0, 13), (6, 13), (12, 13), (18, 13), (24, 13)]),
        ("slide", {"clip_stride": 10, "max_clips": 2}, [(0, 13), (10, 13)]),
        ("all", {}, [(0, 13), (13, 13), (26, 13)]),
        ("all", {"max_clips": 2}, [(0, 13), (13, 13)]),
    ],
)
def test_the_windows_of_forty_frames(mode, data, expected):
    assert windows(40, mode, **data) == expected


def test_the_rest_of_a_video_goes_to_a_shorter_bucket():
    assert windows(35, "all") == [(0, 13), (13, 13), (26, 7)]
    # Not for stills, and not beyond the limit.
    assert windows(30, "all") == [(0, 13), (13, 13)]
    assert windows(35, "all", max_clips=2) == [(0, 13), (13, 13)]
    assert windows(9, "all") == [(0, 7)]


def test_shape_and_rate_decide_the_cut():
    [tall] = choose_cuts(scan(20, 64, 96), BUCKETS, "head", DataConfig())
    assert (tall.height, tall.width, tall.frame_rate) == (48, 32, "resample")
    # A film of 20 pictures has 25 frames at 30 fps, but 20 when retimed.
    film = Scan(96, 64, 25, 20, 20 / 24, 24.0)
    retimed = choose_cuts(film, BUCKETS, "all", DataConfig(frame_rate="auto"))
    assert [(cut.start, cut.num_frames, cut.frame_rate) for cut in retimed] == [(0, 13, "retime"), (13, 7, "retime")]
    resampled = choose_cuts(film, BUCKETS, "all", DataConfig())
    assert [(cut.start, cut.num_frames) for cut in resampled] == [(0, 13), (13, 7)]
    [still] = choose_cuts(Scan(96, 64, 1, 1, 0.0, 30.0, is_still=True), BUCKETS, "all", DataConfig())
    assert still.num_frames == 1
    with pytest.raises(DataError, match="too short: has 6 frames"):
        choose_cuts(scan(6), BUCKETS, "head", DataConfig())


def test_the_library_that_decodes_does_not_decide_the_pixels():
    cuts = [Cut(7, 32, 48, decoder=decoder) for decoder in ("auto", "pyav", "decord")]
    assert decisive(cuts[0]) == decisive(cuts[1]) == decisive(cuts[2])
    # Settings that accept or refuse a file do not count either.
    assert decisive(Cut(7, 32, 48, allow_upscale=True, hdr="tonemap")) == decisive(cuts[0])
    assert decisive(Cut(7, 32, 48, start=1)) != decisive(cuts[0])


def test_used_frames_are_counted_once():
    assert num_used_frames([Cut(7, 32, 48, start) for start in (0, 3, 20)]) == 17
    assert num_used_frames([Cut(13, 32, 48), Cut(7, 32, 48, 2)]) == 13
