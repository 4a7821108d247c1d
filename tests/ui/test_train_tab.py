"""The charts of runs that are drawn over one another: each run can be told from the others."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from mochi_tune.ui import train_tab
from mochi_tune.ui.train_tab import charts_html


def write_run(folder: Path, number: int, validates: bool) -> str:
    run_dir = folder / "runs" / f"run_{number:02d}"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    if validates:
        (run_dir / "validation.jsonl").write_text(json.dumps({"step": 1, "validation_loss": 1.0}) + "\n")
    return f"runs/run_{number:02d}"


def test_runs_over_one_another_look_different_and_each_the_same_in_all_charts(tmp_path):
    names = [write_run(tmp_path, number, validates=number != 2) for number in range(20)]
    loss, validation = charts_html(tmp_path, names).split("<figure>")[1:]
    styles, others = (dict(re.findall(r'<i class="([^"]+)"></i>([^<]+)', chart)) for chart in (loss, validation))
    assert len(styles) == 20 and len(others) == 19 and styles | others == styles
    assert all(f'<polyline class="{style}"' in loss for style in styles)
    looks = (Path(train_tab.__file__).parent / "page.css").read_text()
    for word in {word for style in styles for word in style.split()[1:]}:
        assert f".charts polyline.{word} {{" in looks and f".charts .legend .{word} {{" in looks
