"""Files next to a video: its settings, its latents, and the time and memory of rendering it."""

import contextlib
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mochi_tune.errors import CheckpointError, ConfigError, one_line, some
from mochi_tune.files import fsync, move_to_free_name, parse_object, safetensors_parts, temporary_file, write_atomic
from mochi_tune.models.device import peak_gib, reset_peak
from mochi_tune.models.latents import LATENT_CHANNELS
from mochi_tune.sampling.requests import Request
from mochi_tune.sampling.sampler import draw_noise

# The metadata of every file of latents.
LATENTS = {"space": "dit", "layout": "B C T h w"}
# Entries of a record that name a file which the video was made from.
FILES = ("init_video", "latents")
SMALLER = "lower sample.num_frames, sample.height or sample.width"
# What to change if the GPU's memory does not suffice, by stage.
ADVICE = {
    "text": "use memory.t5_dtype=int8, or a sample.prompt_cache that was filled on a GPU with more memory",
    "encode": SMALLER,
    "sample": f"use memory=24gb or memory=16gb, or {SMALLER}",
    "decode": "use memory.tiles=[2,2], or more tiles, which leave faint seams",
}


@dataclass(frozen=True)
class Sampled:
    """A video that is sampled and not decoded yet.

    Attributes:
        request: the request of the video.
        states: latents (1, C, T, h, w) by variant, left to right, on the CPU.
        record: its settings, see `describe`.
        latents: the file that keeps its latents until the video is written; None if they were read from a file.
    """

    request: Request
    states: dict[str, Tensor]
    record: dict[str, Any]
    latents: Path | None = None


def noise_of(request: Request) -> Tensor:
    """Draws the initial noise of a video."""
    return draw_noise(request.seed, request.num_frames, request.height, request.width)


def tensor_sha256(tensor: Tensor) -> str:
    """Returns the hex sha256 of the bytes of a tensor on the CPU."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def save_latents(path: Path, states: Mapping[str, Tensor], record: Mapping[str, Any], may_replace: bool = True) -> Path:
    """Writes the latents of a video: "latents", and "base" if it is compared with the base. Returns the path.

    Args:
        path: the file.
        states: latents by variant.
        record: settings of the video, kept in the metadata.
        may_replace: whether to replace an existing `path`; if False, the file gets a new name next to it.
    """
    named = {"latents": states[list(states)[-1]]} | ({"base": states["base"]} if len(states) > 1 else {})
    metadata = LATENTS | {"settings": json.dumps(record, ensure_ascii=False)}
    with temporary_file(path) as temporary:
        with open(temporary, "wb") as file:
            file.writelines(safetensors_parts(named, metadata))
        fsync(temporary)
        return temporary.replace(path) if may_replace else move_to_free_name(temporary, path)


def read_latents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_latents` wrote: the latents by variant, left to right, and the settings of the video.

    Files of earlier versions have no settings in them; those of the .json next to them are returned, or {}.

    Raises:
        ConfigError: there is no such file, or it has no latents.
        CheckpointError: the file is damaged.
    """
    hint = "name a .safetensors file of latents that `mochi-tune sample` wrote"
    if not path.is_file():
        raise ConfigError(f"sample.latents={path} {'is a folder' if path.is_dir() else 'does not exist'}: {hint}.")
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, sorted(file.keys())
            if "latents" not in names or LATENTS.items() - metadata.items():
                raise ConfigError(f"sample.latents={path} has no latents of a video, but {some(names)}: {hint}.")
            found = {name: file.get_tensor(name).float() for name in ("base", "latents") if name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"sample.latents={path} cannot be read ({one_line(error)}): {hint}.") from None
    shape = tuple(found["latents"].shape)
    is_right = len(shape) == 5 and shape[:2] == (1, LATENT_CHANNELS)
    if not is_right or any(each.shape != shape or not bool(each.isfinite().all()) for each in found.values()):
        raise CheckpointError(
            f"sample.latents={path} has latents of shape {shape} or of numbers that are not finite, and the decoder "
            f"takes finite ones of (1, {LATENT_CHANNELS}, T, h, w): {hint}."
        )
    record = parse_object(metadata.get("settings", ""))
    if record is None and (beside := path.with_suffix(".json")).is_file():
        record = parse_object(beside.read_bytes())
    states = {"adapted": found["latents"]} if len(found) == 1 else found
    return states, record if record is not None and _is_record(record) else {}


def _is_record(record: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a record of `describe`, and not of another program."""
    adapters = record.get("adapters", [])
    named = [*(adapters if isinstance(adapters, list) else [None]), *(record[key] for key in FILES if key in record)]
    return (
        isinstance(record.get("prompt"), str)
        and all(isinstance(record.get(key, {}), dict) for key in ("weights", "memory"))
        and all(isinstance(each, dict) and isinstance(each.get("file"), str) for each in named)
    )


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
        "fps": request.fps,
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


def file_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata of a video file: its prompt as "title", and its settings as JSON in "comment".

    Files are recorded by name without folder, because a path can reveal who rendered the video.

    Args:
        record: settings of the video, see `describe`.
    """
    adapters = [adapter | {"file": Path(adapter["file"]).name} for adapter in record.get("adapters", [])]
    files = {key: record[key] | {"file": Path(record[key]["file"]).name} for key in FILES if record.get(key)}
    comment = json.dumps({**record, "adapters": adapters, **files}, ensure_ascii=False)
    return {"title": " ".join(record["prompt"].split()), "comment": comment}


def save_settings(request: Request, record: Mapping[str, Any], usage: "Usage") -> None:
    """Writes the settings of a video as .json next to it.

    Args:
        request: the request of the video.
        record: settings of the video, see `describe`.
        usage: time and memory of the stages so far.
    """
    device = torch.cuda.get_device_name() if usage.device.type == "cuda" else "cpu"
    record = {**record, "encoding": asdict(request.encoding), "device": device, **usage.so_far()}
    content = json.dumps(record, indent=1).encode() + b"\n"
    write_atomic(request.video.with_suffix(".json"), content, durable=True)


@contextlib.contextmanager
def explain_out_of_memory(stage: str) -> Iterator[None]:
    """Replaces an out-of-memory error by one line that says in which stage it happened, and what to change.

    Raises:
        ConfigError: replaces torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The frames of the error keep the model alive.
        traceback.clear_frames(error.__traceback__)
        reason = str(error).split(". ")[0]
        raise ConfigError(
            f"the GPU's memory does not suffice in the stage {stage} ({reason}): {ADVICE[stage]}."
        ) from None


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
        with explain_out_of_memory(name):
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
