"""Cuts frame-exact clips from a film by decoding and re-encoding, and marks each with its origin."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mochi_tune.data_prep.colour import FULL_RANGE, HDR_TRANSFERS, LIMITED_RANGE, MATRICES, is_limited_grey, is_rgb
from mochi_tune.data_prep.frames import find_seek_time, read_pictures, read_pictures_from
from mochi_tune.data_prep.probe import Scan, VideoIndex, read_index
from mochi_tune.data_prep.scenes import REPORT_EVERY
from mochi_tune.data_prep.timeline import Picture
from mochi_tune.errors import DataError
from mochi_tune.files import parse_object

# A picture that begins at most this many seconds before a clip's start belongs to it: tables have four decimals.
_NEAR = Fraction(1, 1000)
# Maximum ticks per second in the written file.
_MAX_SECOND = 10_000_000
# Flags of libswscale: bicubic filter, exact rounding, full chroma.
_EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000
_BT709 = 1
_MARK = "mochi-tune split"


@dataclass(frozen=True)
class Mark:
    """The origin of a clip, written into the metadata of its file.

    Attributes:
        source: the film's path in its folder.
        source_bytes: the film's size.
        start_seconds: of the clip, from the film's first picture.
        end_seconds: as `start_seconds`.
        crf: quality of the clip.
    """

    source: str
    source_bytes: int
    start_seconds: float
    end_seconds: float
    crf: int


def read_mark(path: Path) -> Mark | None:
    """Returns the origin of a clip; None if `cut_clips` did not write the file."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            values = parse_object(container.metadata.get("comment", ""))
        return Mark(**values[_MARK]) if values else None
    except (FFmpegError, OSError, KeyError, TypeError):
        return None


