"""Reads clips from video files: frames at 30 fps, turned upright, resized and cropped; no model is involved."""

import contextlib
import json
import math
import multiprocessing
import signal
import socket
import time
import traceback
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from mochi_tune.data_prep.frames import decode_frames
from mochi_tune.data_prep.probe import VideoSource, probe_video
from mochi_tune.errors import DataError
from mochi_tune.models.latents import FPS

# Part of the cache's fingerprint: raise it whenever the same file would give other frames.
TRANSFORM_VERSION = 1
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# Memory for one chunk of source frames while it is resized in fp32.
CHUNK_BYTES = 128 * 2**20
# For the child to import torch and decord from a slow disk.
START_SECONDS = 120.0


@dataclass(frozen=True)
class ClipTransform:
    """What is cut out of every clip, in frames and pixels; `allow_upscale` admits sources smaller than that."""

    num_frames: int
    height: int
    width: int
    allow_upscale: bool = False


@dataclass(frozen=True)
class DecodedClip:
    """One clip as the VAE takes it.

    Attributes:
        frames: uint8 (F, H, W, 3), upright, one every 1/30 s.
        report: what was done: source_width, source_height (upright pixels), source_frames, source_seconds,
            pixel_aspect (width to height of one stored pixel; reported, not corrected), rotation (degrees
            counter-clockwise), scale, crop (left, top, width, height in upright source pixels), start_seconds.
    """

    frames: torch.Tensor
    report: dict


@dataclass(frozen=True)
class _Fit:
    """How an upright picture covers the target: scaled to rows x columns, then cut from (left, top)."""

    scale: float
    rows: int
    columns: int
    top: int
    left: int


