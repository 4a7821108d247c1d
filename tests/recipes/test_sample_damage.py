"""Weights whose numbers are damaged: their headers are right, and what they compute is not finite."""

import shutil

import pytest
import torch
from helpers_road import road
from helpers_weights import TINY
from safetensors.torch import load_file, save_file

from mochi_tune.config.load import load_config
from mochi_tune.errors import CheckpointError
from mochi_tune.recipes import sample, sample_grid
from mochi_tune.sampling.prompt_cache import PromptCache
from mochi_tune.sampling.video import read_frames


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        (
            "text_encoder/model.safetensors",
            "encoder.final_layer_norm.weight",
            "of the prompt 'a red ball' are not finite",
        ),
        ("dit.safetensors", "final_layer.linear.bias", "the latents are not finite and were not decoded"),
    ],
)
@pytest.mark.parametrize("recipe", [sample, sample_grid])
def test_numbers_that_are_not_finite_become_no_video(tmp_path, recipe, path, name, message):
    weights = tmp_path / "weights"
    shutil.copytree(TINY, weights, ignore=shutil.ignore_patterns("sha256.json"))
    tensors = load_file(weights / path)
    tensors[name][0] = torch.nan
    save_file(tensors, weights / path)
    cache = f"sample.prompt_cache={tmp_path / 'prompts'}"
    grid = ["sample.grid=true"] if recipe is sample_grid else []
    more = (f"model.weights={weights}", "sample.prompt=a red ball", "sample.steps=2", cache, *grid)
    config = load_config("my_lora", road(tmp_path / "run", *more))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=message):
            list(recipe.main(config))
    assert not list(tmp_path.rglob("*.mp4")) and not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("more", [(), ("sample.grid=true",), ("parallel.shard=1/1",)])
def test_an_error_in_a_later_video_leaves_those_before_it(tmp_path, capsys, more):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red ball"}\n{"prompt": "a cat", "guidance": 1e38}\n')
    settings = (f"sample.prompts={tmp_path / 'p.jsonl'}", "sample.steps=2", *more)
    videos = []
    with pytest.raises(CheckpointError, match="the latents are not finite"):
        for video in (sample_grid if more else sample).main(load_config("my_lora", road(tmp_path / "run", *settings))):
            videos.append(video)
    assert len(videos) == 1 and len(read_frames(videos[0])) == 7 and videos[0].with_suffix(".json").exists()
    assert "video 2 of 2 failed; the ones before it " in capsys.readouterr().err


def test_features_that_are_not_finite_are_not_taken_from_the_cache(tmp_path):
    cache = PromptCache(tmp_path, "a T5", torch.float32)
    cache.put("a cat", torch.ones(3, 4))
    cache.put("a dog", torch.tensor([[1.0, torch.nan]]))
    found = cache.get("a cat")
    assert found is not None and torch.equal(found, torch.ones(3, 4))
    assert cache.get("a dog") is None
