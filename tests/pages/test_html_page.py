import shutil
import time

import pytest
from PIL import Image

from mochi_tune.errors import MochiTuneError
from mochi_tune.pages import html_page
from mochi_tune.pages.html_page import Head, document, scrollable, section, write_png

HEAD = Head("<b>", "'\"&", {"<i>": ("1 < 2", "<u>")})
PAGE = document(HEAD, "p{color:red}", section("</h2>", "</p>", "<p>content</p>"))


def test_a_page_has_a_main_part_and_its_scrolling_areas_are_named_and_reached_by_the_keyboard():
    assert PAGE.count("<main>") == PAGE.count("</section></main></body>") == 1
    assert scrollable("<b>", "<i>") == (
        '<div class="scroll" tabindex="0" role="region" aria-label="&lt;b&gt;"><i></div>'
    )


def test_all_text_is_escaped_and_content_is_not():
    for tag in ("<b>", "<i>", "<u>", "</h2></h2>", "</p></p>"):
        assert tag not in PAGE
    assert "&lt;b&gt;" in PAGE and "<p>content</p>" in PAGE and "p{color:red}" in PAGE


@pytest.mark.skipif(not any(map(shutil.which, html_page.BROWSERS)), reason="no browser")
def test_of_a_high_page_the_picture_has_the_top(tmp_path):
    page = document(HEAD, "", '<div style="height:40000px"></div>')
    (tmp_path / "page.html").write_text(page)
    assert write_png(tmp_path / "page.html", tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").height == html_page.MAX_PICTURE_HEIGHT


def test_without_a_browser_there_is_no_picture(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text(PAGE)
    before = set(tmp_path.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert write_png(tmp_path / "report.html", tmp_path / "report.png") is False
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo first >&2; echo no display >&2; exit 3", "ended with 3 (no display)"),
        ("exit 0", "ended without a picture"),
        ("(while :; do echo x >> $0.ticks; sleep 0.1; done) & wait", "not drawn the page in 1 seconds"),
    ],
)
def test_a_browser_that_fails_is_reported_in_one_line(script, said, tmp_path, monkeypatch):
    browser, out = tmp_path / "bin" / "chromium", tmp_path / "out"
    browser.parent.mkdir()
    out.mkdir()
    browser.write_text(f"#!/bin/sh\n{script}\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{browser.parent}:/usr/bin:/bin")
    monkeypatch.setattr(html_page, "TIMEOUT_SECONDS", 1 if "sleep" in script else 600)
    (tmp_path / "report.html").write_text(PAGE)
    with pytest.raises(MochiTuneError) as error:
        write_png(tmp_path / "report.html", out / "report.png")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert list(out.iterdir()) == []
    ticks = browser.with_name("chromium.ticks")
    written = ticks.exists() and ticks.stat().st_size
    time.sleep(0.4)
    assert (ticks.exists() and ticks.stat().st_size) == written
