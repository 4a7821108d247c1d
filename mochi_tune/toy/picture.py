"""The demo as one animated picture, for pages without videos: training clips, before, and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mochi_tune.files import atomic_file
from mochi_tune.toy.trail import EDGE_WIDTH, LINE_WIDTH, trail_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Factors by which clips are enlarged, and the number of training clips. The other sizes are in pixels of the picture.
SCALE, TAUGHT_SCALE, NUM_TAUGHT = 6, 2, 3
MARGIN, GAP, SPACE, LINE = 40, 24, 12, 6
TITLE_SIZE, TEXT_SIZE = 46, 32
BACK, INK, SOFT, ACCENT, EDGE = "#fcfcfa", "#1c2127", "#59616b", "#0b6b94", "#333333"
FRAME_MS, LAST_FRAME_MS = 83, 1000
# Factor of supersampling, which smooths the edges of trails.
SMOOTH = 4


@dataclass(frozen=True)
class Story:
    """The content of the picture. Clips are uint8 frames (F, H, W, 3) of one size.

    Attributes:
        title: one sentence.
        taught: training clips; the picture shows the first three.
        taught_label: text above them.
        prompt: text above the pair.
        pair: text below a clip -> the clip; before, then after.
        result: the last line.
    """

    title: str
    taught: Sequence[Tensor]
    taught_label: str
    prompt: str
    pair: dict[str, Tensor]
    result: str


def write_picture(path: Path, story: Story) -> None:
    """Writes a lossless animated WebP that loops forever, atomically."""
    from PIL import Image

    clips = list(story.pair.values())
    num_frames, height, width, _ = clips[0].shape
    top = MARGIN + TITLE_SIZE + GAP + TEXT_SIZE + SPACE
    lefts = [MARGIN + TAUGHT_SCALE * width + 2 * GAP]
    lefts.append(lefts[0] + SCALE * width + GAP)
    bottom = top + SCALE * height
    card = Image.new("RGB", (lefts[1] + SCALE * width + MARGIN, bottom + 2 * (TEXT_SIZE + GAP) + MARGIN), BACK)
    _write(card, (MARGIN, MARGIN), story.title, TITLE_SIZE, INK)
    _write(card, (MARGIN, top - TEXT_SIZE - SPACE), story.taught_label, TEXT_SIZE, SOFT)
    _write(card, (lefts[0], top - TEXT_SIZE - SPACE), story.prompt, TEXT_SIZE, SOFT)
    for left, label in zip(lefts, story.pair, strict=True):
        _write(card, (left, bottom + SPACE), label, TEXT_SIZE, INK)
    _write(card, (MARGIN, bottom + TEXT_SIZE + 2 * GAP), story.result, TEXT_SIZE, ACCENT)
    trails = [_trail(clip) for clip in clips]

    frames = []
    for number in range(num_frames):
        frame = card.copy()
        for i, clip in enumerate(story.taught[:NUM_TAUGHT]):
            # Three clips are as high as the pair, so each is cropped by a strip for the gaps between them.
            shown = _scaled(clip[number], TAUGHT_SCALE).crop((0, 0, TAUGHT_SCALE * width, TAUGHT_SCALE * height - LINE))
            frame.paste(shown, (MARGIN, top + i * TAUGHT_SCALE * height + LINE * i // (NUM_TAUGHT - 1)))
        for left, clip, trail in zip(lefts, clips, trails, strict=True):
            shown = _scaled(clip[number], SCALE)
            shown.paste(trail, (0, 0), trail)
            frame.paste(shown, (left, top))
        frames.append(frame)
    milliseconds = [FRAME_MS] * (num_frames - 1) + [LAST_FRAME_MS]
    with atomic_file(path) as temporary:
        frames[0].save(
            temporary, "WEBP", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, lossless=True,
            quality=80, method=4, minimize_size=True,
        )  # fmt: skip


def _write(card: "Image", place: tuple[int, int], text: str, size: int, colour: str) -> None:
    """Draws a line of text in Pillow's own font, so that the picture is the same on all machines."""
    from PIL import ImageDraw, ImageFont

    ImageDraw.Draw(card).text(place, text, colour, ImageFont.load_default(size))


def _scaled(frame: Tensor, scale: int) -> "Image":
    """Enlarges a frame without interpolation."""
    from PIL import Image

    return Image.fromarray(frame.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())


def _trail(frames: Tensor) -> "Image":
    """Returns the trail of a clip's shape as a layer for its frames."""
    from PIL import Image, ImageDraw

    _, height, width, _ = frames.shape
    size = SCALE * width, SCALE * height
    layer = Image.new("RGBA", (SMOOTH * size[0], SMOOTH * size[1]))
    trail, pen, scale = trail_of(frames), ImageDraw.Draw(layer), SMOOTH * SCALE
    if trail is not None:
        line, head = ([(scale * x, scale * y) for x, y in points] for points in (trail.line, trail.head))
        pen.line(line, EDGE, round(scale * (LINE_WIDTH + 2 * EDGE_WIDTH)), "curve")
        pen.line([*head, head[0], head[1]], EDGE, round(scale * 2 * EDGE_WIDTH), "curve")
        pen.polygon(head, "white")
        pen.line(line, "white", round(scale * LINE_WIDTH), "curve")
    return layer.resize(size, Image.Resampling.LANCZOS)
