import re

from helpers_road import run
from PIL import Image

from mochi_tune.video import read_frames


def test_the_demo_walks_the_whole_road_and_names_what_it_made(tmp_path):
    done = run("demo", f"out={tmp_path / 'demo'}")
    assert done.returncode == 0, done.stderr
    paths = dict(line.split(":", 1) for line in done.stdout.splitlines()[-5:])
    paths = {label: path.strip() for label, path in paths.items()}
    first, last = re.match(r"([\d.]+) before, ([\d.]+) after", paths["validation loss"]).groups()
    assert float(last) < 0.95 * float(first)
    before, after = read_frames(paths["before"]), read_frames(paths["after"])
    assert len(before) == len(after) == 19 and before[0].size == (160, 96)
    assert any(a.tobytes() != b.tobytes() for a, b in zip(before, after, strict=True))
    with Image.open(paths["contact sheet"]) as sheet:
        assert sheet.format == "PNG" and sheet.width > 6 * 160 and sheet.height > 2 * 96
    for verb in ("prepare", "train", "sample", "export"):
        assert f"$ mochi-tune {verb} " in done.stdout
