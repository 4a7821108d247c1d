import subprocess
import sys

import numpy as np
import pytest
from helpers_video import frame_number, write_video

from mochi_tune.data_prep import frames
from mochi_tune.data_prep.frames import decode_frames
from mochi_tune.data_prep.probe import probe_video

MEMORY_SCRIPT = """
import resource, sys, time
from pathlib import Path
import av, decord
from mochi_tune.data_prep import frames
from mochi_tune.data_prep.probe import probe_video

frames.AHEAD_BYTES = 20 * 2**20
path = Path(sys.argv[1])
source = probe_video(path)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for frame in frames.decode_frames(path, source, list(range(len(source.timestamps)))):
    time.sleep(0.01)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("pieces_of", [1, 5, 16])
@pytest.mark.parametrize(
    "options",
    [
        {"g": "250"},
        {"g": "12"},
        {"g": "12", "x264-params": "open-gop=1:bframes=4:scenecut=0"},
        {"g": "1"},
        {"bf": "0", "g": "7"},
    ],
    ids=["one keyframe", "closed", "open", "intra", "no B-frames"],
)
def test_small_pieces_give_the_same_frames_as_the_whole(tmp_path, monkeypatch, options, pieces_of):
    import decord

    path = write_video(tmp_path / "clip.mp4", 60, options=options)
    source = probe_video(path)
    whole = decord.VideoReader(str(path))
    expected = np.stack([whole.next().asnumpy() for _ in range(60)])
    monkeypatch.setattr(frames, "AHEAD_BYTES", pieces_of * 64 * 64 * 3)
    for indices in (list(range(60)), list(range(0, 60, 2)), [3, 17, 18, 44, 59]):
        got = np.stack(list(decode_frames(path, source, indices)))
        assert [frame_number(frame) for frame in got] == indices
        assert np.array_equal(got, expected[indices])


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mkv", "libx265"),
        ("a.webm", "libvpx"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "libx264"),
        ("a.mp4", "mpeg4"),
        ("a.mkv", "ffv1"),
    ],
)
def test_common_codecs_survive_the_copy(tmp_path, monkeypatch, name, codec):
    path = write_video(tmp_path / name, 40, codec=codec)
    monkeypatch.setattr(frames, "AHEAD_BYTES", 10 * 64 * 64 * 3)
    got = list(decode_frames(path, probe_video(path), list(range(40))))
    assert [frame_number(frame) for frame in got] == list(range(40))


def test_memory_does_not_grow_with_the_length_of_the_clip(tmp_path):
    # 150 pictures of 1.5 MB; the pieces of 20 MB need two or three times that with the decoder's own pictures.
    path = write_video(tmp_path / "clip.mp4", 150, width=960, height=544, options={"preset": "ultrafast", "g": "10"})
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(path)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 130
