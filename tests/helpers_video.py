"""Real video files for tests: every frame caches its number as eight bars, and its corners tell which way is up."""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

CODECS = {".webm": "libvpx-vp9", ".avi": "mpeg4", ".mpg": "mpeg2video", ".gif": "gif"}
# Other than yuv420p.
PIXEL_FORMATS = {
    "gif": "rgb8",
    "png": "rgb24",
    "qtrle": "rgb24",
    "prores_ks": "yuv422p10le",
    "dnxhd": "yuv422p",
    "huffyuv": "yuv422p",
    "utvideo": "yuv422p",
    "mjpeg": "yuvj420p",
}
# Fine enough for every frame rate that the tests use, and for timestamps to the millisecond.
TIME_BASE = Fraction(1, 30000)
MAX_FRAMES = 256


def paint_frame(number: int, width: int, height: int) -> np.ndarray:
    """Returns a uint8 (height, width, 3) picture: `number` (0..255) as bars on top, red and blue below.

    The top half holds eight vertical bars, dark or light, the highest bit on the left; the bottom half is red on the
    left and blue on the right.
    """
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(8):
        light = number >> (7 - bit) & 1
        frame[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 255 if light else 0
    frame[height // 2 :, : width // 2] = (200, 30, 30)
    frame[height // 2 :, width // 2 :] = (30, 30, 200)
    return frame


def frame_number(frame) -> int:
    """Returns the number that `paint_frame` put into an upright, uncropped uint8 (H, W, 3) array or tensor."""
    pixels = np.asarray(frame)
    height, width = pixels.shape[:2]
    bars = [pixels[height // 4, (2 * bit + 1) * width // 16].mean() > 127 for bit in range(8)]
    return int("".join("1" if bar else "0" for bar in bars), 2)


def is_upright(frame) -> bool:
    """Returns whether the bottom of a uint8 (H, W, 3) picture is red on the left and blue on the right."""
    pixels = np.asarray(frame).astype(int)
    height, width = pixels.shape[:2]
    left, right = pixels[height * 3 // 4, width // 4], pixels[height * 3 // 4, width * 3 // 4]
    return bool(left[0] > 150 > left[2] and right[2] > 150 > right[0])


def write_video(
    path: Path,
    num_frames: int = 30,
    *,
    rate: int | Fraction = 30,
    timestamps: Sequence[float] | None = None,
    width: int = 64,
    height: int = 64,
    rotation: int = 0,
    mirrored: bool = False,
    codec: str | None = None,
    color_transfer: int | None = None,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    first_number: int = 0,
) -> Path:
    """Encodes numbered frames into a video file; its suffix picks the container.

    Args:
        path: where to write, .mp4 .mov .m4v .mkv .webm .avi .ts .mpg or .gif.
        num_frames: frames to write, at most 256 to keep their numbers apart.
        rate: frames a second, when `timestamps` is not given.
        timestamps: seconds at which each frame is displayed; their number replaces `num_frames`.
        width: of the upright picture, in even pixels.
        height: of the upright picture, in even pixels.
        rotation: degrees counter-clockwise by which a player must turn the stored picture, 0, 90, 180 or 270.
        mirrored: the display matrix also mirrors the picture (the stored picture is not mirrored to undo it).
        codec: the encoder; by default H.264, VP9 in .webm, MPEG-4 in .avi, MPEG-2 in .mpg.
        color_transfer: the transfer characteristic to tag, e.g. 16 for PQ and 18 for HLG.
        pixel_aspect: width to height of a stored pixel, to tag; `width` counts stored pixels.
        options: of the encoder, e.g. {"bf": "0"}.
        container_options: of the container, e.g. {"movflags": "faststart"}.
        first_number: the number of the first frame.
    """
    import av

    if timestamps is None:
        timestamps = [index / Fraction(rate) for index in range(num_frames)]
    assert len(timestamps) + first_number <= MAX_FRAMES
    with av.open(str(path), "w", options=container_options or {}) as container:
        codec = codec or CODECS.get(path.suffix.lower(), "libx264")
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = (height, width) if rotation % 180 else (width, height)
        stream.pix_fmt = PIXEL_FORMATS.get(codec, "yuv420p")
        stream.options = options or {}
        # AVI counts frames and can only hold a constant rate; WebM counts milliseconds.
        time_base = {".avi": 1 / Fraction(rate), ".webm": Fraction(1, 1000)}.get(path.suffix.lower(), TIME_BASE)
        if codec in ("mpeg2video", "dnxhd", "gif"):
            time_base = 1 / Fraction(rate)
        stream.codec_context.time_base = time_base
        if color_transfer is not None:
            stream.codec_context.color_trc = color_transfer
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        for index, seconds in enumerate(timestamps):
            picture = np.rot90(paint_frame(first_number + index, width, height), -rotation // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            frame.time_base, frame.pts = time_base, round(Fraction(seconds) / time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # As root, SVT-AV1 makes its caller a real-time process, which starves all others and every process it starts.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def copy_from_keyframe(source: Path, target: Path, number: int, **tags: int) -> Path:
    """Copies packets, not re-encoded, from the keyframe of that number on, as `ffmpeg -ss … -c copy` does.

    Colour tags, as in `write_planes`, are written into the container's header alone.
    """
    import av

    with av.open(str(source)) as container, av.open(str(target), "w") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream, opaque=True)
        for name, value in tags.items():
            setattr(copy.codec_context, name, value)
        keys = 0
        for packet in container.demux(stream):
            keys += packet.is_keyframe
            if keys > number and packet.size:
                packet.stream = copy
                output.mux(packet)
    return target


def numbers_by_fps_filter(path: Path) -> list[int]:
    """Returns the numbers of the frames that libavfilter's fps=30 gives, the first picture at 0."""
    import av
    from av.error import EOFError as EndOfFile

    numbers = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(template=stream), graph.add("setpts", "PTS-STARTPTS"), graph.add("fps", "30")]
        graph.link_nodes(*nodes, graph.add("buffersink"))
        graph.configure()
        for frame in [*container.decode(stream), None]:
            if frame is not None and not frame.duration:
                # As ffmpeg estimates it.
                frame.duration = round(1 / stream.guessed_rate / frame.time_base)
            graph.vpush(frame)
            while True:
                try:
                    numbers.append(frame_number(graph.vpull().to_ndarray(format="rgb24")))
                except (BlockingIOError, EndOfFile):
                    break
    return numbers


def write_audio(path: Path, num_seconds: float = 1.0) -> Path:
    """Encodes a tone and no picture into an .mp4 or .mkv file."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        samples = np.sin(np.arange(int(48000 * num_seconds)) * 0.05).astype(np.float32)
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], "fltp", "mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_bad_video(folder: Path, kind: str) -> Path:
    """Writes a file that must be refused, made from a clip of 90 frames of 128x128 pixels at 30 fps.

    Args:
        folder: where to write bad.mp4, bad.mkv, bad.webm or bad.avi.
        kind: empty, garbage, audio, no moov, cut mdat, cut mdat between frames, cut.mkv, damaged (600 bytes in the
            middle), damaged begin, concealed (half of a packet in the middle of an MPEG-4 file), hollow (one packet in
            the middle of a VP8 file gives no picture), or over-reported (an AVI header that lists ten times the
            frames).
    """
    suffix = {"concealed": "avi", "over-reported": "avi", "cut.mkv": "mkv", "hollow": "webm"}.get(kind, "mp4")
    path = folder / f"bad.{suffix}"
    if kind == "audio":
        return write_audio(path)
    options = {"movflags": "faststart"} if kind.startswith("cut mdat") else {}
    codec = "libvpx" if kind == "hollow" else None
    write_video(path, 90, width=128, height=128, codec=codec, options={"g": "10"}, container_options=options)
    data = bytearray(path.read_bytes())
    if kind == "empty":
        data = b""
    elif kind == "garbage":
        data = np.random.default_rng(0).bytes(5000)
    elif kind == "no moov":
        data = data[: data.find(b"moov") - 4]
    elif kind == "cut mdat":
        data = data[: (data.find(b"mdat") + len(data)) // 2]
    elif kind == "cut mdat between frames":
        # Nothing but the box's length tells that frames are missing here.
        data = data[: -len(_packets(path)[-1])]
    elif kind == "cut.mkv":
        data = data[: len(data) // 2]
    elif kind == "damaged":
        middle = (data.find(b"mdat") + data.find(b"moov")) // 2
        data[middle : middle + 600] = np.random.default_rng(0).bytes(600)
    elif kind == "damaged begin":
        begin = data.find(_packets(path)[0])
        data[begin : begin + 600] = np.random.default_rng(0).bytes(600)
    elif kind == "concealed":
        packet = _packets(path)[45]
        begin, half = data.find(packet), len(packet) // 2
        data[begin + half : begin + len(packet)] = bytes(len(packet) - half)
    elif kind == "hollow":
        # The bit of a VP8 frame's first byte that has it displayed.
        data[data.find(_packets(path)[45])] &= ~0x10
    elif kind == "over-reported":
        for name, offset in ((b"avih", 24), (b"strh", 40)):
            assert struct.unpack_from("<I", data, data.find(name) + offset) == (90,)
            struct.pack_into("<I", data, data.find(name) + offset, 900)
    path.write_bytes(data)
    return path


def _packets(path: Path) -> list[bytes]:
    import av

    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@contextmanager
def keeping_frames(module, folder: Path) -> Iterator[None]:
    """Has a module's `write_video` keep each video's uint8 frames as well, before their compression, as FOLDER/STEM.pt.

    A number that rounds the other way makes the encoder decide otherwise, so that frames are not compared behind it.
    """
    import torch

    write = module.write_video

    def keep(path: Path, chunks, *more, **options):
        chunks = list(chunks)
        folder.mkdir(exist_ok=True)
        # A video that takes its name later is written under .NAME.PROCESS.tmp.
        name = path.name[1:].rsplit(".", 2)[0] if path.suffix == ".tmp" else path.name
        torch.save(torch.cat(chunks), folder / f"{Path(name).stem}.pt")
        return write(path, chunks, *more, **options)

    module.write_video = keep
    try:
        yield
    finally:
        module.write_video = write


def write_interlaced(path: Path, count: int, top_first: bool) -> Path:
    """Encodes pictures of two fields each as H.264: field n, by its time, has the number n; 64x64 pixels, 30 fps."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.options = {"flags": "+ildct+ilme", "crf": "10"}
        # PyAV cannot set a frame's order of fields; the encoder takes it from there.
        graph = av.filter.Graph()
        buffer = graph.add_buffer(width=64, height=64, format="rgb24", time_base=Fraction(1, 30))
        order = graph.add("setfield", "tff" if top_first else "bff")
        graph.link_nodes(buffer, order, graph.add("format", "yuv420p"), graph.add("buffersink"))
        graph.configure()
        for index in range(count):
            picture = paint_frame(2 * index, 64, 64)
            late = 1 if top_first else 0
            picture[late::2] = paint_frame(2 * index + 1, 64, 64)[late::2]
            # Interlaced video has colours for each field; grey ones need none.
            picture[32:] = 128
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.time_base, frame.pts = Fraction(1, 30), index
            graph.vpush(frame)
            container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode())
    return path


def write_planes(path: Path, pixel_format: str, planes: Sequence[np.ndarray], count: int = 1, **tags: int) -> Path:
    """Encodes pictures without loss, by FFV1 in Matroska, from the samples of their planes.

    Args:
        path: an .mkv.
        pixel_format: FFmpeg's name, e.g. yuv420p10le.
        planes: uint8 or uint16 (H, W) of each plane.
        count: of equal pictures.
        tags: colorspace, color_range, color_trc, color_primaries, by their numbers in H.273.
    """
    import av

    height, width = planes[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for index in range(count):
            frame = av.VideoFrame(width, height, pixel_format)
            for plane, samples in zip(frame.planes, planes, strict=True):
                rows = np.zeros((samples.shape[0], plane.line_size // samples.itemsize), samples.dtype)
                rows[:, : samples.shape[1]] = samples
                plane.update(rows)
            for name, value in tags.items():
                setattr(frame, name, value)
            frame.time_base, frame.pts = Fraction(1, 30), index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
