"""What is written beside a video: its settings, its latents, and what rendering it took."""

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
    """Draws the noise that a video's sampling starts from."""
    return draw_noise(request.seed, request.num_frames, request.height, request.width)


def tensor_sha256(tensor: Tensor) -> str:
    """Returns the hex sha256 of the bytes of a tensor on the CPU."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def save_latents(request: Request, states: Mapping[str, Tensor]) -> None:
    """Writes a video's latents beside it: "latents", and "base" when the base is compared with."""

    named = {"latents": states[list(states)[-1]]} | ({"base": states["base"]} if len(states) > 1 else {})
    save_tensors(request.video.with_suffix(".safetensors"), named, {"space": "dit", "layout": "B C T h w"})


def determinants(request: Request, common: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that determine a video, as JSON values.

    Args:
        request: of the video.
        common: settings of all videos that are rendered with it.
    """
    # The schedule of steps is what most videos have; what few have is left out where it is not used.
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
    """Returns the settings that determine a video, its noise and the versions; takes what `determinants` takes."""
    return {
        **determinants(request, common),
        "noise_sha256": tensor_sha256(noise_of(request)),
        "versions": {name: version(name) for name in ("mochi-tune", "torch")},
    }


def file_metadata(request: Request, common: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a video file says of itself: its prompt as title, and what determines it as JSON in the comment.

    Files go by their names: a path may tell who rendered it.
    """
    record = describe(request, common)
    record["adapters"] = [adapter | {"file": Path(adapter["file"]).name} for adapter in record.get("adapters", [])]
    if start := record.get("init_video"):
        record["init_video"] = start | {"file": Path(start["file"]).name}
    comment = json.dumps(record, ensure_ascii=False)
    return {"title": " ".join(request.prompt.split()), "comment": comment}


def save_settings(request: Request, common: Mapping[str, Any], usage: "Usage") -> None:
    """Writes a video's settings as .json beside it.

    Args:
        request: of the video.
        common: settings of all videos that are rendered with it.
        usage: of the stages until now.
    """
    device = torch.cuda.get_device_name() if usage.device.type == "cuda" else "cpu"
    record = {**describe(request, common), "encoding": asdict(request.encoding), "device": device, **usage.so_far()}
    write_atomic(request.video.with_suffix(".json"), json.dumps(record, indent=1).encode() + b"\n")


class Usage:
    """Measures the seconds and the peak memory of each stage: of the GPU's, or of the process on a CPU."""

    def __init__(self, device: torch.device, write_line: Callable[[str], object]) -> None:
        self.device = device
        self.write_line = write_line
        self.started: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, foretold: Mapping[str, int] | None = None) -> Iterator[None]:
        """Measures what runs inside, and writes a line about it, with the bytes that were foretold of a GPU."""
        reset_peak(self.device)
        self.started = {name: time.perf_counter()}
        yield
        self.so_far()
        expected = f", foretold {sum(foretold.values()) / 2**30:.2f}" if foretold and self.device.type == "cuda" else ""
        self.write_line(f"{name}: {self.seconds[name]:.1f} s, peak {self.peak_gib[name]} GiB{expected}")

    def so_far(self) -> dict[str, dict[str, float]]:
        """Returns the seconds and the peak of each stage, the one under way included."""
        for name, started in self.started.items():
            self.seconds[name] = round(time.perf_counter() - started, 3)
            self.peak_gib[name] = peak_gib(self.device)
        return {"seconds": dict(self.seconds), "peak_gib": dict(self.peak_gib)}