def find_videos(folder: Path) -> list[Path]:
    """Lists the videos in `folder` and below it, sorted by path; files whose name starts with a dot are left out.

    Raises:
        DataError: the folder does not exist, is a file, or holds no video.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data.videos={folder} is not a folder: name the folder that holds your clips.")
    if not folder.is_dir():
        raise DataError(f"data.videos={folder} does not exist: name the folder that holds your clips.")
    videos = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".") and not path.is_dir()
    )
    if not videos:
        raise DataError(f"data.videos={folder} holds no video: put clips in it ({' '.join(VIDEO_SUFFIXES)}).")
    return videos


def choose_frames(source: VideoSource, num_frames: int) -> list[int]:
    """Picks for each k/30 s the nearest source frame, the earlier one of two; ends early where the source ends.

    The source ends half a frame period after its last frame, or half of 1/30 s if that is longer: a source at
    30 fps gives exactly its own frames.
    """
    times = source.timestamps
    reach = times[-1] - times[0] + max(source.last_period, Fraction(1, FPS)) / 2
    indices = []
    for k in range(min(num_frames, math.ceil(reach * FPS))):
        target = times[0] + Fraction(k, FPS)
        after = min(bisect_left(times, target), len(times) - 1)
        before = max(after - 1, 0)
        indices.append(before if target - times[before] <= abs(times[after] - target) else after)
    return indices


def decode_clip(path: Path, transform: ClipTransform) -> DecodedClip:
    """Decodes the head of a video: frame k is the source frame nearest to k/30 s after the first one.

    Raises:
        DataError: the file is unreadable, truncated, damaged or without pictures, HDR, too short, or too small.
    """
    source = probe_video(path)
    indices = choose_frames(source, transform.num_frames)
    if len(indices) < transform.num_frames:
        raise DataError(
            f"{path}: is too short: have {len(indices)} frames at {FPS} fps, need {transform.num_frames}: "
            "use a longer clip or a smaller data.num_frames."
        )
    wanted = sorted(set(indices))
    fit, chunks, stack = None, [], []
    for index, frame in zip(wanted, decode_frames(path, source, wanted), strict=True):
        height, width = frame.shape[:2]
        fit = fit or _fit(path, height, width, transform)
        stack.append(torch.from_numpy(frame))
        if len(stack) * frame.size * 4 >= CHUNK_BYTES or index == wanted[-1]:
            chunks.append(_resize_and_crop(torch.stack(stack), fit, transform))
            stack = []
    assert fit is not None
    frames = torch.cat(chunks)
    if len(wanted) < len(indices):
        frames = frames[[bisect_left(wanted, index) for index in indices]]
    return DecodedClip(frames, _report(source, height, width, fit, transform))


def _fit(path: Path, height: int, width: int, transform: ClipTransform) -> _Fit:
    scale = max(transform.height / height, transform.width / width)
    if scale > 1 and not transform.allow_upscale:
        raise DataError(
            f"{path}: is {width}x{height} pixels, too small for {transform.width}x{transform.height}: "
            "set a smaller data.height and data.width, or data.allow_upscale=true."
        )
    rows, columns = round(height * scale), round(width * scale)
    return _Fit(scale, rows, columns, (rows - transform.height) // 2, (columns - transform.width) // 2)


def _resize_and_crop(frames: torch.Tensor, fit: _Fit, transform: ClipTransform) -> torch.Tensor:
    """Scales uint8 (n, h, w, 3) with antialiased bicubic in fp32 and cuts out the centre: uint8 (n, H, W, 3)."""
    if (fit.rows, fit.columns) != frames.shape[1:3]:
        planes = frames.permute(0, 3, 1, 2).float()
        planes = torch.nn.functional.interpolate(planes, (fit.rows, fit.columns), mode="bicubic", antialias=True)
        frames = planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    rows = slice(fit.top, fit.top + transform.height)
    columns = slice(fit.left, fit.left + transform.width)
    return frames[:, rows, columns].contiguous()


def _report(source: VideoSource, height: int, width: int, fit: _Fit, transform: ClipTransform) -> dict:
    x, y = width / fit.columns, height / fit.rows
    first, last = source.timestamps[0], source.timestamps[-1]
    return {
        "source_width": width,
        "source_height": height,
        "source_frames": len(source.timestamps),
        "source_seconds": round(float(last - first + source.last_period), 4),
        "pixel_aspect": round(source.pixel_aspect, 4),
        "rotation": source.rotation,
        "scale": round(fit.scale, 6),
        "crop": [round(v, 2) for v in (fit.left * x, fit.top * y, transform.width * x, transform.height * y)],
        "start_seconds": round(float(first), 4),
    }


class ClipDecoder:
    """Decodes clips in a child process, which may hang or die on one of them without ending the run.

    decord can loop for ever in native code that holds the interpreter's lock, so only another process can stop it.
    The child is spawned, not forked: that works beside CUDA and threads. Frames travel through a socket straight
    into the tensor that the caller gets.

    Use as a context manager:
        with ClipDecoder(transform, timeout_seconds=120) as decoder:
            for path, clip in decoder.decode_all(paths): ...

    Args:
        transform: what is cut out of every clip.
        timeout_seconds: what one clip may take before the child is killed.
    """

    def __init__(self, transform: ClipTransform, timeout_seconds: float) -> None:
        self.transform = transform
        self.timeout_seconds = timeout_seconds
        self._child: _Child | None = None
        self._asked: Path | None = None
        self._asked_at = 0.0

    def __enter__(self) -> "ClipDecoder":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child, whatever it is doing; a later `decode` starts another one."""
        if self._child is not None:
            self._child.process.kill()
            # A process that waits for a dead network disk cannot even be killed; leave it behind.
            self._child.process.join(5)
            self._child.socket.close()
        self._child = self._asked = None

    def decode(self, path: Path) -> DecodedClip:
        """Decodes one clip as `decode_clip` does.

        Raises:
            DataError: as `decode_clip`; also when the clip takes longer than `timeout_seconds` or kills the child.
        """
        self._ask(path)
        return self._answer()

    def decode_all(self, paths: Iterable[Path]) -> Iterator[tuple[Path, DecodedClip | DataError]]:
        """Decodes clips in turn, the next one while the caller works on the present one.

        Yields:
            The path, and its clip or the error that refuses it.
        """
        paths = list(paths)
        try:
            for number, path in enumerate(paths):
                if number == 0:
                    self._ask(path)
                try:
                    result = self._answer()
                except DataError as error:
                    result = error
                if number + 1 < len(paths):
                    self._ask(paths[number + 1])
                yield path, result
        finally:
            if self._asked is not None:
                self.close()

    def _ask(self, path: Path) -> None:
        assert self._asked is None, f"{self._asked} is still being decoded"
        if self._child is None or not self._child.process.is_alive():
            self.close()
            self._child = _Child(self.transform)
        self._asked, self._asked_at = path, time.monotonic()
        # If the child has just died, the missing answer will say so.
        with contextlib.suppress(ConnectionError):
            _send(self._child.socket, {"path": str(path)})

    def _answer(self) -> DecodedClip:
        """Waits for the clip that was asked for; kills the child if it does not come."""
        path, child = self._asked, self._child
        assert child is not None
        try:
            if not child.is_ready:
                _receive(child.socket, time.monotonic() + START_SECONDS)
                child.is_ready, self._asked_at = True, time.monotonic()
            # An answer that has been waiting for a late caller is read at once, even after its time.
            reply = _receive(child.socket, self._asked_at + self.timeout_seconds)
            frames = torch.empty(reply.get("shape", 0), dtype=torch.uint8)
            _fill(child.socket, frames.numpy().data, time.monotonic() + self.timeout_seconds)
        except TimeoutError as error:
            self.close()
            raise DataError(
                f"{path}: was not decoded within {self.timeout_seconds:g} s: re-encode it, remove it, "
                "or raise data.decode_timeout_seconds."
            ) from error
        except (EOFError, ConnectionError) as error:
            child.process.join(5)
            code = child.process.exitcode
            self.close()
            if not child.is_ready and (code is None or code >= 0):
                # It ended by itself before it got a clip, and wrote the reason to stderr.
                raise RuntimeError(f"the decoder process did not start, exit code {code}") from error
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise DataError(f"{path}: the decoder died on it, {how}: re-encode it or remove it.") from error
        self._asked = None
        if "refused" in reply:
            raise DataError(reply["refused"])
        if "bug" in reply:
            raise RuntimeError(f"decoding {path} failed in the decoder process:\n{reply['bug']}")
        return DecodedClip(frames, reply["report"])


