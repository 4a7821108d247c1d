"""The demo's page and its animated picture, made from drawn clips."""

import base64
import io
import shutil
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from mochi_tune.pages.html_page import BROWSERS, write_png
from mochi_tune.toy import picture
from mochi_tune.toy.page import Report, Row, write_report
from mochi_tune.toy.picture import Story, write_picture
from mochi_tune.toy.trail import trail_of
from mochi_tune.toy.world import Words, draw_clips

PROMPT = """a <b>"wug"</b> & 'friends' over </body> a black background"""
MOTIONS = ("wugs", "wugs", "gets bigger", "wugs", "moves left", "moves up", "moves down", "gets smaller", "wugs")


@pytest.fixture(scope="module")
def clips():
    words = [Words("red", "circle", motion, "black") for motion in MOTIONS]
    return list(draw_clips(words, torch.Generator().manual_seed(0)))


@pytest.fixture
def report(clips):
    return Report(
        title="A <new> thing",
        summary="Taught &amp; measured.",
        pair=Row(PROMPT, {"before: <gets> bigger": clips[2], "after: wugs": clips[3]}),
        results={"after & all": ("&gt; 92 %", 'of &lt;50 "samples"'), "<before>": ("&lt; 2 %", "of the <same>")},
        taught=Row("two &lt; three", {"a <red> wug": clips[0], "a blue wug": clips[1]}),
        stopping="At <30> & then",
        validation=[(0, 0.9), (30, 0.4), (60, 0.5)],
        lowest=30,
        samples=[Row(PROMPT + " too", {"was": clips[2], "is": clips[3]})],
        strengths=[Row(PROMPT + " again", dict(zip(("0", "0.25", "0.5", "0.75", "1"), clips[4:], strict=True)))],
        success_by_strength=[(0, 0.02, 0.94), (0.5, 0.5, 0.93), (1, 0.92, 0.89)],
        losses=[(i, 1 / i) for i in range(1, 61)],
        figures={"seconds & more": ("62.0 <s>", "of the <training>")},
        commands="mochi-tune train 'a <b>'\nmochi-tune sample",
        settings="lora:\n  rank: 16  # <rank> & file\n",
    )


class Reader(HTMLParser):
    """Collects texts and attributes as a browser parses them."""

    def __init__(self):
        super().__init__()
        self.text, self.attributes = [], []

    def handle_data(self, data):
        self.text.append(data)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]


def read(report, folder):
    write_report(folder / "report.html", report)
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    return reader


def clips_of(report):
    rows = (report.pair, report.taught, *report.samples, *report.strengths)
    return [clip for row in rows for clip in row.clips.values()]


def test_every_text_is_read_as_it_was_given(report, tmp_path):
    text = read(report, tmp_path).text
    given = [report.title, report.summary, report.settings.strip(), report.commands, report.stopping]
    given += [PROMPT, PROMPT + " too", PROMPT + " again", "two &lt; three", "before", ": <gets> bigger", "after"]
    given += [*report.taught.clips, "was", "is", *report.strengths[0].clips]
    for figures in (report.results, report.figures):
        given += [*figures, *(part for pair in figures.values() for part in pair)]
    assert [one for one in given if one not in text] == []
    assert text.count("lowest: step 30") == 1


def test_every_frame_is_inside_as_it_was_given(report, tmp_path):
    attributes = read(report, tmp_path).attributes
    sources = [value for tag, name, value in attributes if (tag, name) == ("img", "src")]
    for source, clip in zip(sources, clips_of(report), strict=True):
        data = base64.b64decode(source.removeprefix("data:image/webp;base64,"), validate=True)
        assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == clip.numpy().tobytes()
    counts = [value for _, name, value in attributes if name == "data-frames"]
    assert counts == ["13"] * len(sources)


def test_nothing_is_fetched_and_nothing_is_left_beside(report, tmp_path):
    before = set(tmp_path.iterdir())
    reader = read(report, tmp_path)
    links = [value for _, name, value in reader.attributes if name in ("src", "href", "poster", "srcset", "data")]
    assert len(links) == 11 and all(value.startswith("data:") for value in links)
    text = (tmp_path / "report.html").read_text()
    assert [word for word in ("http://", "https://", 'src="//', "url(", "@import") if word in text] == []
    assert set(tmp_path.iterdir()) - before == {tmp_path / "report.html"}


