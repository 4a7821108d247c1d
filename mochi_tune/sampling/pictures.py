"""Writes PNG, animated GIF and animated WebP with Pillow."""

import itertools
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from torch import Tensor

# Number of evenly spaced frames that the colours of a GIF are chosen from.
PALETTE_FRAMES = 16
# Colours of a GIF: one index stays free for pixels that do not change between frames.
PALETTE_COLOURS = 255


def write_pictures(path: Path, frames: Iterable[Tensor], kind: str, fps: float, metadata: Mapping[str, str]) -> None:
    """Writes uint8 frames (H, W, 3).

    Args:
        path: the file. For more than one frame as PNG, it becomes a folder of 0001.png, 0002.png and so on.
        frames: the frames in order.
        kind: "png", "gif" or "webp".
        fps: frames per second. GIF rounds the end of each frame to 10 ms, WebP to 1 ms.
        metadata: texts for the keys "title" and "comment".
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


def durations(num_frames: int, fps: float, tick: int) -> list[int]:
    """Returns the duration of each frame in milliseconds, in multiples of `tick`; rounding errors do not accumulate."""
    ends = [round(1000 * number / (fps * tick)) * tick for number in range(num_frames + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _write_png(path: Path, frames: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in metadata.items():
        # Keys begin with a capital letter. Source: the PNG specification, 11.3.3.1 (keywords).
        info.add_itxt(key.capitalize(), text)
    remaining = iter(frames)
    first = list(itertools.islice(remaining, 2))
    has_several = len(first) > 1
    if has_several:
        # A killed process may have left a folder.
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    for number, frame in enumerate(itertools.chain(first, remaining), 1):
        Image.fromarray(frame.numpy()).save(path / f"{number:04d}.png" if has_several else path, "PNG", pnginfo=info)


def _with_one_palette(images: Sequence[Any]) -> list[Any]:
    """Converts pictures to one common palette, with dithering; a palette for each frame would make colours flicker."""
    from PIL import Image

    chosen = sorted({i * (len(images) - 1) // (PALETTE_FRAMES - 1) for i in range(PALETTE_FRAMES)})
    width, height = images[0].size
    column = Image.new("RGB", (width, height * len(chosen)))
    for row, number in enumerate(chosen):
        column.paste(images[number], (0, row * height))
    palette = column.quantize(PALETTE_COLOURS, Image.Quantize.MEDIANCUT)
    return [image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for image in images]


def _xmp(metadata: Mapping[str, str]) -> bytes:
    """Returns the metadata as an XMP packet. Source: ISO 16684-1 and the Dublin Core names that it uses."""
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
    """Removes the characters that XML does not allow."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
