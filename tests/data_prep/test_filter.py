import csv
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers_film import paint_part, write_frames
from helpers_process import Disturbance, Program, run
from helpers_video import write_bad_video
from PIL import Image, ImageFilter

from mochi_tune.data_prep import filter as filter_story
from mochi_tune.data_prep.clip_scores import (
    Scores,
    count_border,
    hash_picture,
    laplacian_variance,
    largest_change,
    measure_clip,
)
from mochi_tune.data_prep.duplicates import find_duplicates, find_nearest, shifted_distance
from mochi_tune.data_prep.filter import Filter, FilterLimits, judge, main, undo
from mochi_tune.data_prep.moving import Moved, files_of_clip, move_clip, move_file, read_moved, undo_moves
from mochi_tune.errors import DataError


def parts(part: str, count: int = 24) -> list[np.ndarray]:
    return [paint_part(part, index) for index in range(count)]


def write_clips(folder: Path) -> None:
    """Writes clips that are good or have one fault each, with captions."""
    folder.mkdir()
    bars = parts("third")
    for picture in bars:
        picture[:16] = picture[-16:] = 0
    noise = np.random.default_rng(5).integers(0, 255, (128, 192, 3), dtype=np.uint8)
    texture = np.roll(noise, 3, 0) // 2 + noise // 2
    blurred = [Image.fromarray(np.roll(texture, 4 * i, 1)).filter(ImageFilter.GaussianBlur(9)) for i in range(24)]
    # A narrow strip flickers: no two pictures are equal, but there is hardly any motion.
    still = [texture[::-1, ::-1].copy() for _ in range(24)]
    for index, picture in enumerate(still):
        picture[:, :12] = picture[:, :12] // 2 + 4 * (index % 2)
    clips = {
        "good": parts("first", 30),
        "black": parts("black"),
        "frozen": parts("second", 30),
        "same": parts("first", 30),
        "bars": bars,
        "blurred": [np.asarray(picture) for picture in blurred],
        "still": still,
    }
    for name, frames in clips.items():
        write_frames(folder / f"{name}.mp4", frames, crf=23 if name == "same" else 8)
        (folder / f"{name}.txt").write_text(f"caption of {name}")