def cut_clips(path: Path, pieces: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Decodes a film once and writes its clips; a job of `WatchedProcess`.

    Args:
        path: of the film.
        pieces: by ascending start, each with "file", the path to write to, and "mark", the values of its `Mark`.

    Yields:
        {"pictures": decoded since the last report} regularly, and {"done": the piece's index, "frames": its number of
        pictures} when its file is complete.

    Raises:
        DataError: the film cannot be decoded, or has no picture at a piece's time.
        OSError: writing failed.
    """
    video = read_index(path)
    marks = [Mark(**piece["mark"]) for piece in pieces]
    waiting = list(enumerate(zip(marks, (Path(piece["file"]) for piece in pieces), strict=True)))
    writers: list[tuple[int, Mark, _ClipWriter]] = []
    count = 0
    try:
        for picture, time, end in _timed(path, video, marks[0].start_seconds):
            count += 1
            while waiting and time >= _seconds(waiting[0][1][0].start_seconds):
                index, (mark, file) = waiting.pop(0)
                writers.append((index, mark, _ClipWriter(file, picture, video, mark)))
            for index, mark, writer in [*writers]:
                if time >= _seconds(mark.end_seconds):
                    writers.remove((index, mark, writer))
                    yield {"done": index, "frames": writer.finish(path)}
                else:
                    writer.put(picture, time, end)
            if not waiting and not writers:
                break
            if count % REPORT_EVERY == 0:
                yield {"pictures": REPORT_EVERY}
        yield {"pictures": count % REPORT_EVERY}
        for index, _, writer in [*writers]:
            yield {"done": index, "frames": writer.finish(path)}
    finally:
        for _, _, writer in writers:
            writer.close()
    if waiting:
        start = waiting[0][1][0].start_seconds
        raise DataError(f"{path}: has no frame at {start:g} s: correct the row in the table of scenes, or delete it.")


def _seconds(seconds: float) -> Fraction:
    return Fraction(seconds) - _NEAR


def _timed(path: Path, video: VideoIndex, start: float) -> Iterator[tuple[Picture, Fraction, Fraction]]:
    """Yields pictures from `start` or earlier, each with its begin and end in seconds from the film's first picture."""
    number = video.picture_at(video.time(0) + Fraction(start) + _NEAR)
    key_time = find_seek_time(video, number)
    pictures = iter(read_pictures_from(path, video, key_time)) if key_time is not None else iter(())
    held = next(pictures, None)
    first_time = video.time(0)
    if held is None:
        pictures = iter(read_pictures(path, video))
        held = next(pictures, None)
        if held is None:
            raise DataError(f"{path}: not one frame of it can be decoded: it is damaged; remove it.")
        first_time = held.time
    for picture in pictures:
        yield held, held.time - first_time, picture.time - first_time
        held = picture
    yield held, held.time - first_time, held.time + held.duration - first_time


class _ClipWriter:
    """Encodes pictures as H.264 in MP4, with the times, orientation, pixel aspect and colours of the film."""

    def __init__(self, file: Path, picture: Picture, video: VideoIndex, mark: Mark) -> None:
        import av

        self.file = file
        self.second = video.second if video.second <= _MAX_SECOND else 90_000
        self.first_time: Fraction | None = None
        self.durations: dict[int, int] = {}
        frame = picture.image
        self.layout = choose_layout(frame)
        # Else the file would contain the time and the library's version, and differ between runs.
        self.container = av.open(f"file:{file}", "w", format="mp4", options={"fflags": "+bitexact"})
        self.container.metadata["comment"] = json.dumps({_MARK: asdict(mark)})
        rate = Fraction(video.scan.source_fps).limit_denominator(1001)
        quality = {"crf": str(mark.crf)} if mark.crf else {"qp": "0"}
        # Without B-frames the packets are in display order, which every reader handles.
        stream = self.container.add_stream("libx264", rate=rate, options=quality | {"preset": "fast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, self.layout
        stream.codec_context.time_base = Fraction(1, self.second)
        stream.codec_context.sample_aspect_ratio = Fraction(video.scan.pixel_aspect).limit_denominator(1000)
        self._tag(stream.codec_context, frame, video.scan)
        rotation, is_mirrored = video.scan.rotation, video.scan.is_mirrored
        if rotation or is_mirrored:
            # A scan describes a left-right mirror as a rotation by 180 and a top-bottom mirror.
            rotation += 180 if is_mirrored and rotation % 180 == 0 else 0
            stream.set_display_rotation(rotation % 360, hflip=is_mirrored)
        self.stream = stream

    def _tag(self, context: Any, frame: Any, scan: Scan) -> None:
        """Sets the film's colour tags on the encoder."""
        self.matrix, self.range = frame.colorspace, LIMITED_RANGE
        primaries, transfer = frame.color_primaries, frame.color_trc
        if is_rgb(frame):
            self.matrix = primaries = transfer = _BT709
        else:
            if frame.color_range == FULL_RANGE or frame.format.name.startswith("yuvj"):
                self.range = FULL_RANGE
            # Some files have the HDR transfer in the header only.
            transfer = next((n for n, name in HDR_TRANSFERS.items() if name == scan.hdr), transfer)
        context.color_primaries, context.color_trc, context.color_range = primaries, transfer, self.range
        context.colorspace = self.matrix

    def put(self, picture: Picture, time: Fraction, end: Fraction) -> None:
        """Encodes a picture that is shown from `time` to `end`, in seconds."""
        from av.video.frame import PictureType

        if self.first_time is None:
            self.first_time = time
        frame = picture.image
        if frame.format.name != self.layout:
            matrix = self.matrix if self.matrix in MATRICES else _BT709
            source = {} if is_rgb(frame) else {"src_colorspace": matrix, "src_color_range": self.range}
            # FFmpeg takes all grey for full range: this keeps the codes.
            dst_range = FULL_RANGE if is_limited_grey(frame) else self.range
            frame = frame.reformat(
                format=self.layout, dst_colorspace=matrix, dst_color_range=dst_range, interpolation=_EXACT, **source
            )
        # Do not force the picture types of the film's encoder.
        frame.pict_type = PictureType.NONE
        begin, behind = (round((each - self.first_time) * self.second) for each in (time, end))
        frame.pts, frame.time_base, frame.duration = begin, Fraction(1, self.second), behind - begin
        self.durations[begin] = behind - begin
        self._write(self.stream.encode(frame))

    def _write(self, packets: Any) -> None:
        try:
            for packet in packets:
                # The encoder does not set the last packet's duration.
                packet.duration = self.durations[packet.pts]
                self.container.mux(packet)
        except OSError as error:
            # PyAV's error does not name the file.
            raise OSError(error.errno, error.strerror, str(self.file)) from None

    def finish(self, source: Path) -> int:
        """Completes the file; returns its number of pictures."""
        if not self.durations:
            raise DataError(f"{source}: has no frame in a clip of the table of scenes: correct its row, or delete it.")
        try:
            self._write(self.stream.encode())
            self.container.close()
            written = read_index(self.file).scan.num_source_frames
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from None
        if written != len(self.durations):
            raise DataError(f"{self.file}: has {written} frames instead of {len(self.durations)}: split it again.")
        return written

    def close(self) -> None:
        """Closes the file without completing it."""
        self.container.close()


def choose_layout(frame: Any) -> str:
    """Returns the pixel format to encode a frame in: its own if x264 supports it, else yuv444p in 8 or 10 bits."""
    import av

    name = frame.format.name.replace("yuvj", "yuv").replace("yuva", "yuv")
    bits = max(component.bits for component in frame.format.components)
    offered = {each.name for each in av.Codec("libx264", "w").video_formats or ()}
    halves_width, halves_height = ("422" in name or "420" in name), "420" in name
    is_even = not (halves_width and frame.width % 2) and not (halves_height and frame.height % 2)
    if name.startswith("yuv") and name in offered and is_even:
        return name
    return "yuv444p10le" if bits > 8 else "yuv444p"
