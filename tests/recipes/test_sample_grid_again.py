"""A grid that is there is rendered again where more is asked for than its files hold, or where they are damaged."""

import json
import os

import torch
from helpers_road import road
from safetensors.torch import load_file

from mochi_tune.config.load import load_config
from mochi_tune.recipes.sample import main as sample
from mochi_tune.recipes.sample_grid import main as grid


def config(folder, *more):
    settings = ["sample.steps=2", "sample.guidance=2", "sample.prompt=a purple teapot", "sample.seeds=[4]"]
    return load_config("my_lora", road(folder / "run", *settings, *more))


def render(folder, *more):
    """Returns the cells that are rendered, without the page and the video of all."""
    *cells, _, _ = grid(config(folder, "sample.grid=true", f"sample.out={folder / 'grid'}", *more))
    return cells


def test_latents_that_are_asked_for_later_are_made(tmp_path):
    [cell] = render(tmp_path)
    before, latents = cell.read_bytes(), cell.with_suffix(".safetensors")
    assert not latents.exists()
    # The video is there, and is not written again.
    assert render(tmp_path, "sample.save_latents=true") == [] and cell.read_bytes() == before
    alone = [f"sample.out={tmp_path / 'alone.mp4'}", "sample.save_latents=true"]
    list(sample(config(tmp_path, *alone)))
    assert torch.equal(load_file(latents)["latents"], load_file(tmp_path / "alone.safetensors")["latents"])
    time = latents.stat().st_mtime_ns
    assert render(tmp_path, "sample.save_latents=true") == [] and latents.stat().st_mtime_ns == time


def test_files_of_a_cell_are_on_disk_before_they_get_their_names_and_damaged_ones_are_made_again(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    [video] = render(tmp_path, "sample.save_latents=true")
    files = {path: path.read_bytes() for path in (video, *map(video.with_suffix, (".json", ".safetensors")))}
    assert {path.stat().st_ino for path in files} <= synced
    # What a crash of the machine left under a version that did not sync.
    video.write_bytes(b"")
    assert render(tmp_path) == [video] and video.read_bytes() == files[video]
    video.with_suffix(".json").write_bytes(files[video.with_suffix(".json")][:40])
    assert render(tmp_path) == [video] and "seed" in json.loads(video.with_suffix(".json").read_bytes())
    latents = video.with_suffix(".safetensors")
    latents.write_bytes(files[latents][:-1])
    assert render(tmp_path, "sample.save_latents=true") == [] and latents.read_bytes() == files[latents]
    latents.write_bytes(b"")
    video.unlink()
    assert render(tmp_path) == [video] and video.read_bytes() == files[video] and not latents.exists()


def test_a_video_without_metadata_is_another_file(tmp_path):
    [told], [untold] = render(tmp_path), render(tmp_path, "sample.metadata=false")
    assert b"a purple teapot" in told.read_bytes() and b"a purple teapot" not in untold.read_bytes()
    assert render(tmp_path) == render(tmp_path, "sample.metadata=false") == []
    # The page shows the one that was asked for.
    assert untold.name in (page := (tmp_path / "grid" / "index.html").read_text()) and told.name not in page