VERDICTS = {
    "bars.mp4": "border", "black.mp4": "black", "blurred.mp4": "blurred",
        "frozen.mp4": "frozen", "good.mp4": "good", "same.mp4": "duplicate", "still.mp4": "still",
}  # fmt: skip


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "videos_filter/filter.csv", newline="") as file:
        return {row["clip"]: row for row in csv.DictReader(file)}


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which clips were filtered, one of them damaged."""
    folder = tmp_path_factory.mktemp("filter")
    write_clips(folder / "videos")
    write_bad_video(folder / "videos", "garbage")
    # Without a browser, which takes a second.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filter_story, "write_png", lambda page, png: False)
        assert main(Filter(folder / "videos")) == 1
    (folder / "videos/bad.mp4").unlink()
    return folder


@pytest.fixture
def copy(made, tmp_path):
    # With their modification times, by which measured clips are recognized.
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_each_fault_is_found_and_nothing_else(made):
    rows = rows_of(made)
    assert {name: row["verdict"] for name, row in rows.items()} == VERDICTS | {"bad.mp4": "unreadable"}
    assert rows["same.mp4"]["duplicate_of"] == "good.mp4"
    assert "cannot be read as a video" in rows["bad.mp4"]["reason"]
    assert float(rows["black.mp4"]["black"]) == 1
    # The last 14 of its 30 pictures equal the previous one; 29 have a previous one.
    assert float(rows["frozen.mp4"]["frozen"]) == pytest.approx(14 / 29, abs=0.04)
    assert [int(rows["bars.mp4"][side]) for side in ("left", "top", "right", "bottom")] == [0, 16, 0, 16]
    page = (made / "videos_filter/filter.html").read_text()
    assert all(f"<h3>{name}</h3>" in page for name, verdict in VERDICTS.items() if verdict != "good")
    assert "<h3>good.mp4</h3>" not in page and "bad.mp4: cannot be read" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # Every move is reported.
    assert sorted(path.name for path in (made / "videos").glob("*.mp4")) == sorted(VERDICTS)


def test_flagged_clips_move_with_their_captions_and_back(copy):
    before = names_in(copy / "videos")
    (copy / "videos_filter/moved").mkdir()
    (copy / "videos_filter/moved/still.txt").write_text("another")
    done = run("filter", "videos=videos", "move=true", cwd=copy, env={"PATH": "/nowhere"})
    assert done.returncode == 1 and "moved/still.txt: exists already" in done.stdout + done.stderr, done.stderr
    assert names_in(copy / "videos") == ["good.mp4", "good.txt", "still.mp4", "still.txt"]
    moved = names_in(copy / "videos_filter/moved")
    assert moved == sorted({*before, "still.txt"} - {"good.mp4", "good.txt", "still.mp4"})
    assert (copy / "videos_filter/moved/still.txt").read_text() == "another"
    assert {row.reason for row in read_moved(copy / "videos_filter/moved.csv")} == {
        "border", "black", "blurred", "duplicate", "frozen",
    }  # fmt: skip
    for text in ("files were moved back", "all are back"):
        done = run("filter", "videos=videos", "undo=true", cwd=copy)
        assert done.returncode == 0 and text in done.stdout and names_in(copy / "videos") == before


def test_where_nothing_was_moved_no_move_is_told_and_none_undone(copy):
    off = [f"{key}=off" for key in ("max_black", "max_frozen", "min_sharpness", "min_motion", "max_border")]
    arguments = ["filter", "videos=videos", "duplicate_distance=off", *off, "move=true"]
    done = run(*arguments, cwd=copy, env={"PATH": "/nowhere"})
    assert done.returncode == 0 and "were moved" not in done.stdout and "undo" not in done.stdout, done.stderr
    done = run("filter", "videos=videos", "undo=true", cwd=copy)
    assert done.returncode == 2 and "there is nothing to undo" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("ending", "nth"),
    # Killed before the caption is moved; with the clip at both paths; and before the table has the rows.
    [("videos/black.txt", 1), ("videos/black.mp4", 2), (".moved.csv.tmp", 1)],
)
def test_a_move_that_is_killed_in_the_middle_goes_on(copy, ending, nth):
    arguments = ["filter", f"videos={copy / 'videos'}", "move=true"]
    disturbance = Disturbance(under=copy, signal_before=ending, nth=nth)
    program = Program(arguments, copy / "log", disturbance, env={"PATH": "/nowhere"})
    assert program.wait() == -9, program.text()
    # Killed at the first clip for the table, else at the second.
    assert (copy / "videos/black.mp4").exists() and not (copy / "videos/bars.mp4").exists()
    assert (copy / "videos_filter/moving.json").exists()
    (copy / "videos_filter/.scores.jsonl.abcdef-1.tmp").touch()
    done = run(*arguments, env={"PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    assert f"its interrupted move to {copy}/videos_filter/moved/b" in done.stdout
    assert rows_of(copy)["bars.mp4" if "csv" in ending else "black.mp4"]["verdict"] != "good"
    assert names_in(copy / "videos") == ["good.mp4", "good.txt"] and not list((copy / "videos_filter").glob(".*.tmp"))
    rows = read_moved(copy / "videos_filter/moved.csv")
    assert len(rows) == len(set(rows)) == 12 and all(Path(row.moved).exists() for row in rows)
    assert all((copy / "videos_filter/moved" / f"{name}.txt").exists() for name in ("bars", "black", "still"))


def test_limits_are_settings(copy):
    off = [f"{key}=off" for key in ("max_black", "max_frozen", "min_sharpness", "max_border", "duplicate_distance")]
    done = run("filter", "videos=videos", "min_motion=50", *off, cwd=copy, env={"PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    assert {row["verdict"] for row in rows_of(copy).values()} == {"still"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["videos=nowhere"], "videos=nowhere does not exist"),
        (["videos=empty"], "videos=empty holds no video"),
        (["videos=videos", "out=videos/report"], "out=videos/report is inside the clips"),
        (["videos=videos", "move=True"], "use true, false or a folder, such as ./True."),
        (["videos=videos", "move=yes"], "move=yes is not possible: use true, false or a folder, such as ./yes."),
        (["videos=videos", "move=videos/bad"], "move=videos/bad is inside the clips"),
        (["videos=videos", "max_black=2"], "max_black=2 does not fit"),
        (["videos=videos", "min_motion=none"], "min_motion=none does not fit"),
        (["videos=videos", "undo=yes"], "undo=yes is not possible"),
    ],
)
def test_bad_settings_are_one_line(copy, arguments, text):
    (copy / "empty").mkdir()
    done = run("filter", *arguments, cwd=copy)
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_file_never_replaces_another_one(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(DataError, match="exists already"):
        move_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "b" and (tmp_path / "a").read_text() == "a"
    move_file(tmp_path / "a", tmp_path / "below/c")
    assert names_in(tmp_path) == ["b", "below/c"]
    assert Moved("a", "b", "c") == Moved("a", "b", "c")


def test_borders_are_counted_where_they_are_black_in_every_picture():
    picture = np.full((60, 80), 120, np.uint8)
    picture[:7] = 16
    picture[:, -5:] = 4
    other = picture.copy()
    other[5:7] = 90
    assert count_border([picture], 0) == (7, 0) and count_border([picture, other], 0) == (5, 0)
    assert count_border([picture], 1) == (0, 5)
    # Entirely dark, or with a dark part that is not a uniform bar.
    assert count_border([np.zeros((60, 80), np.uint8)], 0) == (0, 0)
    picture[:7, ::2] = 0
    assert count_border([picture], 0) == (0, 0)


def test_sharpness_falls_with_blur_and_a_flat_picture_has_none():
    grey = np.random.default_rng(0).integers(0, 255, (90, 120), dtype=np.uint8)
    blurred = [Image.fromarray(grey).filter(ImageFilter.GaussianBlur(radius)) for radius in range(4)]
    values = [laplacian_variance(np.asarray(picture)) for picture in blurred]
    assert values == sorted(values, reverse=True) and values[0] > 10 * values[2]
    assert laplacian_variance(np.full((50, 50), 99, np.uint8)) == 0 == laplacian_variance(np.zeros((2, 2), np.uint8))


def test_one_block_that_changes_is_a_change():
    grey = np.full((64, 64), 100, np.uint8)
    other = grey.copy()
    other[8:16, 16:24] += 40
    assert largest_change(grey, other) == 40 and largest_change(grey, grey) == 0


def test_hashes_survive_size_and_light_and_tell_pictures_apart():
    one, other = (paint_part(part, 0)[..., 1] for part in ("first", "third"))
    small = np.asarray(Image.fromarray(one).resize((96, 64), Image.Resampling.BOX))
    pictures = {"one": one, "small": small, "light": one // 2 + 40, "other": other}
    hashes = {name: [hash_picture(picture)] * 8 for name, picture in pictures.items()}
    nearest = find_nearest(hashes)
    assert max(nearest[name] for name in ("one", "small", "light")) < 0.05 < 0.25 < nearest["other"]
    assert find_duplicates(hashes, 0.1) == {"small": "one", "light": "one"}
    # A picture without contrast has no hash, and no near clip.
    flat = {"a": [hash_picture(np.zeros((40, 40), np.uint8))] * 8, "b": [""] * 8, "c": []}
    assert find_nearest(flat) == {"a": 1, "b": 1, "c": 1} and find_duplicates(flat, 0.5) == {}
    assert find_nearest({}) == {} == find_duplicates({}, 0.1)


def pan(first: int, seed: int = 0) -> list[np.ndarray]:
    """Returns pictures of a camera pan over a pattern, from a start picture."""
    world = np.random.default_rng(seed).integers(0, 255, (4, 20), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    return [np.repeat(world[:, i : i + 192, None], 3, 2) for i in range(first, first + 60)]


def test_a_copy_that_begins_later_is_found_where_much_moves(tmp_path):
    clips = {"a": pan(0), "b": pan(13), "c": pan(0, seed=1), "d": pan(150)}
    found = {}
    for name, frames in clips.items():
        write_frames(tmp_path / f"{name}.mp4", frames)
        *_, values = measure_clip(tmp_path / f"{name}.mp4")
        found[f"{name}.mp4"] = Scores(**{**values, "hashes": tuple(values["hashes"])})
    hashes, timelines = ({name: getattr(each, key) for name, each in found.items()} for key in ("hashes", "timeline"))
    # The eight sampled pictures of the two clips show different parts.
    assert 0.1 < find_nearest({name: hashes[name] for name in ("a.mp4", "b.mp4")})["b.mp4"] < 0.35
    assert shifted_distance(timelines["a.mp4"], timelines["b.mp4"]) < 0.1
    assert shifted_distance(timelines["b.mp4"], timelines["a.mp4"]) < 0.1
    assert shifted_distance(timelines["a.mp4"], "") == 1
    for name in ("c.mp4", "d.mp4"):
        assert shifted_distance(timelines["a.mp4"], timelines[name]) > 0.2
    judged = {each.name: each for each in judge(found, FilterLimits())}
    [copy] = [each for each in judged.values() if each.duplicate_of]
    assert {copy.name, copy.duplicate_of} == {"a.mp4", "b.mp4"} and copy.nearest < 0.1


def test_a_clip_that_is_gone_has_its_verdict_and_the_others_theirs(tmp_path):
    (tmp_path / "videos").mkdir()
    write_frames(tmp_path / "videos" / "good.mp4", parts("first", 30), crf=8)
    (tmp_path / "videos" / "gone.mp4").symlink_to("/nowhere.mp4")
    done = run("filter", f"videos={tmp_path / 'videos'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    with open(tmp_path / "videos_filter" / "filter.csv", newline="") as file:
        verdicts = {Path(row["clip"]).name: row["verdict"] for row in csv.DictReader(file)}
    assert verdicts == {"gone.mp4": "unreadable", "good.mp4": "good"}


def moved(root: Path, text: str = "a") -> Path:
    """Returns the table of a project whose clip and caption were moved with `move_clip`."""
    (root / "videos").mkdir(parents=True)
    table = root / "videos_filter" / "moved.csv"
    table.parent.mkdir()
    for name in ("clip.mp4", "clip.txt"):
        (root / "videos" / name).write_text(f"{text} {name}")
    pairs = [(root / "videos" / name, root / "videos_filter" / "moved" / name) for name in ("clip.txt", "clip.mp4")]
    move_clip(table, pairs, "black")
    return table


def test_a_project_that_was_moved_or_copied_takes_its_table_along(tmp_path):
    moved(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    (tmp_path / "first").rename(tmp_path / "second")
    for root in (tmp_path / "copy", tmp_path / "second"):
        table = root / "videos_filter" / "moved.csv"
        assert undo_moves(table, read_moved(table)) == (2, [], [])
        assert sorted(path.name for path in (root / "videos").iterdir()) == ["clip.mp4", "clip.txt"]
        assert read_moved(table) == []


def test_what_is_not_to_be_found_stays_in_the_table(tmp_path, capsys):
    table = moved(tmp_path)
    (tmp_path / "videos_filter" / "moved" / "clip.mp4").rename(tmp_path / "elsewhere.mp4")
    settings = Filter(tmp_path / "videos", tmp_path / "videos_filter")
    assert undo(settings) == 1 and "1 file not found" in capsys.readouterr().out
    [row] = read_moved(table)
    assert row.original == str(tmp_path / "videos" / "clip.mp4") and (tmp_path / "videos" / "clip.txt").exists()
    (tmp_path / "elsewhere.mp4").rename(row.moved)
    assert undo(settings) == 0 and read_moved(table) == [] and (tmp_path / "videos" / "clip.mp4").exists()


@pytest.mark.parametrize("taken", ["clip.mp4", "clip.txt"])
def test_a_clip_whose_place_is_taken_stays_with_its_caption_and_the_others_go_back(tmp_path, capsys, taken):
    table = moved(tmp_path)
    away = tmp_path / "videos_filter" / "moved"
    for name in ("a.mp4", "z.mp4"):
        (tmp_path / "videos" / name).write_text(name)
        move_clip(table, [(tmp_path / "videos" / name, away / name)], "black")
    (tmp_path / "videos" / taken).write_text("another")
    settings = Filter(tmp_path / "videos", tmp_path / "videos_filter")
    for count in (2, 0):
        assert undo(settings) == 1
        told = capsys.readouterr().out
        assert f"{away / taken}: was not moved back, as {tmp_path / 'videos' / taken} exists already\n" in told
        assert f"{count} files were moved back\n2 files not moved back: {table} still lists them" in told
        assert contents(away) == {"clip.mp4": "a clip.mp4", "clip.txt": "a clip.txt"}
        assert contents(tmp_path / "videos") == {"a.mp4": "a.mp4", "z.mp4": "z.mp4", taken: "another"}
        assert [Path(row.moved).name for row in read_moved(table)] == ["clip.txt", "clip.mp4"]
    (tmp_path / "videos" / taken).rename(tmp_path / "another")
    assert undo(settings) == 0 and read_moved(table) == [] and not contents(away)
    assert sorted(contents(tmp_path / "videos")) == ["a.mp4", "clip.mp4", "clip.txt", "z.mp4"]


def test_a_clip_that_was_moved_twice_comes_back_from_the_later_move(tmp_path):
    table = moved(tmp_path)
    clip, later = tmp_path / "videos" / "clip.mp4", tmp_path / "later" / "clip.mp4"
    clip.write_text("second")
    move_clip(table, [(clip, later)], "black")
    count, absent, [reason, _] = undo_moves(table, read_moved(table))
    assert (count, absent, clip.read_text()) == (1, [], "second") and "clip.mp4 stays" in reason


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_caption_goes_with_its_clip_however_an_accent_is_written(tmp_path):
    clip, caption = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for name in (f"{clip}.mp4", f"{caption}.txt"):
        (tmp_path / name).touch()
    assert files_of_clip(tmp_path / f"{clip}.mp4") == [tmp_path / f"{caption}.txt", tmp_path / f"{clip}.mp4"]
    # Clips whose names differ only in accents keep the files with their exact name.
    (tmp_path / f"{caption}.mp4").touch()
    assert files_of_clip(tmp_path / f"{clip}.mp4") == [tmp_path / f"{clip}.mp4"]
    assert files_of_clip(tmp_path / f"{caption}.mp4") == [tmp_path / f"{caption}.txt", tmp_path / f"{caption}.mp4"]


@pytest.mark.parametrize("name", [".", "..", "../sub/.."])
def test_the_report_of_the_working_folder_lies_beside_it(tmp_path, name):
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    write_frames(tmp_path / "videos" / "good.mp4", parts("first", 30), crf=8)
    cwd = tmp_path / "videos" if name == "." else tmp_path / "videos" / "sub"
    done = run("filter", f"videos={name}", cwd=cwd, env={"PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path)["good.mp4"]["verdict"] == "good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["videos", "videos_filter"]


def test_beside_the_whole_disk_is_no_place_for_a_report(tmp_path):
    for more in ([], ["move=true"], ["undo=true"]):
        done = run("filter", "videos=/", *more, cwd=tmp_path)
        assert done.returncode == 2 and "use out=DIR" in done.stderr and done.stderr.count("\n") == 1, done.stderr
