"""What Pillow writes: PNG, animated GIF and animated WebP."""

import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from torch import Tensor

# The colours of a GIF are chosen from so many frames, evenly spaced.
PALETTE_FRAMES = 16
# One index stays free, for pixels that do not change from a frame to the next.
PALETTE_COLOURS = 255


def write_pictures(path: Path, frames: Iterable[Tensor], kind: str, fps: int, metadata: Mapping[str, str]) -> None:
    """Writes uint8 frames (H, W, 3).

    Args:
        path: a file; for PNG of more than one frame it becomes a folder of 0001.png, 0002.png and so on.
        frames: in order.
        kind: png, gif or webp.
        fps: frames a second; GIF rounds each frame's end to 10 ms, WebP to 1 ms.
        metadata: texts by "title" and "comment".
    """
    if kind == "png":
        _write_png(path, frames, metadata)
        return
    from PIL import Image

    images = [Image.fromarray(frame.numpy()) for frame in frames]
    tick = 10 if kind == "gif" else 1
    options: dict[str, Any] = {"save_all": True, "loop": 0, "duration": durations(len(images), fps, tick)}
    if kind == "gif":
        images = _with_one_palette(images)
        options |= {"optimize": False, "comment": json.dumps(metadata).encode()} if metadata else {"optimize": False}
    else:
        options |= {"lossless": True, "quality": 50, "method": 3} | ({"xmp": _xmp(metadata)} if metadata else {})
    if len(images) == 1:
        del options["duration"]
    images[0].save(path, kind.upper(), append_images=images[1:], **options)


def durations(num_frames: int, fps: int, tick: int) -> list[int]:
    """Returns how many milliseconds each frame is shown, in multiples of `tick`, so that no error adds up."""
    ends = [round(1000 * number / (fps * tick)) * tick for number in range(num_frames + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _write_png(path: Path, frames: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in metadata.items():
        # Keys begin with a capital letter. Source: the PNG specification, 11.3.3.1 (keywords).
        info.add_itxt(key.capitalize(), text)
    several = _Peek(iter(frames))
    if several:
        # Of a process that was killed.
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    for number, frame in enumerate(several, 1):
        Image.fromarray(frame.numpy()).save(path / f"{number:04d}.png" if several else path, "PNG", pnginfo=info)


class _Peek:
    """Frames, of which it is known whether there are several before any is taken."""

    def __init__(self, frames: Iterator[Tensor]) -> None:
        self.first = [frame for _, frame in zip(range(2), frames, strict=False)]
        self.rest = frames

    def __bool__(self) -> bool:
        return len(self.first) > 1

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.first
        yield from self.rest


def _with_one_palette(images: Sequence[Any]) -> list[Any]:
    """Returns pictures of one palette, dithered; colours jump where each frame has its own."""
    from PIL import Image

    chosen = sorted({i * (len(images) - 1) // (PALETTE_FRAMES - 1) for i in range(PALETTE_FRAMES)})
    width, height = images[0].size
    column = Image.new("RGB", (width, height * len(chosen)))
    for row, number in enumerate(chosen):
        column.paste(images[number], (0, row * height))
    palette = column.quantize(PALETTE_COLOURS, Image.Quantize.MEDIANCUT)
    return [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]


def _xmp(metadata: Mapping[str, str]) -> bytes:
    """Returns an XMP packet. Source: ISO 16684-1 and the Dublin Core names that it uses."""
    names = {"title": "dc:title", "comment": "dc:description"}
    texts = "".join(
        f'<{tag}><rdf:Alt><rdf:li xml:lang="x-default">{escape(_xml_text(metadata[key]))}</rdf:li></rdf:Alt></{tag}>'
        for key, tag in names.items()
        if key in metadata
    )
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"{texts}</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def _xml_text(text: str) -> str:
    """Returns a text without the characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
