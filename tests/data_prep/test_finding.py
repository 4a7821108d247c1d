from pathlib import Path

import pytest
from PIL import Image

from mochi_tune.data_prep.finding import STILL, TAKES_STILLS, find_unused, find_videos, list_videos
from mochi_tune.errors import DataError


def test_hidden_folders_are_left_out_and_linked_ones_told_of(tmp_path):
    """File managers keep what was deleted in a hidden folder of the disk."""
    videos, real = tmp_path / "videos", tmp_path / "real"
    for folder in (videos / ".Trash-1000" / "files", videos / "more", real):
        folder.mkdir(parents=True)
        (folder / "clip.mp4").touch()
    (videos / "linked").symlink_to(real)
    assert find_videos(videos) == [videos / "more" / "clip.mp4"]
    unused = find_unused(videos, find_videos(videos))
    assert (
        list(unused) == [videos / "linked"]
        and "is a link to a folder, which is not followed" in unused[videos / "linked"]
    )


def test_a_folder_of_stills_alone_names_them_and_what_takes_them(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.jpg").touch()
    with pytest.raises(DataError) as caught:
        find_videos(tmp_path, takes_stills=TAKES_STILLS)
    assert f"={tmp_path} holds no video but 9 stills (0.jpg, 1.jpg, 2.jpg, 3.jpg and 5 more): put" in str(caught.value)
    assert str(caught.value).endswith(", or include the stills with data.buckets=auto or a bucket of one frame.")
    # Verbs that cut films do not use stills.
    with pytest.raises(DataError, match=r"^in=\S+ holds no video but 9 stills .*: put clips in it \([^)]*\)\.$"):
        find_videos(tmp_path, setting="in")
    assert len(find_videos(tmp_path, with_stills=True)) == 9


def test_an_animated_webp_is_a_video_and_a_plain_one_a_still(tmp_path):
    one, other = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    exif = Image.Exif()
    exif[0x0112] = 6
    one.save(tmp_path / "plain.webp")
    one.save(tmp_path / "turned.webp", exif=exif)  # With an extended header.
    (tmp_path / "empty.webp").touch()
    (tmp_path / "gone.webp").symlink_to("nowhere")
    stills = ["empty.webp", "gone.webp", "plain.webp", "turned.webp"]
    with pytest.raises(DataError, match=r"no video but 4 stills"):
        find_videos(tmp_path, takes_stills=TAKES_STILLS)
    one.save(tmp_path / "moving.WebP", save_all=True, append_images=[other])
    found = find_videos(tmp_path, takes_stills=TAKES_STILLS)
    assert found == list_videos(tmp_path) == [tmp_path / "moving.WebP"]
    unused = find_unused(tmp_path, found)
    assert [path.name for path in unused] == stills and all(why.endswith(STILL) for why in unused.values())
    # Verbs that cut films read no picture files.
    with pytest.raises(DataError, match=r"no video but 5 stills"):
        find_videos(tmp_path, setting="in")


def test_runs_and_caches_of_the_program_are_passed_over_unless_they_are_named(tmp_path, monkeypatch):
    runs = {
        "runs/one": "metrics.jsonl",
        "runs/two": "checkpoints/step_1/x",
        "cache": "data/train-00000-of-00001.parquet",
    }
    for folder, mark in runs.items():
        (tmp_path / folder / mark).parent.mkdir(parents=True)
        (tmp_path / folder / mark).touch()
        (tmp_path / folder / ("manifest.json" if folder == "cache" else "config.yaml")).touch()
    for name in ("runs/one/samples/step_1.mp4", "runs/two/samples/step_1.mp4", "cache/x.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"holds no video but output of mochi-tune \(.*cache is a cache of mochi-tune"):
        find_videos(tmp_path)
    # Files of another program with these names.
    others = ["set/data/a.mp4", "lesson/b.mp4"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "set/manifest.json").touch()
    (tmp_path / "lesson/config.yaml").touch()
    assert find_videos(tmp_path) == sorted(tmp_path / name for name in others)
    monkeypatch.chdir(tmp_path)
    unused = find_unused(Path("."), find_videos(Path(".")))
    made = {path.as_posix(): why for path, why in unused.items() if "mochi-tune" in why}
    assert made == {
        "cache": "cache: is a cache of mochi-tune",
        "runs/one": "runs/one: is a run of mochi-tune",
        "runs/two": "runs/two: is a run of mochi-tune",
    }
    assert find_videos(tmp_path / "runs/one") == [tmp_path / "runs/one/samples/step_1.mp4"]


def test_reconstructions_of_another_trainer_are_no_clips(tmp_path):
    for name in ("a.mp4", "a.recon.mp4"):
        (tmp_path / name).touch()
    assert find_videos(tmp_path) == [tmp_path / "a.mp4"]
    [why] = find_unused(tmp_path, [tmp_path / "a.mp4"]).values()
    assert why.endswith("a.recon.mp4: is a reconstruction that genmo's trainer wrote, not a clip")
