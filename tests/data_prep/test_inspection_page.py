import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers_video import frame_number, write_video
from PIL import Image

from mochi_tune.config.sources import Source
from mochi_tune.data.buckets import Bucket
from mochi_tune.data.rows import CacheSettings, make_row
from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.data_prep.gather import Clip, Inputs, MediaFile
from mochi_tune.data_prep.inspection import Inspection, SeenClip, as_jpeg, find_flags, whole_frame
from mochi_tune.data_prep.inspection_page import make_page, window_seconds
from mochi_tune.data_prep.probe import scan_video
from mochi_tune.data_prep.windows import decisive
from mochi_tune.models.text_encoder import MeasuredCaption

HOSTILE = "<script>alert('x')</script> \"q\" & </p></body><img src=x onerror=y> \u05de\u05d6\u05dc \u202e ab \U0001f388"
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "dl", "div", "dt", "dd", "ul",
    "li", "section", "figure", "figcaption", "svg", "text", "rect", "path", "image", "img", "article", "bdi", "span",
    "small", "i", "br", "table", "tr", "th", "td", "main",
}  # fmt: skip
SETTINGS = CacheSettings({"version": 1, "buckets": {}}, "", "", "", "")
SOURCE = Source("", Path("videos"), [Bucket(13, 32, 48)], "all", "")


