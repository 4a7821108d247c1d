"""Latents outlive a decode that fails, and `sample` decodes them later to the video that it would have been."""

import errno
import json
import re
import shutil

import av
import pytest
import torch
from helpers_renders import write_adapter
from helpers_road import road
from helpers_video import keeping_frames
from helpers_weights import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_tune.cli.main import describe_trouble
from mochi_tune.config.load import load_config
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.recipes import sample as recipe
from mochi_tune.recipes import sample_cells
from mochi_tune.recipes.sample_grid import main as sample_grid
from mochi_tune.sampling.adapters import check_has_adapter
from mochi_tune.sampling.video import read_frames

# What decodes: without T5 and the DiT.
DECODER = ("decoder.safetensors", "vae_config.json")


def sample(folder, *more):
    settings = ["sample.steps=2", "sample.guidance=2", "sample.num_frames=13", "sample.prompt=a red ball", *more]
    with keeping_frames(recipe, folder / "frames"):
        return list(recipe.main(load_config("my_lora", road(folder / "run", *settings))))


def frames_of(folder, video):
    return torch.load(folder / "frames" / f"{video.stem}.pt", weights_only=True)


def rate_of(video):
    with av.open(str(video)) as container:
        return container.streams.video[0].average_rate


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB. More is said here")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "x.mp4")


@pytest.fixture
def decoder_alone(tmp_path):
    (weights := tmp_path / "decoder_alone").mkdir()
    for name in DECODER:
        shutil.copy(TINY / name, weights)
    return f"model.weights={weights}"


@pytest.mark.parametrize("more", [[], ["sample.save_latents=true"], ["sample.compare=base"]])
def test_a_decode_without_memory_leaves_latents_that_become_the_same_frames(tmp_path, monkeypatch, more, decoder_alone):
    if more == ["sample.compare=base"]:
        more = [*more, f"sample.adapter={write_adapter(tmp_path / 'a.safetensors')}"]
    [undisturbed] = sample(tmp_path, f"sample.out={tmp_path / 'undisturbed.mp4'}", *more)
    assert undisturbed.with_suffix(".safetensors").exists() == ("sample.save_latents=true" in more)
    failed = tmp_path / "failed.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "decoded_frames", out_of_memory)
        with pytest.raises(ConfigError) as caught:
            sample(tmp_path, f"sample.out={failed}", *more)
    latents = failed.with_suffix(".safetensors")
    assert str(caught.value) == (
        "the GPU's memory does not suffice in the stage decode (CUDA out of memory): use memory.tiles=[2,2], or more "
        f"tiles, which leave faint seams; the latents are kept: the same command with latents={latents} only decodes."
    )
    assert not failed.exists() and not failed.with_suffix(".json").exists()
    # The same command, though the name of the latents is taken: by themselves.
    [video] = sample(tmp_path, f"sample.out={failed}", *more, f"sample.latents={latents}", decoder_alone)
    assert video == failed and latents.exists()
    assert torch.equal(frames_of(tmp_path, video), frames_of(tmp_path, undisturbed))
    told, expected = (json.loads(v.with_suffix(".json").read_text()) for v in (video, undisturbed))
    same = ("prompt", "seed", "fps", "sampler", "adapters", "noise_sha256", "side_by_side", "memory", "num_frames")
    assert {key: told[key] for key in same} == {key: expected[key] for key in same}
    assert told["latents"]["file"] == str(latents) and len(told["latents"]["sha256"]) == 64
    assert set(told["seconds"]) == {"decode"} and told["encoding"] == expected["encoding"]


def test_a_video_that_cannot_be_written_leaves_its_latents_and_those_after_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "write_video", full)
        with pytest.raises(OSError, match="No space left") as caught:
            sample(tmp_path, "sample.num_frames=7", "sample.seeds=[1,2]")
    first, second = sorted((tmp_path / "run" / "samples").iterdir())
    assert describe_trouble(caught.value) == (
        "x.mp4: No space left on device (the latents of 2 videos are kept: for each of them the same command with "
        f"latents={first} only decodes): choose another path."
    )
    # Without out=, the video has the name that it would have had.
    [video] = sample(tmp_path, f"sample.latents={second}")
    assert video == second.with_suffix(".mp4") and len(read_frames(video)) == 7
    [again] = sample(tmp_path, f"sample.latents={second}", "sample.num_frames=163")
    assert again.name == f"{second.stem}_2.mp4" and torch.equal(frames_of(tmp_path, again), frames_of(tmp_path, video))