class _Child:
    """A decoder process and the parent's end of the socket between them."""

    def __init__(self, transform: ClipTransform) -> None:
        self.socket, theirs = socket.socketpair()
        self.process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(theirs, transform), name="clip-decoder", daemon=True
        )
        self.process.start()
        theirs.close()
        self.is_ready = False


def _serve(parent: socket.socket, transform: ClipTransform) -> None:
    """Runs in the child: decodes one path after the other until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Imported now, so that no clip's time is spent on it; av before decord, see `decode_frames`.
    import av  # noqa: F401
    import decord  # noqa: F401

    try:
        _send(parent, {"ready": True})
        while True:
            path = Path(_receive(parent, None)["path"])
            try:
                clip = decode_clip(path, transform)
            except DataError as error:
                _send(parent, {"refused": str(error)})
            except Exception:  # noqa: BLE001  (raised again in the parent, with this traceback)
                _send(parent, {"bug": traceback.format_exc()})
            else:
                _send(parent, {"report": clip.report, "shape": list(clip.frames.shape)})
                parent.sendall(clip.frames.numpy().data.cast("B"))
    except (EOFError, ConnectionError):
        return


def _send(to: socket.socket, message: dict) -> None:
    """Sends a message: its length in 8 bytes, then JSON."""
    text = json.dumps(message).encode()
    to.sendall(len(text).to_bytes(8, "big") + text)


def _receive(source: socket.socket, deadline: float | None) -> dict:
    length = bytearray(8)
    _fill(source, memoryview(length), deadline)
    text = bytearray(int.from_bytes(length, "big"))
    _fill(source, memoryview(text), deadline)
    return json.loads(text)


def _fill(source: socket.socket, view: memoryview, deadline: float | None) -> None:
    """Reads until `view` is full; EOFError if the other side is gone, TimeoutError after `deadline` (monotonic)."""
    view = view.cast("B")
    while view:
        source.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
        count = source.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