class Reader(HTMLParser):
    """Reads a page's elements with their attributes, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def picture(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/jpeg;base64,")))))


def see(found: Inspection, path: Path, cut: Cut, captions: list[MeasuredCaption], is_drawn: bool = True) -> SeenClip:
    texts = tuple(caption.text for caption in captions)
    scan, file = scan_video(path), MediaFile(path.name, path, path.name, SOURCE, texts)
    clip = Clip(make_row(path.name, texts, "0", decisive(cut), SETTINGS), file, cut)
    decoded, whole = decode_clip(path, cut), decode_clip(path, whole_frame(scan, cut))
    found.inputs.files[path.name], found.inputs.scans[path.name] = file, scan
    found.inputs.clips.append(clip)
    found.captions |= {caption.text: caption for caption in captions}
    pictures = tuple(as_jpeg(decoded.frames[i], 160) for i in (0, 6, 12)) if is_drawn else ()
    source = as_jpeg(whole.frames[0], 240) if is_drawn else b""
    found.clips.append(
        SeenClip(clip, decoded.report, find_flags(scan, cut, captions, decoded.report), pictures, source)
    )
    return found.clips[-1]


@pytest.fixture
def found(tmp_path):
    """One clip of a portrait video of 40 frames, from frame 13 on."""
    write_video(tmp_path / "a & <b>.mp4", 40, width=64, height=128)
    found = Inspection(Inputs())
    see(found, tmp_path / "a & <b>.mp4", Cut(13, 32, 48, 13), [MeasuredCaption(HOSTILE, 300, len(HOSTILE) - 5)])
    return found


def test_the_page_needs_nothing_and_runs_nothing(found):
    page = make_page(found, "<my> run")
    read = Reader(page)
    assert {tag for tag, _ in read.elements} <= TAGS
    addresses = [value for _, own in read.elements for key, value in own.items() if key in ("src", "href")]
    assert len(addresses) == 4 and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not any(key.startswith("on") for _, own in read.elements for key in own)
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    assert "a & <b>.mp4@13" in read.texts and any("<my> run" in text for text in read.texts)


def test_the_pictures_are_those_of_the_clip_and_the_crop_is_drawn_where_it_is(found):
    read = Reader(make_page(found, "run"))
    assert [frame_number(picture(image["src"])) for image in read.all("img")] == [13, 19, 25]
    (source,) = read.all("image")
    assert frame_number(picture(source["href"])) == 13
    assert picture(source["href"]).shape == (128, 64, 3)
    svg = next(own for own in read.all("svg") if own.get("class") == "source")
    (crop,) = [own for own in read.all("rect") if "class" not in own]
    assert svg["viewbox"] == "0 0 64 128" and (source["width"], source["height"]) == ("64", "128")
    # 64x128 is scaled to 48x96; the middle third is kept.
    assert [float(crop[key]) for key in ("x", "y", "width", "height")] == pytest.approx([0, 42.67, 64, 42.67])
    assert "crop loses 67% of the picture" in read.texts


def test_the_window_is_drawn_where_it_lies_in_the_video(found, tmp_path):
    write_video(tmp_path / "film.mp4", 48, rate=24, width=96, height=64)
    film = see(found, tmp_path / "film.mp4", Cut(13, 32, 48, 12, frame_rate="retime"), [MeasuredCaption("b", 2, 1)])
    assert window_seconds(found, found.clips[0]) == pytest.approx((13 / 30, 26 / 30), abs=1e-3)
    # 13 pictures at 24 fps take longer than 13 frames at 30 fps.
    assert window_seconds(found, film) == pytest.approx((12 / 24, 25 / 24), abs=1e-3)
    bars = re.findall(r"left:([\d.]+)%;width:([\d.]+)%", make_page(found, "run"))
    expected = [(100 * 13 / 40, 100 * 13 / 40), (25, 100 * 13 / 48)]
    assert [tuple(map(float, bar)) for bar in bars] == [pytest.approx(bar, abs=0.1) for bar in expected]


def test_the_part_of_a_caption_that_is_not_read_is_marked(found):
    page = make_page(found, "run")
    read = Reader(page)
    assert HOSTILE[:-5] in read.texts
    lost = read.texts.index(HOSTILE[-5:])
    assert read.texts[lost - 1] == HOSTILE[:-5] and '<bdi class="lost"><span>' in page
    assert "(300 tokens, 44 of them cut off)" in read.texts
    assert "caption loses 44 tokens" in read.texts and "Captions, tokens" in read.texts


def test_without_a_tokenizer_words_are_counted_and_the_page_says_so(found):
    found.captions = {text: MeasuredCaption(text, None, len(text)) for text in found.captions}
    read = Reader(make_page(found, "run"))
    assert HOSTILE in read.texts and "Captions, words" in read.texts
    assert any("is unknown" in text for text in read.texts) and not any("cut off" in text for text in read.texts)


def test_endless_and_many_captions_are_shortened(found, tmp_path):
    endless = MeasuredCaption("w" * 40_000, 9000, 700)
    many = [MeasuredCaption(f"caption {number}", 4, 9) for number in range(9)]
    write_video(tmp_path / "b.mp4", 13, width=96, height=64)
    see(found, tmp_path / "b.mp4", Cut(13, 32, 48), [endless, *many])
    page = make_page(found, "run")
    read = Reader(page)
    assert "w" * 700 in read.texts and "w" * 400 in read.texts and "… and 38900 more characters" in read.texts
    assert "caption 4" in read.texts and "caption 5" not in read.texts and "and 4 more captions" in read.texts


def test_clips_without_pictures_are_in_a_table(found, tmp_path):
    write_video(tmp_path / "b.mp4", 30, width=96, height=64)
    see(found, tmp_path / "b.mp4", Cut(13, 32, 48, 6), [MeasuredCaption("x" * 200, 4, 200)], is_drawn=False)
    read = Reader(make_page(found, "run"))
    assert len(read.all("article")) == 1 and "More clips" in read.texts
    assert [own["aria-label"] for own in read.all("div") if own.get("tabindex") == "0"] == ["More clips"]
    assert any(text.startswith("1 of 2 clips") for text in read.texts)
    first = read.texts.index("b.mp4@6")
    assert read.texts[first : first + 4] == ["b.mp4@6", "13 frames of 32x48", "0.20 – 0.63", "x" * 120 + "…"]


def test_what_was_refused_and_what_was_not_taken_is_listed(found):
    found.refused = {"<z>.mp4": "is <short>"}
    found.inputs.unused = {"notes.pdf": "is no video & nothing"}
    read = Reader(make_page(found, "run"))
    for text in ("<z>.mp4", "is <short>", "notes.pdf", "is no video & nothing", "Refused", "Not used"):
        assert text in read.texts
    note = "These files and clips cannot be used"
    assert f"{note}; all others can." in read.texts
    read = Reader(make_page(found, "run", "`prepare` would not start"))
    assert f"{note}." in read.texts and "`prepare` would not start" in read.texts


def test_the_head_counts_and_the_advice_is_that_of_prepare(found):
    read = Reader(make_page(found, "run"))
    values: dict[str, list[str]] = {}
    for i, text in enumerate(read.texts):
        values.setdefault(text, read.texts[i + 1 : i + 3])
    assert values["Clips"][0] == "1" and values["Clips"][1] == "of 1 of 1 file"
    assert values["Footage used"] == ["32%", "0.4 s of 1.3 s"]
    assert values["Stills"][0] == "0" and values["Buckets"][0] == "1" and values["Refused"][0] == "0"
    assert any(text.startswith("more than a third of the picture is lost in 1 clip:") for text in read.texts)
    assert any("data.clips" in text or "shorter buckets" in text for text in read.texts)


def test_a_page_of_refused_files_alone_is_a_page():
    read = Reader(make_page(Inspection(Inputs(), refused={"a.mp4": "broken"}), "run"))
    assert "broken" in read.texts and not read.all("article") and not read.all("svg")
