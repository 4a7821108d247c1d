import base64
import io
import shutil
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

from mochi_tune.pages.html_page import BROWSERS, write_png
from mochi_tune.sampling.video import read_frames, write_video
from mochi_tune.toy.page import Report, Row, write_report

PROMPT = """a <b>"wug"</b> & 'friends' over </body> a black background"""


class Reader(HTMLParser):
    """Gathers the text and the attributes as a browser reads them."""

    def __init__(self):
        super().__init__()
        self.text, self.attributes = [], []

    def handle_data(self, data):
        self.text.append(data)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]


@pytest.fixture
def report(tmp_path):
    videos = []
    for i in range(9):
        frames = torch.full((7, 64, 96, 3), 30, dtype=torch.uint8)
        frames[:, 10 + i : 40, 20:60] = torch.tensor([220, 20, 20], dtype=torch.uint8)
        videos.append(tmp_path / f"{i}.mp4")
        write_video(videos[-1], [frames])
    return Report(
        title="A <new> thing",
        summary="Taught &amp; measured.",
        figures={"after & all": ("&gt; 92 %", 'of &lt;50 "samples"'), "<before>": ("&lt; 2 %", "of the <same>")},
        losses=[(i, 1 / i) for i in range(1, 61)],
        validation=[(0, 0.9), (30, 0.5), (60, 0.4)],
        clips=Row("two &lt; three", {"a <red> wug": videos[0], "a blue wug": videos[1]}),
        before_after=[Row(PROMPT, {"before": videos[2], "after": videos[3]})],
        strengths=[Row(PROMPT + " again", dict(zip(("0", "0.25", "0.5", "0.75", "1"), videos[4:], strict=True)))],
        success_by_strength=[(0, 0.02, 0.94), (0.5, 0.5, 0.93), (1, 0.92, 0.89)],
        settings="lora:\n  rank: 16  # <rank> & file\n",
    )


def videos_of(report):
    return [path for row in (report.clips, *report.before_after, *report.strengths) for path in row.videos.values()]


def read(report, folder):
    write_report(folder / "report.html", report)
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    return reader


def test_every_text_is_read_as_it_was_given(report, tmp_path):
    text = read(report, tmp_path).text
    given = [report.title, report.summary, report.settings.strip(), PROMPT, PROMPT + " again", "two &lt; three"]
    given += [*report.clips.videos, *report.figures, *(part for pair in report.figures.values() for part in pair)]
    given += ["before", "after", "strength 0", "strength 0.25", "strength 1"]
    assert [one for one in given if one not in text] == []


def test_every_video_is_inside_byte_for_byte_under_a_frame_of_its_own(report, tmp_path):
    attributes = read(report, tmp_path).attributes
    sources = [value for tag, name, value in attributes if (tag, name) == ("video", "src")]
    inside = [base64.b64decode(value.removeprefix("data:video/mp4;base64,"), validate=True) for value in sources]
    assert inside == [path.read_bytes() for path in videos_of(report)]
    posters = [value for _, name, value in attributes if name == "poster"]
    for poster, path in zip(posters, videos_of(report), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(poster.removeprefix("data:image/png;base64,"), validate=True)))
        assert image.tobytes() == read_frames(path)[3].tobytes()


def test_the_frames_under_a_video_are_its_first_middle_and_last(report, tmp_path):
    strips = [value for tag, name, value in read(report, tmp_path).attributes if (tag, name) == ("img", "src")]
    for strip, path in zip(strips, videos_of(report), strict=True):
        data = base64.b64decode(strip.removeprefix("data:image/jpeg;base64,"), validate=True)
        image, frames = Image.open(io.BytesIO(data)), read_frames(path)
        width, height = frames[0].size
        assert image.size == (3 * width, height)
        for i, frame in enumerate((frames[0], frames[3], frames[-1])):
            part = image.crop((i * width, 0, (i + 1) * width, height))
            assert ImageStat.Stat(ImageChops.difference(part, frame)).mean[0] < 6


def test_nothing_is_fetched_and_nothing_is_left_beside(report, tmp_path):
    before = set(tmp_path.iterdir())
    reader = read(report, tmp_path)
    links = [value for _, name, value in reader.attributes if name in ("src", "href", "poster", "srcset", "data")]
    assert len(links) == 27 and all(value.startswith("data:") for value in links)
    text = (tmp_path / "report.html").read_text()
    assert [word for word in ("http://", "https://", 'src="//', "url(", "@import") if word in text] == []
    assert set(tmp_path.iterdir()) - before == {tmp_path / "report.html"}


def test_a_report_that_breaks_off_leaves_the_old_page(report, tmp_path):
    write_report(tmp_path / "report.html", report)
    old = (tmp_path / "report.html").read_bytes()
    videos_of(report)[-1].unlink()
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").read_bytes() == old


def test_the_picture_holds_the_whole_page_where_a_browser_is(report, tmp_path):
    write_report(tmp_path / "report.html", report)
    last = '<div style="height:40px;background:#f0f"></div></body>'
    text = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").write_text(last.join(text.rsplit("</body>", 1)))
    before = set(tmp_path.iterdir())
    made = write_png(tmp_path / "report.html", tmp_path / "report.png")
    assert made == any(map(shutil.which, BROWSERS))
    assert set(tmp_path.iterdir()) - before == ({tmp_path / "report.png"} if made else set())
    if made:
        image = Image.open(tmp_path / "report.png").convert("RGB")
        rows = [y for y in range(image.height) if image.getpixel((600, y)) == (255, 0, 255)]
        # The body's padding of 4rem is all that is under the last thing on the page.
        assert rows == list(range(image.height - 64 - 40, image.height - 64))
        red = sum(count for count, (r, g, b) in image.getcolors(1 << 24) if r > 180 and g < 60 and b < 60)
        # Each of the nine posters is 170 to 240 pixels wide, of 96, and 800 or more of its pixels are red.
        assert red > 9 * 800 * (170 / 96) ** 2
