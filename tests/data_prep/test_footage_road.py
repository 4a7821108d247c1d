"""From a film to a captioned data set by four commands, as docs/footage.md shows them."""

from pathlib import Path

from helpers_chat import CAPTION, ChatServer, Reply
from helpers_film import NUMBERS, numbers_of, write_film
from helpers_process import run

from mochi_tune.config.load import load_config
from mochi_tune.config.sources import buckets_by_source
from mochi_tune.data.cache import open_cache

DATA = ["data.num_frames=13", "data.height=32", "data.width=48", "data.clips=all", "model=tiny", "device=cpu"]


def test_a_film_becomes_the_right_captioned_data_set(tmp_path):
    (tmp_path / "footage").mkdir()
    write_film(tmp_path / "footage" / "film.mp4")
    videos = tmp_path / "videos"
    commands = [
        ["split", f"in={tmp_path / 'footage'}", f"out={videos}", "min_seconds=0.5", "margin_seconds=0"],
        ["filter", f"videos={videos}", "move=true"],
        ["describe", f"videos={videos}", "model=seer", "trigger=TOK,"],
        ["prepare", "conf=my_lora", *DATA, f"data.videos={videos}", f"data.cache={tmp_path / 'cache'}"],
    ]
    with ChatServer(lambda request, number: Reply(CAPTION)) as server:
        commands[2].append(f"endpoint={server.url}")
        for command in commands:
            done = run(*command, cwd=tmp_path)
            assert done.returncode == 0, (command, done.out if hasattr(done, "out") else done.stdout, done.stderr)
    clips = sorted(path for path in videos.glob("*.mp4"))
    first, third = (set(NUMBERS[part]) for part in ("first", "third"))
    # One copy of the duplicate scene is left; the black and the frozen clip are moved.
    kept = [set(numbers_of(clip)) for clip in clips]
    assert len(kept) == 2 and kept[0] <= first and kept[1] <= third
    assert all(len(numbers) > 30 for numbers in kept)
    assert all(clip.with_suffix(".txt").read_text().startswith("TOK") for clip in clips)
    config = load_config("my_lora", [*DATA, f"data.cache={tmp_path / 'cache'}"])
    rows = open_cache(Path(config.data.cache), buckets_by_source(config.data)).rows
    assert {row.path for row in rows} == {clip.name for clip in clips} and len(rows) == 2 * len(clips) + 2
