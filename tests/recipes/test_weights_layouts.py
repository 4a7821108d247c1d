"""Every verb with ComfyUI's files alone, as the owners of small cards have them."""

import json

import torch
from helpers_process import run
from helpers_video import write_video
from helpers_weights import TINY, make_comfyui
from safetensors.torch import load_file

SIZES = ["data.num_frames=7", "data.height=32", "data.width=48", "device=cpu", "model=tiny"]


def test_prepare_train_and_sample_with_the_files_of_a_comfyui(tmp_path):
    models = make_comfyui(tmp_path / "ComfyUI", TINY) / "models"
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", 7, width=48, height=32)
    (tmp_path / "videos" / "a.txt").write_text("a red ball")
    latents = []
    for name, weights in (("official", []), ("comfyui", [f"model.weights={models}"])):
        common = ["conf=my_lora", *SIZES, *weights, f"name={name}"]
        quiet = ["train.steps=1", "train.sample_every=0", "train.validate_every=0"]
        rendering = ['prompt="a red ball"', "sample.steps=2", "sample.save_latents=true", f"out={name}.mp4"]
        rendering.append(f"sample.prompt_cache={tmp_path / name}")
        for verb, more in (("prepare", []), ("train", quiet), ("sample", rendering)):
            done = run(verb, *common, *more, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        latents.append(load_file(tmp_path / f"{name}.safetensors")["latents"])
        adapter = load_file(tmp_path / "runs" / f"{name}_tiny" / "adapter.safetensors")
        if name == "official":
            trained = adapter
    assert torch.equal(*latents) and all(torch.equal(adapter[key], tensor) for key, tensor in trained.items())
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("official", "comfyui")]
    assert records[0]["base_fingerprint"] == records[1]["base_fingerprint"]
