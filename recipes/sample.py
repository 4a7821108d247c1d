"""Renders a prompt to a video, with or without adapters: T5, DiT and VAE in turn, one at a time in memory."""

import hashlib
import json
import re
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from mochi_tune.adapters import Adapter, check_adapter, load_adapter
from mochi_tune.config import RunConfig, sample_size, sampler_settings, weights_folder
from mochi_tune.errors import ConfigError
from mochi_tune.files import file_sha256, make_writable_folder
from mochi_tune.lora import apply_adapter, linear_shapes
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.latents import FPS, to_vae_latents
from mochi_tune.models.text_encoder import MAX_TOKENS, TextEncoder
from mochi_tune.models.vae_streaming import decode_chunks
from mochi_tune.sampler import draw_noise, sample_latents
from mochi_tune.video import write_video
from mochi_tune.weights import base_identity, check_weights, load_decoder, load_dit, meta_dit


def main(config: RunConfig) -> Path:
    """Renders `config.sample` and returns the path of the video; its settings stand beside it as .json."""
    device, dtype = find_device(config.device), DTYPES[config.model.dtype]
    folder, sample, settings = weights_folder(config), config.sample, sampler_settings(config)

    # Everything that can be refused is refused before a weight is read.
    if not sample.prompt.strip():
        raise ConfigError('sample.prompt is empty: say what to render, prompt="a teacup shatters".')
    video = find_output(config)
    check_weights(folder, ["text_encoder", "dit", "decoder"])
    identity = base_identity(folder)
    shapes = linear_shapes(meta_dit(folder))
    adapters = find_adapters(config)
    loaded: list[tuple[Adapter, float]] = []
    for path, strength in adapters:
        adapter = load_adapter(path)
        check_adapter(adapter, shapes, identity)
        loaded.append((adapter, strength))
    make_writable_folder(video.parent)
    seconds: dict[str, float] = {}

    started = time.perf_counter()
    encoder = TextEncoder.load(folder, device, torch.float32)
    num_tokens = encoder.count_tokens(sample.prompt)
    prompt, negative_prompt = encoder.encode([sample.prompt, sample.negative_prompt])
    del encoder
    free_memory()
    seconds["text"] = time.perf_counter() - started
    if num_tokens > MAX_TOKENS:
        tqdm.write(f"the prompt has {num_tokens} tokens: only its first {MAX_TOKENS} are used")

    started = time.perf_counter()
    dit = load_dit(folder, device, dtype)
    for i, (adapter, strength) in enumerate(loaded):
        # An adapter at strength 0 is left out, so that the base is rendered exactly.
        if strength:
            apply_adapter(dit, adapter.scaled(strength), f"adapter_{i}")
    noise = draw_noise(config.seed, *sample_size(config))
    latents = sample_latents(dit, noise, prompt, negative_prompt, settings, "sample")
    del dit
    free_memory()
    seconds["sample"] = time.perf_counter() - started

    started = time.perf_counter()
    decoder = load_decoder(folder, device, dtype)
    frames = tqdm(decode_chunks(decoder, to_vae_latents(latents)), "decode", latents.shape[2], leave=False)
    write_video(video, (chunk[0] for chunk in frames))
    seconds["decode"] = time.perf_counter() - started

    if sample.save_latents:
        from safetensors.torch import save_file

        save_file(
            {"latents": latents.cpu()}, video.with_suffix(".safetensors"), {"space": "dit", "layout": "B C T h w"}
        )
    record = {
        "prompt": sample.prompt,
        "negative_prompt": sample.negative_prompt,
        "seed": config.seed,
        **dict(zip(("num_frames", "height", "width"), sample_size(config), strict=True)),
        "fps": FPS,
        "sampler": asdict(settings),
        "adapters": [
            {"file": str(path), "sha256": file_sha256(path), "strength": strength} for path, strength in adapters
        ],
        "model": config.model.name,
        "base_fingerprint": identity,
        "dtype": config.model.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "noise_sha256": hashlib.sha256(noise.numpy().tobytes()).hexdigest(),
        "versions": {name: version(name) for name in ("mochi-tune", "torch")},
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }
    if device.type == "cuda":
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    video.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return video


def find_output(config: RunConfig) -> Path:
    """Returns a path where nothing lies yet: the one asked for, or a new one in the run's samples.

    Raises:
        ConfigError: the path asked for is taken, or is no .mp4.
    """
    if config.sample.out:
        path = Path(config.sample.out)
        if path.suffix != ".mp4":
            raise ConfigError(f"out={path} is not an .mp4 file: use {path.with_suffix('.mp4')}.")
        for taken in (path, path.with_suffix(".json"), path.with_suffix(".safetensors")):
            if taken.exists():
                raise ConfigError(f"out={path}: {taken} exists and is never overwritten: use another name.")
        return path
    folder = Path(config.run_dir) / "samples"
    words = re.sub(r"\W+", "_", config.sample.prompt.lower()).strip("_")[:40]
    stem = f"{words or 'prompt'}_seed_{config.seed}"
    number = 1
    while any(folder.glob(f"{stem}_{number:03d}.*")):
        number += 1
    return folder / f"{stem}_{number:03d}.mp4"


def find_adapters(config: RunConfig) -> list[tuple[Path, float]]:
    """Returns the adapter files and their strengths; the run's own adapter where none is named and there is one.

    Raises:
        ConfigError: not one strength an adapter, or a strength that is no number.
    """
    named, strengths = config.sample.adapter, config.sample.adapter_strength
    if named is None:
        own = Path(config.run_dir) / "adapter.safetensors"
        named = [own] if own.exists() else []
    paths = [Path(str(path)) for path in (named if isinstance(named, list) else [named])]
    for strength in strengths if isinstance(strengths, list) else [strengths]:
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise ConfigError(f"adapter_strength={strength} is not a number: use for example 0.8.")
    if not paths and strengths not in (0, 1):
        raise ConfigError(f"adapter_strength={strengths} has no adapter: name one with adapter=FILE, or train first.")
    if not isinstance(strengths, list):
        strengths = [strengths] * len(paths)
    if len(strengths) != len(paths):
        raise ConfigError(
            f"adapter_strength has {len(strengths)} values for {len(paths)} adapters: give one for all or one each."
        )
    return list(zip(paths, map(float, strengths), strict=True))
