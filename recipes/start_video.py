"""Init videos: a rendering can start from a video or an image, encoded by the VAE, instead of pure noise."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mochi_tune.config.schema import DataConfig
from mochi_tune.data_prep.clips import Cut, DecodedClip, decode_clip
from mochi_tune.data_prep.encode import encode_frames
from mochi_tune.data_prep.probe import Scan, scan_video
from mochi_tune.errors import ConfigError, DataError
from mochi_tune.files import file_sha256
from mochi_tune.models.device import free_memory
from mochi_tune.models.latents import FPS, TEMPORAL_FACTOR, to_latents
from mochi_tune.sampling.requests import Request
from mochi_tune.weights.folder import WeightsFolder

# A file, and the number of frames, the height and the width that it is cut to.
Start = tuple[Path, int, int, int]


def start_of(request: Request) -> Start | None:
    """Returns the init video of a request; None for pure noise."""
    if request.init_video is None:
        return None
    return request.init_video, request.num_frames, request.height, request.width


def starts_of(requests: Iterable[Request]) -> list[Start]:
    """Returns the distinct init videos of requests, in order."""
    return list(dict.fromkeys(start for request in requests if (start := start_of(request)) is not None))


def is_image(scan: Scan) -> bool:
    """Whether a file is a single image, stored as a still or as a video of one frame."""
    return scan.num_source_frames == 1


def check_starts(starts: Iterable[Start], data: DataConfig) -> dict[Path, str]:
    """Checks init videos by their headers and packets; returns the sha256 of each file.

    Args:
        starts: the init videos.
        data: `data.hdr` says whether HDR is converted.

    Raises:
        ConfigError: a file does not exist, or is shorter than the rendering.
        DataError: a file cannot be read, or is HDR.
    """
    scans: dict[Path, Scan] = {}
    for path, num_frames, _, _ in starts:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigError(f"sample.init_video={path} {what}: name a video or an image.")
        if path not in scans:
            scans[path] = scan_video(path)
        scan = scans[path]
        if scan.hdr and data.hdr == "refuse":
            raise DataError(f"{path}: is HDR, {scan.hdr}, but the models take SDR: set data.hdr=tonemap.")
        if not is_image(scan) and scan.num_frames < num_frames:
            longest = (scan.num_frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1
            raise ConfigError(
                f"sample.init_video={path} has {scan.num_frames} frames at {FPS} fps, not {num_frames}: use "
                f"sample.num_frames={longest}, or a longer video."
            )
    return {path: file_sha256(path) for path in scans}


def encode_starts(
    starts: Iterable[Start],
    data: DataConfig,
    weights: WeightsFolder,
    device: torch.device,
    dtype: torch.dtype,
    write_line: Callable[[str], object],
) -> dict[Start, tuple[Tensor, dict[str, Any]]]:
    """Cuts and encodes each init video; frees the encoder afterwards.

    Args:
        starts: init videos that passed `check_starts`.
        data: `data.hdr` says whether HDR is converted, `data.decoder` which library decodes.
        weights: weights of the VAE.
        device: device of the encoder.
        dtype: dtype of the encoder.
        write_line: reports how each file was cut.

    Returns:
        The mean of the posterior in the DiT's space, fp32 (1, C, T, h, w) on the CPU, and the report of
        `data_prep.clips`.

    Raises:
        DataError: a file is damaged, or the device has too little memory.
    """
    encoded, encoder = {}, None
    for start in tqdm(list(starts), "init videos", leave=False):
        clip, size = _decode(start, data), start[1:]
        write_line(_describe(start, clip))
        encoder = encoder or weights.load_encoder(device, dtype)
        mean, _ = encode_frames(encoder, clip.frames, f"{start[0]} at {size[0]}x{size[1]}x{size[2]}")
        encoded[start] = to_latents(mean[None]), clip.report
    del encoder
    free_memory()
    return encoded


def _decode(start: Start, data: DataConfig) -> DecodedClip:
    """Decodes an init video as `prepare` does; repeats an image, enlarges a small one."""
    path, num_frames, height, width = start
    is_repeated = is_image(scan_video(path))
    cut = Cut(1 if is_repeated else num_frames, height, width, allow_upscale=True, hdr=data.hdr, decoder=data.decoder)
    clip = decode_clip(path, cut)
    return DecodedClip(clip.frames.expand(num_frames, -1, -1, -1), clip.report) if is_repeated else clip


def _describe(start: Start, clip: DecodedClip) -> str:
    path, num_frames, height, width = start
    report = clip.report
    left, top, columns, rows = report["crop"]
    size = report["source_width"], report["source_height"]
    done = [f"its first {num_frames} frames at {FPS} fps"]
    if report["source_frames"] == 1:
        done = [f"an image, shown in {num_frames} frames"]
    if (columns, rows) != size:
        done.append(f"cropped from {size[0]}x{size[1]} to {columns:g}x{rows:g} pixels at ({left:g}, {top:g})")
    if report["scale"] != 1:
        done.append(f"{'enlarged' if report['scale'] > 1 else 'scaled down'} to {width}x{height}")
    return f"init_video {path}: {', '.join(done)}"
