"""`prepare` in several processes, in shares and on Ray: whatever dies, the cache is one process's, byte for byte."""

import errno
import fcntl
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers_faults import lock_ray
from helpers_prepare import GEOMETRY, TINY, add_clip
from helpers_process import PATIENCE, Program, wait_for_end
from helpers_road import SIZES, command

from mochi_tune.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data_prep.prepare import main, prepare
from mochi_tune.data_prep.shares import share_of
from mochi_tune.errors import ConfigError, DataError

NUM_SHARES = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Eight clips, of which one is too short and two have the same bytes, and the cache that one process makes."""
    folder = tmp_path_factory.mktemp("base")
    for number in range(6):
        add_clip(folder, f"{number}.mp4", f"a ball number {number % 4}", first_number=20 * number)
    add_clip(folder, "short.mp4", "a cat", 3)
    (folder / "videos" / "copy.mp4").write_bytes((folder / "videos" / "1.mp4").read_bytes())
    (folder / "videos" / "copy.txt").write_text("another ball")
    assert main(config_for(folder, folder / "cache")) == 1
    return folder


def config_for(folder: Path, cache: Path, **parallel) -> RunConfig:
    return RunConfig(
        device="cpu",
        model=ModelConfig(name="tiny", weights=str(TINY), dtype="fp32"),
        data=DataConfig(videos=str(folder / "videos"), cache=str(cache), **GEOMETRY),
        parallel=ParallelConfig(**parallel),
    )


def start(folder: Path, cache: Path, *more: str, log: str = "log", **options) -> Program:
    return Program(["prepare", *settings(folder, cache), *more], cache.parent / log, **options)


def settings(folder: Path, cache: Path) -> list[str]:
    paths = [f"data.videos={folder / 'videos'}", f"data.cache={cache}", f"run_dir={cache}_run"]
    return ["conf=my_lora", *SIZES, "model.dtype=fp32", *paths]


def tree(cache: Path) -> dict[str, bytes]:
    """Returns all files, except the one that says when the videos were changed."""
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.name != ".files.json"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def encoders_of(program: Program) -> list[psutil.Process]:
    """Returns the processes that encode for a program."""
    found = []
    for child in psutil.Process(program.pid).children():
        try:
            found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
        except psutil.Error:
            continue
    return found


def num_parts(cache: Path, kind: str = "latents") -> int:
    return len(list(cache.glob(f"parts/{kind}-*.safetensors")))


def test_of_three_processes_one_is_killed_and_its_clip_is_taken_again(base, tmp_path):
    cache = tmp_path / "cache"
    program = start(base, cache, "parallel.num_processes=3")
    program.wait_until(lambda: (cache / ".scans.json").exists() and len(encoders_of(program)) == 3)
    stopped = encoders_of(program)[0]
    stopped.suspend()
    # It has one clip in hand, and at most one that it was to decode ahead.
    program.wait_until(lambda: num_parts(cache) >= 4)
    stopped.kill()
    assert program.wait() == 1, program.text()
    assert tree(cache) == tree(base / "cache")
    assert "encoded now: 6 clips and 5 captions" in program.out


def test_when_the_main_process_is_killed_so_are_the_others_and_the_next_run_goes_on(base, tmp_path):
    cache = tmp_path / "cache"
    program = start(base, cache, "parallel.num_processes=2")
    program.wait_until(lambda: num_parts(cache) >= 1)
    others = psutil.Process(program.pid).children(recursive=True)
    program.kill()
    wait_for_end(others)
    found = num_parts(cache)
    done = prepare(config_for(base, cache))
    assert found >= 1 and done.clips_encoded == 6 - found
    assert tree(cache) == tree(base / "cache")


def test_more_processes_than_gpus_are_refused(base, tmp_path):
    program = start(base, tmp_path / "cache", "parallel.num_processes=200", "device=cuda")
    assert "200 processes need a GPU each" in program.refusal
    assert not (tmp_path / "cache").exists()


def test_four_shares_are_the_cache_of_one_process_and_a_straggler_is_named(base, tmp_path, capsys):
    cache, late = tmp_path / "cache", share_of("copy.mp4", NUM_SHARES)
    # At the same time as another share, which has not ended.
    with CacheWriter(cache, f"{late}-of-{NUM_SHARES}"):
        for number in set(range(1, NUM_SHARES + 1)) - {late}:
            main(config_for(base, cache, shard=f"{number}/{NUM_SHARES}"))
        with pytest.raises(DataError, match="another `mochi-tune prepare` is writing to the cache"):
            main(config_for(base, cache, shard="merge"))
        with pytest.raises(DataError, match=f"is writing the share {late}-of-{NUM_SHARES}"):
            main(config_for(base, cache, shard=f"{late}/{NUM_SHARES}"))
    assert not (cache / "manifest.json").exists() and not (cache / "report.csv").exists()
    with pytest.raises(DataError) as caught:
        main(config_for(base, cache, shard="merge"))
    assert f"1 of {NUM_SHARES} shares lack clips or captions" in str(caught.value)
    assert f"parallel.shard={late}/{NUM_SHARES} (" in str(caught.value) and "has not finished" in str(caught.value)
    capsys.readouterr()
    main(config_for(base, cache, shard=f"{late}/{NUM_SHARES}"))
    # Again: nothing is encoded twice.
    main(config_for(base, cache, shard=f"{late}/{NUM_SHARES}"))
    assert "encoded now: 0 clips and 0 captions" in capsys.readouterr().out.splitlines()[-1]
    assert main(config_for(base, cache, shard="merge")) == 1
    assert tree(cache) == tree(base / "cache")
    assert main(config_for(base, cache, shard="merge")) == 1
    assert tree(cache) == tree(base / "cache")


def test_without_shares_there_is_nothing_to_merge(base, tmp_path):
    with pytest.raises(DataError, match=r"no share of .* was prepared, 7 files are missing: run this command with"):
        main(config_for(base, tmp_path / "cache", shard="merge"))


def test_previews_and_a_second_way_of_sharing_do_not_fit_a_share(base, tmp_path):
    config = config_for(base, tmp_path / "cache", shard="1/2")
    preview = config.model_copy(update={"data": config.data.model_copy(update={"preview": str(tmp_path / "preview")})})
    with pytest.raises(ConfigError, match=r"data\.preview does not work with parallel\.shard"):
        main(preview)
    both = start(base, tmp_path / "cache", "parallel.shard=1/2", "parallel.engine=ray")
    assert "parallel.shard=1/2 and parallel.engine=ray are both given" in both.refusal
    assert "parallel.shard=3/2 is not possible" in start(base, tmp_path / "cache", "parallel.shard=3/2").refusal


def test_a_disk_without_locks_and_parts_that_it_shows_late_are_no_hindrance(base, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    cache = tmp_path / "cache"
    monkeypatch.setattr(fcntl, "flock", refuse)
    for number in (1, 2):
        main(config_for(base, cache, shard=f"{number}/2"))
    hidden = sorted(cache.glob("parts/*/*.safetensors"))[::3]
    for file in hidden:
        file.rename(tmp_path / file.name)

    def show() -> None:
        time.sleep(1)
        for file in hidden:
            (tmp_path / file.name).rename(file)

    showing = threading.Thread(target=show)
    showing.start()
    assert main(config_for(base, cache, shard="merge")) == 1
    showing.join()
    assert "its disk has no locks" in capsys.readouterr().out
    assert tree(cache) == tree(base / "cache")


def test_on_ray_a_killed_worker_is_replaced_and_other_versions_are_refused(base, tmp_path, monkeypatch):
    """One session of Ray for all of it: starting one takes seconds."""
    import ray

    # As the command line does.
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    cache, seen = tmp_path / "cache", {}
    (tmp_path / "site" / "mochi_tune-99.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "mochi_tune-99.dist-info" / "METADATA").write_text("Name: mochi-tune\nVersion: 99\n")

    def disturb() -> None:
        try:
            while not num_parts(cache):
                time.sleep(0.02)
            stopped = next(p for p in psutil.Process().children(recursive=True) if "ray::RayWorker" in p.name())
            stopped.suspend()
            # A program that this one starts may join its cluster.
            address = f"parallel.ray_address={ray.get_runtime_context().gcs_address}"
            for name, more, path in (("version", [], "site"), ("size", ["parallel.num_processes=9"], "none")):
                joining = command("prepare", *settings(base, tmp_path / name), "parallel.engine=ray", address, *more)
                environment = os.environ | {"PYTHONPATH": str(tmp_path / path)}
                # Not where the tests run: the metadata of the program itself lies there, and would go before.
                options = {"capture_output": True, "text": True, "check": False, "env": environment, "cwd": tmp_path}
                seen[name] = subprocess.run(joining, timeout=PATIENCE, **options)
        finally:
            os.kill(stopped.pid, signal.SIGKILL)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    done = prepare(config_for(base, cache, engine="ray", num_processes=2))
    disturbing.join()
    assert (done.clips_encoded, done.captions_encoded) == (6, 5)
    assert tree(cache) == tree(base / "cache")
    assert "of the Ray cluster has mochi-tune" in seen["version"].stderr, seen["version"].stderr
    assert "this process has 99" in seen["version"].stderr and seen["version"].returncode == 2
    assert "9 workers need a CPU each, but the Ray cluster has 2" in seen["size"].stderr, seen["size"].stderr
    for each in seen.values():
        assert each.stderr.splitlines()[-1].startswith("mochi-tune: ") and "Traceback" not in each.stderr, each.stderr


@pytest.fixture(autouse=True)
def ray_lock(request, tmp_path_factory):
    needs_none = request.node.name == "test_a_cluster_that_cannot_be_reached_is_named"
    with lock_ray(tmp_path_factory, fcntl.LOCK_EX if needs_none else fcntl.LOCK_SH):
        yield


def test_a_cluster_that_cannot_be_reached_is_named(base, tmp_path):
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "auto"):
        ray = ["parallel.engine=ray", f"parallel.ray_address={address}"]
        refusal = start(base, tmp_path / "cache", *ray).refusal
        assert f"the Ray cluster of parallel.ray_address={address} cannot be reached (" in refusal
    assert not list(tmp_path.glob("cache/parts/*"))