def test_a_disk_too_full_for_the_latents_may_hold_the_video(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_latents", full)
        [video] = sample(tmp_path)
        told = capsys.readouterr().err
        assert "No space left on device: the latents are not on disk until the video is written" in told
        assert sorted(path.suffix for path in video.parent.iterdir()) == [".json", ".mp4"]
        with pytest.raises(OSError, match="complete, but was written without its settings"):
            sample(tmp_path, "sample.save_latents=true")


def test_latents_of_an_earlier_version_have_their_settings_beside_them_or_none(tmp_path, decoder_alone):
    [video] = sample(tmp_path, "sample.save_latents=true", "seed=5")
    tensors, metadata = load_file(video.with_suffix(".safetensors")), {"space": "dit", "layout": "B C T h w"}
    for name in ("beside", "alone"):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    shutil.copy(video.with_suffix(".json"), tmp_path / "beside.json")
    [beside] = sample(tmp_path, f"sample.latents={tmp_path / 'beside.safetensors'}", decoder_alone)
    [alone] = sample(tmp_path, f"sample.latents={tmp_path / 'alone.safetensors'}", decoder_alone, "sample.fps=24")
    assert (beside.name, alone.name) == ("beside_2.mp4", "alone.mp4")
    told, nothing = (json.loads(path.with_suffix(".json").read_text()) for path in (beside, alone))
    assert (told["prompt"], told["seed"], nothing["prompt"], "seed" in nothing) == ("a red ball", 5, "", False)
    assert (told["fps"], nothing["fps"], rate_of(beside), rate_of(alone)) == (30, 24, 30, 24)
    assert nothing["num_frames"] == 13 and nothing["latents"]["file"] == str(tmp_path / "alone.safetensors")


def test_wrong_files_are_refused_before_a_weight_is_read(tmp_path):
    latents, ours = torch.zeros(1, 12, 2, 4, 6), {"space": "dit"}
    save_file({"latents": latents}, tmp_path / "other.safetensors", {"space": "vae"})
    for name, tensor in {
        "nan": latents / 0,
        "flat": latents[0],
        "odd": torch.zeros(1, 12, 2, 3, 6),
    }.items():
        save_file({"latents": tensor}, tmp_path / f"{name}.safetensors", ours | {"layout": "B C T h w"})
    write_adapter(tmp_path / "adapter.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, kind, said in (
        ("missing.safetensors", ConfigError, "does not exist: name a .safetensors file of latents"),
        ("", ConfigError, "is a folder: name"),
        ("other.safetensors", ConfigError, "has no latents of a video, but latents: name"),
        ("adapter.safetensors", ConfigError, "has no latents of a video, but .* more: name"),
        ("text.safetensors", CheckpointError, "cannot be read"),
        ("nan.safetensors", CheckpointError, "numbers that are not finite"),
        ("flat.safetensors", CheckpointError, re.escape("of shape (12, 2, 4, 6) or")),
        ("odd.safetensors", ConfigError, "odd.safetensors: height=24 does not fit"),
    ):
        with pytest.raises(kind, match=said):
            sample(tmp_path, f"sample.latents={tmp_path / name}")
    config = load_config("my_lora", road(tmp_path, "sample.latents=x", "sample.grid=true"))
    check_has_adapter(config.sample, tmp_path)
    with pytest.raises(ConfigError, match=r"sample.grid=true samples its videos: leave out sample.latents"):
        list(sample_grid(config))


def test_a_grid_without_memory_says_what_to_change_in_each_stage(tmp_path, monkeypatch):
    config = load_config(
        "my_lora", road(tmp_path, "sample.steps=1", "sample.grid=true", "sample.prompt=a red ball", "sample.fps=24")
    )
    for function, stage, advice in (
        ("encode_prompts", "text", "use memory.t5_dtype=int8"),
        ("sample_latents", "sample", "use memory=24gb or memory=16gb"),
        ("decoded_frames", "decode", "use memory.tiles="),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sample_cells, function, out_of_memory)
            with pytest.raises(ConfigError, match=f"in the stage {stage} .CUDA out of memory.: {advice}"):
                list(sample_grid(config))
    # A cell's latents can be decoded as well.
    [latents] = tmp_path.rglob("*.safetensors")
    with safe_open(latents, "pt") as file:
        assert json.loads(file.metadata()["settings"])["prompt"] == "a red ball"
    cell, grid, _ = sample_grid(config)
    assert (rate_of(cell), rate_of(grid), json.loads(cell.with_suffix(".json").read_text())["fps"]) == (24, 24, 24)
