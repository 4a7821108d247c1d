"""A grid that is there is rendered again where more is asked for than its files hold."""

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


def test_a_video_without_metadata_is_another_file(tmp_path):
    [told], [untold] = render(tmp_path), render(tmp_path, "sample.metadata=false")
    assert b"a purple teapot" in told.read_bytes() and b"a purple teapot" not in untold.read_bytes()
    assert render(tmp_path) == render(tmp_path, "sample.metadata=false") == []
    # The page shows the one that was asked for.
    assert untold.name in (page := (tmp_path / "grid" / "index.html").read_text()) and told.name not in page
