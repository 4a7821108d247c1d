"""The page of a grid: its posters."""

import base64
import io
import re

import av
import pytest
import torch
from PIL import Image

from mochi_tune.errors import DataError
from mochi_tune.recipes.grid_page import GridCell, write_grid_page
from mochi_tune.sampling.video import write_video


class CountedFrame:
    """A decoded frame that counts its conversions."""

    converted = 0

    def __init__(self, frame):
        self._frame = frame

    def to_image(self):
        CountedFrame.converted += 1
        return self._frame.to_image()


class CountedContainer:
    def __init__(self, container):
        self._container = container

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._container.close()

    def decode(self, **which):
        return map(CountedFrame, self._container.decode(**which))


def test_a_poster_is_the_middle_frame_and_no_other_frame_is_converted(tmp_path, monkeypatch):
    levels = torch.tensor([20, 50, 80, 110, 140, 170, 200], dtype=torch.uint8)
    frames = levels.reshape(7, 1, 1, 1).expand(7, 64, 96, 3).contiguous()
    videos = [write_video(tmp_path / name, [frames]) for name in ("a.mp4", "b.webm")]
    opened = av.open
    monkeypatch.setattr(av, "open", lambda *arguments: CountedContainer(opened(*arguments)))
    # Two cells may share a video.
    cells = [GridCell("a cat", row, video.name, video, 7) for row in ("seed 1", "seed 2") for video in videos]
    page = write_grid_page(tmp_path, cells, ["a.mp4", "b.webm"]).read_text()
    assert CountedFrame.converted == 2 and page.count("<video") == page.count('width="96" height="64"') == 4
    for content in re.findall(r'poster="data:image/jpeg;base64,([^"]*)"', page):
        poster = Image.open(io.BytesIO(base64.b64decode(content)))
        assert poster.size == (96, 64) and abs(poster.getpixel((48, 32))[0] - 110) < 8


@pytest.mark.parametrize("size", [0, 300, 2000])
def test_a_video_that_is_cut_short_is_named(tmp_path, size):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (7, 160, 160, 3), dtype=torch.uint8, generator=generator)
    video = write_video(tmp_path / "a.mp4", [frames])
    video.write_bytes(video.read_bytes()[:size])
    with pytest.raises(DataError, match=r"a\.mp4 is damaged: remove it, and the same command renders it again"):
        write_grid_page(tmp_path, [GridCell("a cat", "", "seed 1", video, 7)], ["seed 1"])
