"""A made film: three scenes with a black part, a frozen part and a doubled scene; frames carry numbers."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from helpers_video import frame_number, paint_frame

WIDTH, HEIGHT, STRIP, FPS = 192, 128, 24, 30
# Frames of each part, in order. The second scene stands still behind its first third; the last one is the first again.
PARTS = {"first": 45, "black": 45, "second": 48, "third": 45, "first again": 45}


# What each part's frames carry, in order.
NUMBERS = {
    "first": list(range(45)),
    "black": [-1] * 45,
    "second": [*range(90, 106), *[106] * 32],
    "third": list(range(138, 183)),
    "first again": list(range(45)),
}


def write_film(path: Path, crf: int = 12) -> Path:
    """Encodes the film: 228 frames at 30 fps."""
    frames = []
    for part, count in PARTS.items():
        for index in range(count):
            picture = paint_part(part, index)
            if part != "black":
                # It stands in the frozen part too, and the doubled scene has the numbers of the first one.
                shown = min(index, count // 3) if part == "second" else index
                first = 0 if part == "first again" else len(frames) - index
                picture[:STRIP] = paint_frame(first + shown, WIDTH, STRIP)
                # A low contrast, so that a number is no cut and no motion.
                picture[:STRIP] = picture[:STRIP] // 8 + 100
            frames.append(picture)
    return write_frames(path, frames, crf)


def paint_part(part: str, index: int) -> np.ndarray:
    """Returns a picture (HEIGHT, WIDTH, 3) of a part: of each its own pattern, in which a square moves."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    if part == "black":
        return picture
    seed = ("first", "second", "third").index(part.removesuffix(" again"))
    rng = np.random.default_rng(seed)
    blocks = rng.integers(30, 220, (HEIGHT // 32, WIDTH // 32, 3), dtype=np.uint8)
    picture[:] = blocks.repeat(32, 0).repeat(32, 1)
    shown = min(index, PARTS[part] // 3) if part == "second" else index
    left = 8 + 3 * shown
    picture[56:104, left : left + 40] = (250, 240, 60)
    return picture


def write_frames(path: Path, frames: Sequence[np.ndarray], crf: int = 12) -> Path:
    """Encodes uint8 frames (H, W, 3) as H.264 at 30 fps."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "ultrafast", "g": "30"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.time_base, frame.pts = Fraction(1, FPS), index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers_of(path: Path) -> list[int]:
    """Returns the number that each frame of a clip carries; -1 of a black one."""
    import av

    numbers = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            strip = frame.to_ndarray(format="rgb24")[:STRIP].astype(int)
            is_black = strip.max() < 40
            numbers.append(-1 if is_black else frame_number(((strip - 100) * 8).clip(0, 255)))
    return numbers
