"""Farms of renders, in shares and on Ray: whatever dies, each video is there once, with the latents of one process."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers_faults import lock_ray
from helpers_process import Disturbance, Program, run
from helpers_renders import write_adapter
from helpers_road import road
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError
from mochi_tune.recipes.sample_cells import check_cells, is_done
from mochi_tune.recipes.sample_claims import claimed
from mochi_tune.recipes.sample_grid import main as sample

NUM_SHARES, NUM_VIDEOS = 4, 10
PROMPTS = "a red ball\na cat\ntwo old birds fly away\na cat\nthe sea\nthe sea at night\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Five prompts, one of them twice, an adapter, and the ten videos that one process renders of them."""
    folder = tmp_path_factory.mktemp("farm")
    (folder / "prompts.txt").write_text(PROMPTS)
    write_adapter(folder / "adapter.safetensors", scale=0.3)
    list(sample(config(folder, "alone", "sample.grid=true")))
    return folder


def settings(base: Path, name: str, *more: str) -> list[str]:
    own = [f"sample.prompts={base / 'prompts.txt'}", f"sample.adapter={base / 'adapter.safetensors'}"]
    own += ["sample.strengths=[0,1]", "sample.save_latents=true", f"sample.out={base / name}"]
    return road(base, "sample.steps=2", "sample.guidance=2", *own, *more)


def config(base: Path, name: str, *more: str):
    return load_config("my_lora", settings(base, name, *more))


def share(number: int) -> str:
    return f"parallel.shard={number}/{NUM_SHARES}"


def start(base: Path, name: str, *more: str, disturbance: Disturbance | None = None) -> Program:
    return Program(["sample", "conf=my_lora", *settings(base, name, *more)], base / f"{name}.log", disturbance)


@pytest.fixture(autouse=True)
def ray_lock(tmp_path_factory):
    with lock_ray(tmp_path_factory, fcntl.LOCK_SH):
        yield


def assert_is_whole(base: Path, name: str) -> None:
    """Checks that a farm has the videos of one process, by their names and latents, and nothing else."""
    alone, folder = base / "alone" / "cells", base / name
    assert len(list(alone.glob("*.mp4"))) == NUM_VIDEOS
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}
    for file in alone.glob("*.safetensors"):
        assert torch.equal(load_file(file)["latents"], load_file(folder / file.name)["latents"]), file.name


def test_four_shares_are_the_videos_of_one_process_and_each_is_rendered_once(base):
    by_share = [list(sample(config(base, "shares", share(number)))) for number in range(1, NUM_SHARES + 1)]
    assert sorted(map(len, by_share)) == [2, 2, 3, 3]
    assert len({video for videos in by_share for video in videos}) == NUM_VIDEOS
    assert_is_whole(base, "shares")
    # Any other division finds them all.
    assert list(sample(config(base, "shares", "parallel.shard=1/1"))) == []


def test_a_share_that_is_killed_goes_on_and_renders_only_what_is_missing(base):
    for number in range(2, NUM_SHARES + 1):
        list(sample(config(base, "killed", share(number))))
    # Before the second latents of its three videos take their name, then before the second video does.
    killed_at = (Disturbance(base / "killed", signal_before=".safetensors.tmp", nth=6),
                 Disturbance(base / "killed", signal_before=".json.tmp", nth=6))  # fmt: skip
    written = []
    for disturbance in killed_at:
        program = start(base, "killed", share(1), disturbance=disturbance)
        assert program.wait() == -signal.SIGKILL, program.text()
        assert list((base / "killed").glob(".*.tmp")) and list((base / "killed").glob(".*.claim"))
        written.append({path: path.stat().st_mtime_ns for path in (base / "killed").glob("[!.]*")})
    videos = list(sample(config(base, "killed", share(1))))
    # The first video had its settings; the second one had not, and is decoded again from its latents.
    assert len(videos) == 2 and len(list((base / "killed").glob("*.mp4"))) == NUM_VIDEOS
    assert_is_whole(base, "killed")
    for before in written:
        assert {path for path, then in before.items() if path.stat().st_mtime_ns != then} <= set(videos)


def test_a_video_that_another_run_has_in_hand_is_left_to_it(base, capfd):
    first, *others = check_cells(config(base, "claimed", share(1)))
    first.request.video.parent.mkdir()
    with claimed(first.request.video) as is_mine:
        assert is_mine
        with claimed(first.request.video) as is_mine_too:
            assert not is_mine_too
        videos = list(sample(config(base, "claimed", "parallel.shard=1/1")))
    assert set(videos) == {cell.request.video for cell in others} - {first.request.video}
    assert "1 videos are being rendered by another `mochi-tune sample`" in capfd.readouterr().err
    assert not is_done(first)
    assert list(sample(config(base, "claimed", "parallel.shard=1/1"))) == [first.request.video]
    assert_is_whole(base, "claimed")


def test_on_ray_a_killed_worker_costs_the_video_in_hand(base, monkeypatch):
    # As the command line does.
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    killed = []

    def disturb() -> None:
        while not list((base / "ray").glob("[!.]*.safetensors")):
            time.sleep(0.02)
        worker = next(p for p in psutil.Process().children(recursive=True) if "ray::RenderWorker" in p.name())
        worker.suspend()
        time.sleep(0.5)
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(worker.pid)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    videos = list(sample(config(base, "ray", "parallel.engine=ray", "parallel.num_processes=2")))
    disturbing.join()
    assert killed and len(set(videos)) == len(videos) == NUM_VIDEOS
    assert_is_whole(base, "ray")


def test_a_cluster_that_cannot_be_reached_is_named_before_anything_is_rendered(base):
    ray = ["parallel.engine=ray", "parallel.ray_address=127.0.0.1:1"]
    refusal = start(base, "unreached", *ray).refusal
    assert "the Ray cluster of parallel.ray_address=127.0.0.1:1 cannot be reached (" in refusal
    assert not list((base / "unreached").iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([share(1), "parallel.num_processes=2"], r"parallel\.shard=1/4 renders each video in one process"),
        (["parallel.engine=ray", "sample.compare=base"], r"parallel\.engine=ray compares by strengths"),
        ([share(1), "sample.init_video=a.mp4"], r"parallel\.shard=1/4 has one strength .* and starts from noise"),
        ([share(1), "sample.format=png"], r"format=png makes a folder of each video, and parallel\.shard=1/4 files"),
        ([share(1), "sample.out=a.mp4"], r"out=a\.mp4 is a file, and parallel\.shard=1/4 fills a folder"),
    ],
)
def test_what_cannot_be_a_farm_is_refused(base, more, said):
    with pytest.raises(ConfigError, match=said):
        list(sample(config(base, "refused", *more)))


def test_there_is_nothing_to_merge_and_other_verbs_have_no_shares(base):
    done = run("sample", "conf=my_lora", *settings(base, "merged", "parallel.shard=merge"))
    assert done.returncode == 2 and done.stderr.startswith("mochi-tune: parallel.shard=merge is of `prepare`: ")
    done = run("train", "conf=my_lora", *settings(base, "trained", share(1)))
    assert (
        done.returncode == 2 and "parallel.shard=1/4 is a setting of `prepare` and `sample`, and `train`" in done.stderr
    )
