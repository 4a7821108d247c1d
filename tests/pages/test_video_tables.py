import re
import shutil

import pytest

from mochi_tune.pages import html_page, video_tables
from mochi_tune.pages.html_page import Head, document, scrollable

# Adds to the document what is in view before and after clicks on a video and on the button.
PROBE = """
<script>
addEventListener("load",()=>{const area=document.querySelector(".scroll"),button=document.querySelector("button"),
video=document.querySelector("video"),right=e=>e.getBoundingClientRect().right,told=[button.textContent];
video.click();told.push(button.textContent);button.click();told.push(button.textContent);
told.push(area.scrollLeft>0&&Math.abs(right(document.querySelector(".best"))-right(area))<2);
document.body.dataset.told=told.join()})</script>
"""


@pytest.mark.skipif(not any(map(shutil.which, html_page.BROWSERS)), reason="no browser")
@pytest.mark.parametrize(
    ("flags", "told"), [([], "Pause,Play,Pause,true"), (["--force-prefers-reduced-motion"], "Play,Pause,Play,true")]
)
def test_videos_can_be_paused_and_the_best_column_is_in_view(tmp_path, flags, told):
    head = "".join(f"<th{' class=best' if step == 3 else ''}>step {step}</th>" for step in range(5))
    cells = '<td><video loop muted style="width:400px"></video></td>' * 5
    table = scrollable("Samples", f"<table><tr>{head}</tr><tr>{cells}</tr></table>")
    page = tmp_path / "page.html"
    page.write_text(document(Head("run", "", {}), video_tables.STYLE, table + video_tables.SCRIPT + PROBE))
    browser = next(filter(None, map(shutil.which, html_page.BROWSERS)))
    dom = html_page._browse(browser, page, *flags, "--window-size=900,800", "--dump-dom")
    assert re.search(f'data-told="{told}"', dom), re.search(r'data-told="[^"]*"', dom)
