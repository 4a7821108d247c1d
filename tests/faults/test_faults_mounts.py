"""Two disks: what is renamed is renamed on one of them, and what moves from one to the other is lost on neither."""

import os
import shutil
import signal
from pathlib import Path
from tempfile import mkdtemp

import pytest
from helpers_film import paint_part, write_frames
from helpers_process import Disturbance, Program, run
from helpers_renders import write_adapter
from helpers_road import road

from mochi_tune.config.load import load_config
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.files import copy_atomic, move_to_free_name, write_atomic, write_new
from mochi_tune.recipes.publish import Publication
from mochi_tune.recipes.publish import main as publish
from mochi_tune.recipes.sample_grid import main as sample
from mochi_tune.training.checkpoint import find_checkpoints, new_checkpoint, remove_checkpoints

NO_BROWSER = {"PATH": "/nowhere"}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns the bytes and the time of each file."""
    files = folder.glob("[!.]*") if folder.exists() else ()
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def other(tmp_path):
    """A folder on another disk than the tests' own."""
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no second disk")
    folder = Path(mkdtemp(dir="/dev/shm", prefix="mochi_tune_"))
    (tmp_path / "a").write_bytes(b"a")
    with pytest.raises(OSError, match="cross-device"):
        os.rename(tmp_path / "a", folder / "a")
    yield folder
    shutil.rmtree(folder)


def test_files_take_their_names_on_another_disk(tmp_path, other):
    link = tmp_path / "link"
    link.symlink_to(other)
    write_atomic(link / "b", b"b", durable=True)
    write_new(link / "c", b"c")
    copy_atomic(tmp_path / "a", link / "d")
    (link / "temporary").write_bytes(b"e")
    assert move_to_free_name(link / "temporary", link / "d") == link / "d_2"
    assert {path.name: path.read_bytes() for path in other.iterdir()} == {"b": b"b", "c": b"c", "d": b"a", "d_2": b"e"}


@pytest.mark.parametrize(
    ("ending", "nth"),
    # Of the caption: before its copy takes its name, and before it is removed at its old place; then of the clip.
    [(".a.txt.tmp", 3), ("videos/a.txt", 3), (".a.mp4.tmp", 3)],
)
def test_clips_move_to_another_disk_though_it_is_killed_in_the_middle(tmp_path, other, ending, nth):
    videos, away = tmp_path / "videos", other / "moved"
    videos.mkdir()
    for name, part in (("a", "black"), ("b", "first")):
        write_frames(videos / f"{name}.mp4", [paint_part(part, index) for index in range(24)])
        (videos / f"{name}.txt").write_text(f"caption of {name}")
    before = contents(videos)
    arguments = ["filter", f"videos={videos}", f"move={away}"]
    program = Program(arguments, tmp_path / "log", Disturbance("/", signal_before=ending, nth=nth), NO_BROWSER)
    assert program.wait() == -signal.SIGKILL, program.text()
    # What is not at its old place is complete at the new one.
    assert {name: each for name, each in (contents(away) | contents(videos)).items() if name in before} == before
    assert contents(videos) != contents(away)
    done = run(*arguments, env=NO_BROWSER)
    assert done.returncode == 0, done.stderr
    assert contents(away) == {name: each for name, each in before.items() if name.startswith("a.")}
    assert contents(videos) == {name: each for name, each in before.items() if name.startswith("b.")}
    done = run("filter", f"videos={videos}", "undo=true")
    assert done.returncode == 0 and contents(videos) == before and not contents(away), done.stderr


def test_a_checkpoint_that_was_archived_on_another_disk_is_left_there(tmp_path, other):
    for step in (1, 2):
        with new_checkpoint(tmp_path / "checkpoints", step) as folder:
            (folder / "state").write_bytes(bytes([step]))
    shutil.move(tmp_path / "checkpoints" / "step_000001", other)
    (tmp_path / "checkpoints" / "step_000001").symlink_to(other / "step_000001")
    remove_checkpoints(tmp_path / "checkpoints", [2])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
    assert (other / "step_000001" / "state").read_bytes() == b"\1"
    # The folder of all of them may lie on another disk.
    (tmp_path / "linked").symlink_to(other, target_is_directory=True)
    for _ in range(2):
        with new_checkpoint(tmp_path / "linked", 3) as folder:
            (folder / "state").write_bytes(b"3")
    assert [path.name for path in find_checkpoints(tmp_path / "linked")] == ["step_000001", "step_000003"]


def test_a_cache_in_pieces_and_an_output_that_is_a_link_are_refused_before_any_work(tmp_path, other):
    for name in ("parts", "data"):
        cache = tmp_path / f"cache_{name}"
        cache.mkdir()
        (cache / name).symlink_to(other)
        with pytest.raises(DataError, match=rf"cache_{name}/{name} is a link or a mount point, .* on one disk"):
            CacheWriter(cache).__enter__()
        assert [path.name for path in cache.iterdir()] == [name]
    whole = tmp_path / "cache"
    whole.symlink_to(other)
    with CacheWriter(whole):
        assert (other / "parts").is_dir()
    adapter = write_adapter(tmp_path / "adapter.safetensors")
    (other / "empty").mkdir()
    (tmp_path / "hub").symlink_to(other / "empty")
    with pytest.raises(ConfigError, match=r"hub is a link or a mount point .*: name a folder in it"):
        publish(Publication(adapter), tmp_path / "hub")
    publish(Publication(adapter), tmp_path / "hub" / "new")
    assert (other / "empty" / "new" / "README.md").exists()


def test_a_farm_renders_to_another_disk(tmp_path, other):
    more = ["sample.prompt=a cat", "sample.steps=1", f"sample.out={other}", "parallel.shard=1/1"]
    [video] = sample(load_config("my_lora", road(tmp_path, *more)))
    assert video.parent == other and sorted(path.suffix for path in other.iterdir()) == [".json", ".mp4"]
