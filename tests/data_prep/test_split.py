import csv
import errno
import fcntl
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_film import NUMBERS, numbers_of, write_film
from helpers_process import Disturbance, Program, run
from helpers_video import write_bad_video
from PIL import Image

from mochi_tune.data_prep.output_folder import lock_folder
from mochi_tune.data_prep.scenes import SceneRules
from mochi_tune.data_prep.split import Split, check_settings
from mochi_tune.errors import ConfigError

SETTINGS = ["min_seconds=1", "margin_seconds=0"]
CLIPS = [f"film_scene_{number:03d}.mp4" for number in range(1, 6)]


def split(folder: Path, *more: str, **options):
    return run("split", "in=footage", "out=videos", *SETTINGS, *more, cwd=folder, **options)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "videos_split/scenes.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    with open(folder / "videos_split/scenes.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def files_of(folder: Path) -> dict[str, int]:
    """Returns the modification time of each output file, except the lock, which every run opens."""
    files = [path for name in ("videos", "videos_split") for path in (folder / name).rglob("*")]
    return {str(path): path.stat().st_mtime_ns for path in files if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a film that was split."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "footage").mkdir()
    write_film(folder / "footage/film.mp4")
    done = split(folder)
    assert done.returncode == 0, done.stderr
    assert "5 clips, 7.6 s, of 1 film; written now: 5, too short: 0, refused: 0" in done.stderr + done.stdout
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_each_scene_is_a_clip_exactly_to_the_frame(made):
    assert sorted(path.name for path in (made / "videos").iterdir()) == CLIPS
    assert [numbers_of(made / "videos" / name) for name in CLIPS] == list(NUMBERS.values())
    rows = rows_of(made)
    assert [row["file"] for row in rows] == CLIPS
    assert [int(row["frames"]) for row in rows] == [len(numbers) for numbers in NUMBERS.values()]
    assert [row["start_seconds"] for row in rows] == ["0.0", "1.5", "3.0", "4.6", "6.1"]
    sheet = Image.open(made / "videos_split/scenes.png").convert("RGB")
    # The sheet shows the first scene's square on the first clip, and the second clip black.
    first = sheet.crop((14, 14, 166, 100))
    assert any(red > 200 and green > 190 and blue < 120 for _, (red, green, blue) in first.getcolors(20000))
    second = sheet.crop((14 + 474 + 30, 14 + 10, 14 + 474 + 120, 14 + 70))
    assert max(max(colour) for _, colour in second.getcolors(20000)) < 30


def test_filter_finds_the_black_the_frozen_and_the_doubled_clip_and_nothing_else(copy):
    done = run("filter", "videos=videos", "move=true", cwd=copy, env={"PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    with open(copy / "videos_filter/filter.csv", newline="") as file:
        verdicts = [row["verdict"] for row in csv.DictReader(file)]
    assert verdicts == ["good", "black", "frozen", "good", "duplicate"]
    assert sorted(path.name for path in (copy / "videos").iterdir()) == [CLIPS[0], CLIPS[3]]
    # Clips that were moved away are not cut again.
    done = split(copy)
    assert done.returncode == 0 and "2 clips" in done.stdout + done.stderr


def test_a_second_run_writes_nothing(copy):
    before = files_of(copy)
    done = split(copy)
    assert done.returncode == 0 and "written now: 0" in done.stdout + done.stderr
    assert files_of(copy) == before


def test_a_split_that_is_killed_goes_on(made, tmp_path):
    shutil.copytree(made / "footage", tmp_path / "footage")
    # Killed before the third clip is renamed.
    program = Program(
        ["split", "in=footage", "out=videos", *SETTINGS], tmp_path / "log",
        Disturbance(under="videos/", signal_before=".film_scene_003.mp4.tmp"), cwd=tmp_path,
    )  # fmt: skip
    assert program.wait() == -9, program.text()
    there = sorted(path.name for path in (tmp_path / "videos").glob("*.mp4"))
    assert there == CLIPS[:2]
    # A clip that is moved away now is known to have been cut.
    assert [row["status"] for row in rows_of(tmp_path)][:3] == ["cut", "cut", ""]
    first = (tmp_path / "videos" / CLIPS[0]).stat().st_mtime_ns
    (tmp_path / "videos_split/.scenes.csv.abcdef-1.tmp").touch()
    done = split(tmp_path)
    assert not list((tmp_path / "videos_split").glob(".*.tmp"))
    assert done.returncode == 0 and "written now: 3" in done.stdout + done.stderr, done.stderr
    assert "finding scenes" not in done.stderr
    assert (tmp_path / "videos" / CLIPS[0]).stat().st_mtime_ns == first
    assert [numbers_of(tmp_path / "videos" / name) for name in CLIPS] == list(NUMBERS.values())
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == CLIPS


def test_settings_of_no_table_that_cannot_be_read_are_written_anew(tmp_path):
    before = Split(tmp_path, tmp_path / "videos", SceneRules())
    before.report.mkdir()
    (before.report / "settings.json").write_text('{"min_sec')
    check_settings(before, has_table=False)
    check_settings(before, has_table=True)
    with pytest.raises(ConfigError, match="was made with crf=12, now crf=13"):
        check_settings(replace(before, crf=13), has_table=True)


def test_the_table_may_be_edited_and_no_foreign_file_is_replaced(copy):
    rows = rows_of(copy)
    rows[0]["end_seconds"] = "1"
    rows[2]["file"] = "frozen/other.mp4"
    rows[3]["file"] = ""
    rows[4]["file"] = "mine.mp4"
    write_rows(copy, rows)
    (copy / "videos/mine.mp4").write_bytes(b"no video of this split")
    write_bad_video(copy / "footage", "garbage")
    before = files_of(copy)
    done = split(copy)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    after = files_of(copy)
    text = done.stdout + done.stderr
    assert numbers_of(copy / "videos" / CLIPS[0]) == list(range(30))
    assert numbers_of(copy / "videos/frozen/other.mp4") == NUMBERS["second"]
    assert "mine.mp4: exists and was not cut from film.mp4" in text
    # Only the row of the bad film is refused.
    assert "bad.mp4: cannot be read as a video" in text
    assert [row["status"] for row in rows_of(copy)] == ["refused", "cut", "cut", "cut", "", "refused"]
    # Clips without a row are reported and kept.
    assert f"clips in no row of the table: {', '.join(CLIPS[2:])}; remove those that you do not want" in text
    same = [str(copy / "videos" / name) for name in (*CLIPS[1:], "mine.mp4")]
    assert [after[name] for name in same] == [before[name] for name in same]


def test_a_clip_that_was_moved_away_is_not_cut_again(copy):
    (copy / "videos" / CLIPS[1]).rename(copy / "away.mp4")
    done = split(copy)
    assert done.returncode == 0 and "4 clips" in done.stdout + done.stderr, done.stderr
    assert [row["status"] for row in rows_of(copy)] == ["cut", "removed", "cut", "cut", "cut"]
    assert split(copy).returncode == 0 and not (copy / "videos" / CLIPS[1]).exists()
    rows = rows_of(copy)
    rows[1]["status"] = ""
    write_rows(copy, rows)
    assert split(copy).returncode == 0 and numbers_of(copy / "videos" / CLIPS[1]) == NUMBERS["black"]


def test_the_clips_of_a_film_that_got_another_ending_have_names_of_their_own(copy):
    (copy / "footage/film.mp4").rename(copy / "footage/film.mov")
    # Another row has the name that they would get, too.
    rows = rows_of(copy)
    rows[1]["file"] = "film_mov_scene_005.mp4"
    write_rows(copy, rows)
    # A table with two rows of one name, one of which was edited.
    hidden = copy / "videos_split/.scenes.csv"
    hidden.write_text(hidden.read_text().replace(CLIPS[1], CLIPS[0]))
    done = split(copy)
    assert done.returncode == 0 and "written now: 5" in done.stdout + done.stderr, done.stderr
    assert "count as edited" not in done.stdout + done.stderr
    assert "4 clips of films that are no longer in footage: film.mp4; if a film has another name now" in (
        done.stdout + done.stderr
    )
    names = [row["file"] for row in rows_of(copy)]
    assert names == [f"film_mov_2_scene_{number:03d}.mp4" for number in range(1, 6)] + [
        CLIPS[0], rows[1]["file"], *CLIPS[2:],
    ]  # fmt: skip
    # A second run uses the table, and reports a damaged copy.
    hidden.write_text("no table")
    done = split(copy)
    assert done.returncode == 0 and "written now: 0" in done.stdout + done.stderr, done.stderr
    assert "and removed clips are cut again: videos_split/.scenes.csv: lacks the column" in done.stdout + done.stderr


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path, "split"):
        assert "its disk has no locks: make sure that no other split writes there" in capsys.readouterr().out


def test_a_full_disk_is_one_line(made, tmp_path):
    shutil.copytree(made / "footage", tmp_path / "footage")
    done = split(tmp_path, disturbance=Disturbance(file_bytes=5_000))
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("mochi-tune: ") and "film_scene_001.mp4" in line and "File too large" in line
    assert list((tmp_path / "videos").rglob("*.mp4")) == [] == list((tmp_path / "videos").glob(".*"))


def test_a_film_that_was_changed_is_refused(copy):
    with open(copy / "footage/film.mp4", "ab") as file:
        file.write(b"\0" * 8)
    done = split(copy)
    assert done.returncode == 1 and "was changed after its scenes were found" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["in=nowhere"], "in=nowhere does not exist"),
        (["in=text.txt"], "in=text.txt is not a known video format"),
        (["in=videos_split"], "in=videos_split holds no video"),
        (["out=footage/below"], "is in the footage"),
        (["in=footage/film.mp4", "out=footage"], "in=footage/film.mp4 is in the folder of the clips, out=footage"),
        (["in=footage/film.mp4", "out=."], "in=footage/film.mp4 is in the folder of the clips, out=."),
        (["margin_seconds=0.5"], "scenes.csv was made with margin_seconds=0.0, now margin_seconds=0.5"),
        (["detector=neural"], "detector=neural is not possible"),
        (["min_seconds=9"], "max_seconds=6 is less than min_seconds=9"),
        (["crf=60"], "crf=60 does not fit"),
        (["margin_seconds=-1"], "margin_seconds=-1 does not fit"),
        (["threshold=nan"], "threshold=nan does not fit"),
    ],
)
def test_bad_settings_are_one_line(copy, arguments, text):
    (copy / "text.txt").write_text("")
    before = files_of(copy)
    done = split(copy, *arguments)
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert files_of(copy) == before


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("file", "../out.mp4", "row 2: file=../out.mp4 is not a path in the output folder"),
        ("file", "film.mkv", "row 2: file=film.mkv is not a path"),
        ("file", CLIPS[1], f"row 3: names {CLIPS[1]}, as row 2 does"),
        ("end_seconds", "later", "row 2: end_seconds=later is not a number"),
        ("end_seconds", "0", "row 2: end_seconds=0 is not after start_seconds"),
    ],
)
def test_a_bad_row_is_named(copy, column, value, text):
    rows = rows_of(copy)
    rows[0][column] = value
    write_rows(copy, rows)
    done = split(copy)
    assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr


