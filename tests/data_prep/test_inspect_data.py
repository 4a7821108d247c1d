import shutil
from pathlib import Path

import pytest
from helpers_prepare import config_for
from helpers_process import run
from helpers_video import write_video

import mochi_tune
from mochi_tune.data_prep.inspect_data import main
from mochi_tune.errors import ConfigError
from mochi_tune.pages import html_page

TOKENIZERS = Path(mochi_tune.__file__).parent / "assets"


def add_clip(folder: Path, name: str, num_frames: int) -> None:
    folder.mkdir(exist_ok=True)
    write_video(folder / name, num_frames, width=96, height=64)
    (folder / name).with_suffix(".txt").write_text(f"the caption of {name}")


def test_the_verb_writes_a_page_without_weights(tmp_path):
    videos = tmp_path / "videos"
    add_clip(videos, "good.mp4", 13)
    sizes = ["data.num_frames=7", "data.height=32", "data.width=48"]
    more = ["model.weights=nowhere", "data.videos=videos", "data.cache=cache"]
    (videos / "still.png").touch()
    for name in ("notes.pdf", "README.md"):
        (videos / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (videos / "far").symlink_to(tmp_path / "elsewhere")
    command = ["inspect", "conf=my_lora", *sizes, *more]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not used: 1 still (still.png): data.buckets=auto or a bucket of one frame uses them" in done.stdout
    assert "not used: 1 file (notes.pdf)\n" in done.stdout and "README.md" not in done.stdout
    assert "not used: videos/far is a link to a folder, which is not followed: add that folder" in done.stdout
    assert "1 clip, 0 refused" in done.stdout + done.stderr
    page = (tmp_path / "runs/my_lora/inspect/inspect.html").read_text()
    assert "the caption of good.mp4" in page and "is unknown" in page
    has_browser = any(map(shutil.which, html_page.BROWSERS))
    assert (tmp_path / "runs/my_lora/inspect/inspect.png").exists() == has_browser
    # A refused file gives exit code 1, and a page of the others.
    add_clip(videos, "short.mp4", 3)
    add_clip(videos, "bad.mp4", 7)
    (videos / "bad.txt").write_bytes(b"a\0")
    done = run(*command, "out=else where", "model=tiny", "model.weights=package:tiny", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    # Each refused file is reported once.
    assert done.stdout.count("short.mp4") == done.stdout.count("bad.txt") == 1
    page = (tmp_path / "else where/inspect.html").read_text()
    assert "the caption of good.mp4" in page and "short.mp4: is too short" in page and "tokens)" in page


def test_clips_without_a_caption_are_refused_unless_that_is_allowed(tmp_path, monkeypatch, capsys):
    """`prepare` would not start."""
    # Without a browser: its picture takes seconds.
    monkeypatch.setenv("PATH", "/nowhere")
    add_clip(tmp_path / "videos", "mute.mp4", 7)
    (tmp_path / "videos/mute.txt").unlink()
    nowhere = tmp_path / "weights"
    assert main(config_for(tmp_path, nowhere, allow_empty_captions=False), tmp_path / "page") == 1
    obstacle = "without a caption, so that `prepare` would not start: 1 clip (mute.mp4)"
    page = tmp_path / "page/inspect.html"
    assert obstacle in capsys.readouterr().out and f"<li>{obstacle}</li>" in page.read_text()
    assert main(config_for(tmp_path, nowhere), tmp_path / "page") == 0
    assert obstacle not in page.read_text()


def test_the_picture_of_the_page_does_not_become_a_clip(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    add_clip(tmp_path / "videos", "a.mp4", 7)
    config = config_for(tmp_path, tmp_path / "weights")
    for out in (tmp_path / "videos", tmp_path / "videos" / "page"):
        with pytest.raises(ConfigError, match=r"is in the folder of the videos, .* where inspect\.png would lie"):
            main(config, out)
    assert main(config, tmp_path) == 0
    # The page of a run goes where it always does, also if the clips lie around it.
    monkeypatch.chdir(tmp_path)
    assert main(config_for(tmp_path, tmp_path / "weights", videos="."), None) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["out="], "out= is empty"),
        (["out=file/below"], "file"),
        (["data.videos=nowhere"], "data.videos=nowhere does not exist"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path, arguments, text):
    (tmp_path / "file").write_text("")
    done = run("inspect", "conf=my_lora", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr
