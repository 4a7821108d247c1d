"""The table of moved files survives a full disk, a kill and a loss of power."""

import errno
import resource
from pathlib import Path

import pytest

from mochi_tune.data_prep.filter import Filter, undo
from mochi_tune.data_prep.moving import finish_moves, move_clip, read_moved


def move(root: Path, name: str) -> Path:
    """Moves a new file; returns the table."""
    table = root / "videos_filter" / "moved.csv"
    for folder in (root / "videos", table.parent):
        folder.mkdir(exist_ok=True)
    (root / "videos" / name).write_text(name)
    move_clip(table, [(root / "videos" / name, table.parent / "moved" / name)], "blurred")
    return table


def names(table: Path) -> list[str]:
    return [Path(row.original).name for row in read_moved(table)]


def test_a_table_that_cannot_grow_stays_as_it_is_and_the_next_command_completes_it(tmp_path):
    for number in range(9):
        table = move(tmp_path, f"{number}.mp4")
    before, former = table.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, former[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            move(tmp_path, "last.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(table)) and table.read_bytes() == before
    finish_moves(table)
    assert names(table) == [*(f"{number}.mp4" for number in range(9)), "last.mp4"]


@pytest.mark.parametrize("end", [b"../videos/b.mp4,moved/b", bytes(100), b"../videos/b.mp4,moved/\0\0,blurred\r\n"])
def test_an_incomplete_row_spoils_no_other(tmp_path, end):
    table = move(tmp_path, "a.mp4")
    with open(table, "ab") as file:
        file.write(end)
    move(tmp_path, "c.mp4")
    assert names(table) == ["a.mp4", "c.mp4"]
    (table.parent / ".moved.csv.abcdef-1.tmp").touch()
    assert undo(Filter(tmp_path / "videos", table.parent)) == 0
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["a.mp4", "c.mp4"]
    assert not list(table.parent.glob(".*.tmp")), "a killed process leaves nothing"
