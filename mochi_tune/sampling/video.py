"""Writes and reads video files."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mochi_tune.files import fsync, move_to_free_name, temporary_file
from mochi_tune.models.latents import FPS
from mochi_tune.sampling.formats import CODECS, Encoding, encoding_of
from mochi_tune.sampling.pictures import write_pictures

# Colour tags, without which players guess the colours by the size. ITU-T H.273 has the same number 1 for the matrix,
# primaries and transfer of BT.709.
BT709, LIMITED_RANGE, FULL_RANGE = 1, 1, 2
# libswscale flags: bicubic filter, accurate rounding, full chroma interpolation and full chroma input.
EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000


def write_video(
    path: Path,
    frame_chunks: Iterable[Tensor],
    may_replace: bool = True,
    fps: float = FPS,
    encoding: Encoding | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Writes a video from chunks of uint8 frames (F, H, W, 3); the file appears only when it is complete on disk.

    Args:
        path: the file, with the suffix of the format, or a folder for several frames as PNG. Its parent must exist.
        frame_chunks: frames in order, with even height and width.
        may_replace: whether to replace an existing `path`; if False, the video gets a new name next to it.
        fps: frames per second, 1 to 120.
        encoding: format, codec and quality; None for the default of the suffix.
        metadata: texts for the keys "title" and "comment", stored in the file.

    Returns:
        The path of the video.

    Raises:
        ConfigError: there is no encoding, and no format has the suffix.
    """
    encoding = encoding or encoding_of(path)
    try:
        with temporary_file(path) as temporary:
            if encoding.codec is None:
                frames = (frame for chunk in frame_chunks for frame in chunk)
                write_pictures(temporary, frames, encoding.format, fps, metadata)
            else:
                _encode(temporary, frame_chunks, fps, encoding, metadata)
            for written in [*(temporary.iterdir() if temporary.is_dir() else ()), temporary]:
                fsync(written)
            return temporary.replace(path) if may_replace else move_to_free_name(temporary, path)
    except OSError as error:
        # PyAV's errors do not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _encode(
    path: Path, frame_chunks: Iterable[Tensor], fps: float, encoding: Encoding, metadata: Mapping[str, str]
) -> None:
    """Encodes each chunk in a thread while the next one is computed."""
    import av

    # Without the flag, Matroska files contain a random identifier.
    options = {"fflags": "+bitexact"}
    with (
        # Without "file:", FFmpeg takes a relative path with a colon for an address.
        av.open(f"file:{path}", "w", format=encoding.format, options=options) as container,
        ThreadPoolExecutor(1) as thread,
    ):
        # FFmpeg's strings end at a null character.
        container.metadata.update({key: text.replace("\0", " ") for key, text in metadata.items()})
        stream, writing, count = None, None, 0
        for chunk in frame_chunks:
            if stream is None:
                stream = _open_stream(container, encoding, fps, chunk)
            if writing is not None:
                # Raises the errors of the thread, and keeps at most two chunks in memory.
                writing.result()
            writing = thread.submit(_encode_chunk, container, stream, chunk, count)
            count += len(chunk)
        assert stream is not None and writing is not None, "the video has no frames"
        writing.result()
        container.mux(stream.encode())


def _open_stream(container: Any, encoding: Encoding, fps: float, chunk: Tensor) -> Any:
    """Adds a video stream to a file, for frames of the size of `chunk`."""
    assert encoding.codec is not None
    # 23.976 becomes 24000/1001 to a millionth.
    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream(CODECS[encoding.codec].encoder, rate=rate, options=_codec_options(encoding))
    stream.height, stream.width = chunk.shape[1:3]
    # Every player supports 4:2:0; lossless video keeps the colour of every pixel.
    stream.pix_fmt = "yuv444p" if encoding.is_lossless else "yuv420p"
    if (encoding.format, encoding.codec) == ("mp4", "hevc"):
        # QuickTime supports no other tag of HEVC.
        stream.codec_context.codec_tag = "hvc1"
    _tag(stream.codec_context)
    stream.time_base = 1 / rate
    with keep_scheduling():
        container.start_encoding()
    return stream


def _codec_options(encoding: Encoding) -> dict[str, str]:
    """Returns encoder options with which equal frames always give equal files."""
    crf = {"crf": str(encoding.crf)}
    if encoding.codec == "h264":
        # With several threads or with macroblock tree, the output of x264 varies.
        return crf | {"preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
    if encoding.codec == "hevc":
        # With B-frames, x265 sets no timestamps for videos of one or two frames.
        parameters = "log-level=none:frame-threads=1:pools=none:bframes=0"
        parameters += ":lossless=1" if encoding.is_lossless else ""
        return crf | {"preset": "medium", "x265-params": parameters}
    if encoding.codec == "vp9":
        speed = {"deadline": "good", "cpu-used": "2", "threads": "1", "b": "0"}
        return speed | ({"lossless": "1"} if encoding.is_lossless else crf)
    return crf | {"preset": "6"}


@contextlib.contextmanager
def keep_scheduling() -> Iterator[None]:
    """Restores the scheduling of the calling thread, which SVT-AV1, as root, changes to real-time when it is opened."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, parameters)


def _encode_chunk(container: Any, stream: Any, chunk: Tensor, start: int) -> None:
    """Encodes frames (F, H, W, 3); `start` is the number of the first one."""
    import av

    for number, frame in enumerate(chunk.numpy(), start):
        # Converted here, because the implicit conversion before encoding does not always give the same bits.
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format=stream.pix_fmt,
            src_colorspace=BT709,
            dst_colorspace=BT709,
            src_color_range=FULL_RANGE,
            dst_color_range=LIMITED_RANGE,
            interpolation=EXACT,
        )
        _tag(picture)
        picture.pts = number
        container.mux(stream.encode(picture))


def _tag(target: Any) -> None:
    """Tags an encoder or a frame as BT.709 in limited range, which every player supports."""
    target.colorspace = target.color_primaries = target.color_trc = BT709
    target.color_range = LIMITED_RANGE


def read_frames(path: Path) -> list:
    """Reads all frames of a video as PIL images."""
    import av

    with av.open(f"file:{path}") as container:
        return [frame.to_image() for frame in container.decode(video=0)]