HIDDEN = """import importlib.util as u
u.find_spec = lambda name, find=u.find_spec: None if name == "scenedetect" else find(name)"""


@pytest.mark.parametrize(
    ("first", "text"),
    [
        (HIDDEN, 'is not installed: pip install "mochi-tune[footage]"'),
        ("pass", "cannot be imported (libGL.so.1: cannot open shared object file): install what is missing"),
    ],
)
def test_without_the_library_or_what_it_needs_it_says_what_to_install(tmp_path, first, text):
    blocked = tmp_path / "scenedetect"
    blocked.mkdir()
    (blocked / "__init__.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from mochi_tune.cli.main import main; main(sys.argv[2:])"
    command = [sys.executable, "-c", f"{first}\n{code}", str(tmp_path), "split", f"in={tmp_path}", "out=videos"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and text in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_the_clips_may_go_to_the_working_folder_and_their_table_beside_it(copy):
    done = run("split", "in=../footage", "out=.", *SETTINGS, cwd=copy / "videos")
    assert done.returncode == 0 and "written now: 0" in done.stdout + done.stderr, done.stderr
    assert sorted(path.name for path in copy.iterdir()) == ["footage", "videos", "videos_split"]
    done = run("split", "in=footage", "out=/", *SETTINGS, cwd=copy)
    assert done.returncode == 2 and "use out=DIR" in done.stderr and done.stderr.count("\n") == 1, done.stderr
