"""Writing videos and contact sheets."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from mochi_tune.files import move_to_free_name, temporary_file
from mochi_tune.models.latents import FPS

# Without a tag players guess the colours by the size. By their numbers in ITU-T H.273: matrix, primaries and transfer.
BT709, LIMITED_RANGE, FULL_RANGE = 1, 1, 2
# libswscale's bicubic filter with exact rounding and all of the source's colours.
EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000


def write_video(path: Path, frame_chunks: Iterable[Tensor], may_replace: bool = True, fps: int = FPS) -> Path:
    """Writes uint8 frames (F, H, W, 3), given in chunks, as H.264; the file appears only when it is complete.

    Args:
        path: an .mp4; its folder exists.
        frame_chunks: frames in order; sides are even.
        may_replace: what to do when `path` is there by then: put this video in its place, or beside it.
        fps: frames a second.

    Returns:
        The video's path.
    """
    try:
        with temporary_file(path) as temporary:
            _encode(temporary, frame_chunks, fps)
            return temporary.replace(path) if may_replace else move_to_free_name(temporary, path)
    except OSError as error:
        # PyAV names neither the file nor, in every case, the reason.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _encode(path: Path, frame_chunks: Iterable[Tensor], fps: int) -> None:
    """Encodes each chunk in a thread, while the next one is being made."""
    import av

    with av.open(str(path), "w", format="mp4") as container, ThreadPoolExecutor(1) as thread:
        stream, writing, count = None, None, 0
        for chunk in frame_chunks:
            if stream is None:
                # CRF 17 is visually lossless; yuv420p is what every player reads. With several threads or its
                # macroblock tree x264 does not always make the same file of the same frames.
                options = {"crf": "17", "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
                stream = container.add_stream("libx264", rate=fps, options=options)
                stream.height, stream.width = chunk.shape[1:3]
                stream.pix_fmt = "yuv420p"
                _tag(stream.codec_context)
                stream.time_base = Fraction(1, fps)
            if writing is not None:
                # One at a time: raises here what failed there, and no more than two chunks are in memory.
                writing.result()
            writing = thread.submit(_encode_chunk, container, stream, chunk, count)
            count += len(chunk)
        assert stream is not None and writing is not None, "a video has a frame"
        writing.result()
        container.mux(stream.encode())


def _encode_chunk(container: Any, stream: Any, chunk: Tensor, start: int) -> None:
    """Encodes frames (F, H, W, 3), of which the first one has the number `start`."""
    import av

    for number, frame in enumerate(chunk.numpy(), start):
        # Converted here and not by the encoder, whose own conversion does not always give the same bits.
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p",
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
    """Tags an encoder or a frame as BT.709 in limited range, which every player takes."""
    target.colorspace = target.color_primaries = target.color_trc = BT709
    target.color_range = LIMITED_RANGE


def read_frames(path: Path) -> list:
    """Reads all frames of a video as PIL images."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def write_contact_sheet(path: Path, videos: dict[str, Path], columns: int = 6) -> None:
    """Writes a PNG with one labelled row of evenly spaced frames for each video, first and last included."""
    from PIL import Image, ImageDraw

    rows = {}
    for label, video in videos.items():
        frames = read_frames(video)
        rows[label] = [frames[round(i * (len(frames) - 1) / (columns - 1))] for i in range(columns)]
    width, height = next(iter(rows.values()))[0].size
    label_height, gap = 18, 2
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + label_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, frames) in enumerate(rows.items()):
        top = i * (height + label_height)
        draw.text((2, top + 3), label, fill="black")
        for j, frame in enumerate(frames):
            sheet.paste(frame, (j * (width + gap), top + label_height))
    sheet.save(path)
