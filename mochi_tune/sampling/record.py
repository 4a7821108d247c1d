"""Files next to a video: its settings, its latents, and the time and memory of rendering it."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mochi_tune.files import save_tensors, write_atomic
from mochi_tune.models.device import peak_gib, reset_peak
from mochi_tune.models.latents import FPS
from mochi_tune.sampling.requests import Request
from mochi_tune.sampling.sampler import draw_noise


def noise_of(request: Request) -> Tensor:
    """Draws the initial noise of a video."""
    return draw_noise(request.seed, request.num_frames, request.height, request.width)


def tensor_sha256(tensor: Tensor) -> str:
    """Returns the hex sha256 of the bytes of a tensor on the CPU."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def save_latents(request: Request, states: Mapping[str, Tensor]) -> None:
    """Writes the latents of a video next to it: "latents", and "base" if it is compared with the base."""
    named = {"latents": states[list(states)[-1]]} | ({"base": states["base"]} if len(states) > 1 else {})
    metadata = {"space": "dit", "layout": "B C T h w"}
    save_tensors(request.video.with_suffix(".safetensors"), named, metadata, durable=True)


def determinants(request: Request, common: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that determine a video, as JSON values.

    Args:
        request: the request of the video.
        common: settings of all videos that are rendered with it.
    """
    # Rarely used settings of the sampler are left out if they have their defaults.
    unused = {"own_sigmas": None, "guided": (0.0, 1.0), "start_sigma": 1.0}
    sampler = {key: value for key, value in asdict(request.settings).items() if unused.get(key, ...) != value}
    return {
        **{key: getattr(request, key) for key in ("prompt", "negative_prompt", "seed")},
        **{key: getattr(request, key) for key in ("num_frames", "height", "width")},
        "fps": FPS,
        "sampler": sampler,
        **common,
    }


def describe(request: Request, common: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `determinants`, the checksum of the noise and the versions; arguments as for `determinants`."""
    return {
        **determinants(request, common),
        "noise_sha256": tensor_sha256(noise_of(request)),
        "versions": {name: version(name) for name in ("mochi-tune", "torch")},
    }


def file_metadata(request: Request, common: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata of a video file: its prompt as "title", and `describe` as JSON in "comment".

    Files are recorded by name without folder, because a path can reveal who rendered the video.
    """
    record = describe(request, common)
    record["adapters"] = [adapter | {"file": Path(adapter["file"]).name} for adapter in record.get("adapters", [])]
    if start := record.get("init_video"):
        record["init_video"] = start | {"file": Path(start["file"]).name}
    comment = json.dumps(record, ensure_ascii=False)
    return {"title": " ".join(request.prompt.split()), "comment": comment}


def save_settings(request: Request, common: Mapping[str, Any], usage: "Usage") -> None:
    """Writes the settings of a video as .json next to it.

    Args:
        request: the request of the video.
        common: settings of all videos that are rendered with it.
        usage: time and memory of the stages so far.
    """
    device = torch.cuda.get_device_name() if usage.device.type == "cuda" else "cpu"
    record = {**describe(request, common), "encoding": asdict(request.encoding), "device": device, **usage.so_far()}
    content = json.dumps(record, indent=1).encode() + b"\n"
    write_atomic(request.video.with_suffix(".json"), content, durable=True)


class Usage:
    """Measures the seconds and the peak memory of each stage: memory of the GPU, or of the process on a CPU."""

    def __init__(self, device: torch.device, write_line: Callable[[str], object]) -> None:
        self.device = device
        self.write_line = write_line
        self.started: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, estimate: Mapping[str, int] | None = None) -> Iterator[None]:
        """Measures the code inside the context and writes a line with the result; on a GPU also the estimated bytes."""
        reset_peak(self.device)
        self.started = {name: time.perf_counter()}
        yield
        self.so_far()
        is_gpu = self.device.type == "cuda"
        expected = f", estimated {sum(estimate.values()) / 2**30:.2f}" if estimate and is_gpu else ""
        self.write_line(f"{name}: {self.seconds[name]:.1f} s, peak {self.peak_gib[name]} GiB{expected}")

    def so_far(self) -> dict[str, dict[str, float]]:
        """Returns the seconds and the peak memory of each stage, including the current one."""
        for name, started in self.started.items():
            self.seconds[name] = round(time.perf_counter() - started, 3)
            self.peak_gib[name] = peak_gib(self.device)
        return {"seconds": dict(self.seconds), "peak_gib": dict(self.peak_gib)}
