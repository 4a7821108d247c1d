"""Paths outside of the page's folder are refused, in whatever form they are given."""

import os
import subprocess
import sys

import pytest

from mochi_tune.errors import DataError
from mochi_tune.ui.folder import OWN_FOLDER, clean_name, inside, open_page_file, relative


def test_paths_in_the_folder_are_found(tmp_path):
    assert inside(tmp_path, "videos/a.mp4") == tmp_path.resolve() / "videos" / "a.mp4"
    assert inside(tmp_path, tmp_path / "runs") == tmp_path.resolve() / "runs"
    assert inside(tmp_path, "videos/../runs") == tmp_path.resolve() / "runs"
    assert relative(tmp_path, tmp_path / "a" / "b.txt") == "a/b.txt"


@pytest.mark.parametrize("name", ["..", "../other", "videos/../../x", "/etc/passwd", "~", "link/secret.txt", "a\0b"])
def test_paths_that_lead_out_are_refused(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    with pytest.raises(DataError, match=r"outside of|NUL"):
        inside(folder, name)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("clip.mp4", "clip.mp4"),
        ("../../etc/clip.mp4", "clip.mp4"),
        (r"C:\films\clip.MP4", "clip.MP4"),
        ("<img src=x onerror=alert(1)>.mp4", "_img src_x onerror_alert(1)_.mp4"),
        ("..hidden.mp4", "hidden.mp4"),
        ("Küche №1.txt", "Küche _1.txt"),
        ("का.mp4", "का.mp4"),
        ("a" * 5000 + ".mp4", "a" * 200 + ".mp4"),
        ("é" * 150 + ".mp4", "é" * 100 + ".mp4"),
        ("my clip's %22best%22 one.mp4", "my clip_s _best_ one.mp4"),
    ],
)
def test_names_of_uploads_are_cleaned(name, clean):
    assert clean_name(name, (".mp4", ".txt")) == clean


@pytest.mark.parametrize("name", ["", ".mp4", "...", "clip.exe", "clip.mp4/", "clip.mp4\n.sh", "___.mp4"])
def test_names_of_nothing_that_is_taken_are_refused(name):
    with pytest.raises(DataError, match=r"cannot be uploaded|is no name"):
        clean_name(name, (".mp4", ".txt"))


def test_a_second_page_of_a_folder_hears_of_the_first(tmp_path):
    (tmp_path / OWN_FOLDER).mkdir()
    with open_page_file(tmp_path, "http://127.0.0.1:1/") as other:
        assert other == ""
        with open_page_file(tmp_path, "http://127.0.0.1:2/") as second:
            assert second == "http://127.0.0.1:1/"
    with open_page_file(tmp_path, "http://127.0.0.1:3/") as other:
        assert other == ""


NO_LOCKS = """
import errno, fcntl, os

def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.flock = flock
"""


def test_a_folder_on_a_disk_without_locks_is_refused_in_one_line(tmp_path):
    pytest.importorskip("gradio")
    (tmp_path / "sitecustomize.py").write_text(NO_LOCKS)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "mochi_tune.cli", "ui", f"folder={tmp_path / 'work'}", "port=0"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    line = f"mochi-tune: folder={(tmp_path / 'work').resolve()} is on a disk without file locks, "
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1
