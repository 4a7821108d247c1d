"""Reads stills and animated WebP with Pillow."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mochi_tune.data_prep.timeline import Picture
from mochi_tune.errors import DataError
from mochi_tune.models.latents import FPS

STILL_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Offset of the flags in a WebP file with an extended header, and the flag of animations.
_FLAGS_AT, _ANIMATION_FLAG = 20, 0x02
# Exif tag of the orientation, and its values that swap width and height.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
# For each Pillow mode: the mode without alpha or palette, and the colour space of matching profiles.
_COLOURS = {
    **dict.fromkeys(("RGB", "RGBA", "P", "PA"), ("RGB", "RGB")),
    **dict.fromkeys(("L", "LA"), ("L", "GRAY")),
    "CMYK": ("CMYK", "CMYK"),
}
# Maximum difference, of 255, between profiles that count as sRGB.
_MAX_ROUNDING = 2


@dataclass(frozen=True)
class StillSize:
    """Properties of a picture.

    Attributes:
        width: of the upright picture, in pixels.
        height: of the upright picture, in pixels.
        durations: of each frame, in seconds.
        has_profile: whether its colours are converted from a profile other than sRGB.
    """

    width: int
    height: int
    durations: list[Fraction]
    has_profile: bool = False

    @property
    def num_frames(self) -> int:
        """Number of frames; only an animated WebP has more than one."""
        return len(self.durations)


def is_animation(path: str | Path) -> bool:
    """Whether a file has the header of an animated WebP; False if it cannot be read.

    Source: developers.google.com/speed/webp/docs/riff_container, "Extended File Format".
    """
    # Opening a pipe would block.
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(_FLAGS_AT + 1)
    except OSError:
        # Reading its pictures will report the error.
        return False
    is_extended = len(head) > _FLAGS_AT and head.startswith(b"RIFF") and head[8:16] == b"WEBPVP8X"
    return is_extended and bool(head[_FLAGS_AT] & _ANIMATION_FLAG)


def read_still_size(path: Path, max_pixels: int) -> StillSize:
    """Reads the properties of a picture from its header.

    Raises:
        DataError: the file is not a picture, holds 32-bit floats, or has more than `max_pixels`.
    """
    with _open(path) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise DataError(
                f"{path}: is a picture of {width}x{height} pixels, more than {max_pixels // 10**6} million: "
                "scale it down first."
            )
        if image.mode == "F":
            raise DataError(f"{path}: holds 32-bit floats, and which of them is white is unknown: save it in 16 bits.")
        if image.getexif().get(_ORIENTATION) in _TURNED:
            width, height = height, width
        durations = [Fraction(1, FPS)]
        if image.format == "WEBP" and getattr(image, "n_frames", 1) > 1:
            durations = [_duration(image, number) for number in range(image.n_frames)]
        return StillSize(width, height, durations, _foreign_profile(image) is not None)


def read_still(path: Path) -> Iterator[Picture]:
    """Yields a picture's frames, upright.

    Raises:
        DataError: the file is damaged.
    """
    from PIL import ImageOps

    with _open(path) as image:
        if image.format != "WEBP" or getattr(image, "n_frames", 1) == 1:
            yield Picture(Fraction(0), Fraction(1, FPS), _to_rgb(ImageOps.exif_transpose(image)), "pillow")
            return
        time = Fraction(0)
        for number in range(image.n_frames):
            duration = _duration(image, number)
            yield Picture(time, duration, _to_rgb(image), "pillow")
            time += duration


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Opens a picture with Pillow; converts errors in the block to DataError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # `read_still_size` checks the size against a lower limit than Pillow's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            yield image
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: is a picture of too many pixels ({error}): scale it down first.") from error
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise DataError(
            f"{path}: cannot be read as a picture ({reason}): it is damaged; copy it again or remove it."
        ) from error


def _duration(image, number: int) -> Fraction:
    image.seek(number)
    image.load()
    # Browsers show frames without a duration for 0.1 s.
    return Fraction(int(image.info.get("duration") or 100), 1000)


def _to_rgb(image) -> np.ndarray:
    """Converts a Pillow image to uint8 RGB (H, W, 3), on white where it is transparent, as viewers show it."""
    from PIL import Image

    if image.mode.startswith("I"):
        # 16 bits per pixel, which Pillow would clip instead of scale.
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, 2)
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    alpha = image.convert("RGBA").getchannel("A") if has_alpha else None
    profile = _foreign_profile(image)
    image = image.convert("RGB") if profile is None else _to_srgb(image.convert(_COLOURS[image.mode][0]), profile)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _foreign_profile(image) -> Any | None:
    """Returns the colour profile of a picture; None if it is missing, sRGB, or of another colour space."""
    from PIL import Image, ImageCms

    content, (mode, space) = image.info.get("icc_profile"), _COLOURS.get(image.mode, ("", ""))
    if not content or not mode:
        return None
    try:
        profile: Any = ImageCms.getOpenProfile(BytesIO(content))
        if profile.profile.xcolor_space.strip() != space:
            return None
        if mode == "CMYK":
            return profile
        # Compare results, as sRGB profiles have many names.
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        sample = Image.fromarray(colours if mode == "RGB" else levels[None])
        change = np.asarray(_to_srgb(sample, profile)).astype(int) - np.asarray(sample.convert("RGB"))
    except ImageCms.PyCMSError:
        return None
    return profile if np.abs(change).max() > _MAX_ROUNDING else None


def _to_srgb(image, profile) -> Any:
    from PIL import ImageCms

    return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