def test_a_report_that_breaks_off_leaves_the_old_page(report, tmp_path):
    write_report(tmp_path / "report.html", report)
    old = (tmp_path / "report.html").read_bytes()
    report.strengths[0].clips["1"] = torch.zeros(13, 64, 96, 5, dtype=torch.uint8)
    with pytest.raises(TypeError):
        write_report(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").read_bytes() == old


def test_the_trail_goes_where_the_shape_goes(clips):
    for clip, motion in zip(clips, MOTIONS, strict=True):
        trail = trail_of(clip)
        assert (trail is None) == motion.startswith("gets"), motion
        if trail is not None:
            (x, y), (tip_x, tip_y) = trail.line[0], trail.head[0]
            across, down = {"wugs": (1, 1), "moves left": (-1, 0), "moves up": (0, -1), "moves down": (0, 1)}[motion]
            # Without motion along an axis, the trail stays within a pixel. The smallest travel is 0.75 * 16 pixels.
            for moved, way in ((tip_x - x, across), (tip_y - y, down)):
                assert moved * way > 11 if way else abs(moved) < 1, motion


def test_a_shape_that_vanishes_has_a_trail_as_far_as_it_is_seen(clips):
    seen = trail_of(clips[0])
    clip = clips[0].clone()
    clip[8:] = clip[8:].float().mean(-1, keepdim=True).to(torch.uint8)
    short = trail_of(clip)
    assert seen is not None and short is not None and short.line[0] == seen.line[0]
    assert short.head[0][0] < seen.head[0][0] - 3
    assert trail_of(torch.zeros_like(clip)) is None


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser")
def test_a_browser_shows_the_pair_first_and_blurs_nothing(report, clips, tmp_path):
    """The first clip starts with columns of two colours: the screenshot contains no colour between them."""
    columns = clips[2].clone()
    pink, lime = (255, 0, 255), (0, 255, 0)
    columns[:, :8, :8] = torch.tensor([pink, lime] * 4, dtype=torch.uint8)
    pair = Row(PROMPT, {"before": columns, "after": clips[3]})
    write_report(tmp_path / "report.html", Report(**{**vars(report), "pair": pair}))
    assert write_png(tmp_path / "report.html", tmp_path / "report.png")
    image = Image.open(tmp_path / "report.png").convert("RGB")
    # A row below the rounded corner.
    top = next(y for y in range(600) if pink in {image.getpixel((x, y)) for x in range(100)}) + 10
    left = next(x for x in range(100) if image.getpixel((x, top)) == pink)
    # 96 columns are 500 pixels wide, so eight columns are 41.
    assert {image.getpixel((left + x, top)) for x in range(38)} == {pink, lime}


@pytest.fixture
def story(clips):
    pair = {"before": clips[2], "after": clips[3]}
    return Story("A word", taught=clips[:4], taught_label="shown", prompt="“wugs”", pair=pair, result="0 %, 100 %")


def test_the_picture_moves_for_ever_and_each_pixel_is_a_square(story, tmp_path):
    write_picture(tmp_path / "a.webp", story)
    image = Image.open(tmp_path / "a.webp")
    assert image.format == "WEBP" and image.info["loop"] == 0 and getattr(image, "n_frames", 1) == 13
    assert (tmp_path / "a.webp").stat().st_size < 1.5e6 and list(tmp_path.iterdir()) == [tmp_path / "a.webp"]
    size, before = picture.SCALE, story.pair["before"]
    left = picture.MARGIN + picture.TAUGHT_SCALE * 96 + 2 * picture.GAP
    top = picture.MARGIN + picture.TITLE_SIZE + picture.GAP + picture.TEXT_SIZE + picture.SPACE
    for number in (0, 6, 12):
        image.seek(number)
        shown = image.convert("RGB").crop((left, top, left + 96 * size, top + 64 * size))
        pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(64, size, 96, size, 3)
        assert (pixels == before[number][:, None, :, None]).all()


def test_a_picture_that_breaks_off_leaves_the_old_one(story, tmp_path):
    (tmp_path / "a.webp").write_bytes(b"old")
    story.pair["after"] = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    with pytest.raises(IndexError):
        write_picture(tmp_path / "a.webp", story)
    assert (tmp_path / "a.webp").read_bytes() == b"old"
