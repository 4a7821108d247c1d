"""Moves between disks, over copies that an earlier run left, and tables that a crash damaged."""

import errno
import os

import pytest

from mochi_tune.data_prep.moving import Moved, finish_moves, move_clip, move_file, read_moved, undo_moves
from mochi_tune.errors import DataError


def test_a_copy_that_an_earlier_run_left_at_the_new_path_is_the_moved_file(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    for path in (source, target):
        path.write_text("a")
    move_file(source, target)
    assert not source.exists() and target.read_text() == "a"
    source.mkdir()
    with pytest.raises(DataError, match="exists already"):
        move_file(target, source)


def test_a_clip_of_which_a_stopped_undo_left_the_moved_file_moves_to_its_caption_again(tmp_path):
    table, clip, moved = tmp_path / "moved.csv", tmp_path / "a.mp4", tmp_path / "moved" / "a.mp4"
    sources = [clip.with_suffix(".txt"), clip]
    for path in sources:
        path.write_text(path.suffix)
    move_clip(table, [(path, moved.parent / path.name) for path in sources], "black")
    os.link(moved, clip)
    move_clip(table, [(clip, moved)], "black")
    assert not clip.exists() and {path.name for path in moved.parent.iterdir()} == {"a.mp4", "a.txt"}
    clip.write_text("another")
    with pytest.raises(DataError, match="exists already"):
        move_clip(table, [(clip, moved)], "black")
    clip.unlink()
    assert undo_moves(table, read_moved(table)) == (2, [], []) and clip.exists() and not list(moved.parent.iterdir())


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
def test_files_move_to_another_disk_and_where_there_are_no_hard_links(tmp_path, monkeypatch, code):
    def no_link(source, target):
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    source, target = tmp_path / "a", tmp_path / "below" / "b"
    source.write_text("a")
    os.utime(source, ns=(0, 5))
    monkeypatch.setattr(os, "link", no_link)
    move_file(source, target)
    # `filter` recognizes clips that it has measured by their time.
    assert not source.exists() and target.read_text() == "a" and target.stat().st_mtime_ns == 5


def test_a_crash_that_damaged_the_table_leaves_its_whole_rows(tmp_path):
    table = tmp_path / "report" / "moved.csv"
    table.parent.mkdir()
    table.write_text("original,moved,reason\n../a,../b,black\n\0\0\0,\0,\0\n../c,../d\n")
    assert read_moved(table) == [Moved(str(tmp_path / "a"), str(tmp_path / "b"), "black")]
    (table.parent / "moving.json").write_text("[{")
    with pytest.raises(DataError, match=r"moving\.json: is damaged: compare"):
        finish_moves(table)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="is not the table of moved files"):
        read_moved(table)
